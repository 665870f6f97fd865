"""Derive the engine's cost in shipped profiles, and what reads and computing leave of each other,
from a probe of the development machine.

    mimo-edge probe -o this-machine.toml && python tools/engine_figures.py this-machine.toml

No device has measured it yet, so every profile that states `cpu.engine` takes this machine's
figures times the factor its source names ("2 times it"; none: once), one that states
`storage.beside` this machine's shares, and `auto` without a probe these very figures.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tables import command

from mimo_edge.devices.profile import EngineCost, load_profile, plain_seconds
from mimo_edge.errors import UsageError

DEVICES = Path(__file__).resolve().parent.parent / "devices"
ASSUMED = DEVICES / "this_machine.py"
FACTOR = re.compile(r"([0-9.]+) times it")
_LINE = re.compile(r"^engine = .*$", re.MULTILINE)
_BESIDE = re.compile(r"^(beside = \{ value = )\{[^}]*\}", re.MULTILINE)
_ASSUMED_BESIDE = re.compile(r"^_BESIDE = \{.*\}$", re.MULTILINE)
_TABLE = re.compile(r"^_ENGINE_US = \{.*?^\}$", re.MULTILINE | re.DOTALL)


def stated() -> Iterator[tuple[Path, float, str]]:
    """(file, factor, source) of every profile that states the engine's cost itself."""
    for path in sorted(DEVICES.glob("*.toml")):
        figure = tomllib.loads(path.read_text("utf-8")).get("cpu", {}).get("engine")
        if figure is not None:
            factor = FACTOR.search(figure["source"])
            yield path, float(factor[1]) if factor else 1.0, figure["source"]


def rounded(cost: EngineCost, factor: float) -> dict[str, str]:
    """`factor` times it, to three digits, as it stands in a file."""
    return {
        name: plain_seconds(float(f"{factor * value:.3g}")) for name, value in asdict(cost).items()
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("profile", help="what probe wrote")
    profile = load_profile(parser.parse_args(argv).profile)
    cost = profile.engine
    shares = {name: float(f"{share:.2g}") for name, share in asdict(profile.beside).items()}
    table = ", ".join(f"{name} = {share}" for name, share in shares.items())
    for path in sorted(DEVICES.glob("*.toml")):
        text = path.read_text("utf-8")
        path.write_text(_BESIDE.sub(rf"\1{{ {table} }}", text), "utf-8")
    for path, factor, source in stated():
        values = ", ".join(f'{name} = "{text}"' for name, text in rounded(cost, factor).items())
        line = f'engine = {{ value = {{ {values} }}, evidence = "derived", source = "{source}" }}'
        text = path.read_text("utf-8")
        found = _LINE.findall(text)
        if len(found) != 1:
            raise UsageError(f"{path} has {len(found)} lines engine = ...")
        path.write_text(text.replace(found[0], line), "utf-8")
    rows = "".join(
        f'    "{name}": {float(f"{value * 1e6:.3g}"):g},\n' for name, value in asdict(cost).items()
    )
    code = ASSUMED.read_text("utf-8")
    code = _TABLE.sub(lambda _: f"_ENGINE_US = {{\n{rows}}}", code)
    beside = ", ".join(f'"{name}": {share}' for name, share in shares.items())
    ASSUMED.write_text(_ASSUMED_BESIDE.sub(f"_BESIDE = {{{beside}}}", code), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
