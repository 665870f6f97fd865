"""How the cost of a token grows: with the number of experts, with the cap on memory, with drafts.

    python tools/growth.py --folder /tmp/growth             # every table, on standard output
    python tools/growth.py --folder /tmp/growth --write     # into docs/benchmarks.md
    python tools/growth.py --folder /tmp/growth --part caps

Models of MiMo-V2-Flash's layer geometry with random weights are made in the folder, one at a time,
of at most 6 GB; the last one is deleted when its table is complete. Rows that were measured are
kept there, in rows-*.json: a run that was stopped, or had no time left, goes on where it was.
Each table begins no row after `--minutes`, and takes up to six on two idle cores. (How cost grows
with the context: tools/kv_growth.py. What drafts gain needs a trained model; here no draft is ever
right, and the table shows what they cost.)

Experts: decoding with all of them in memory, and with room for half of them. Caps: decoding in a
memory cgroup of 1/8 to 1/1 of the model's size, page cache counted. Drafts: milliseconds per pass
of the model that verifies 0 to 3 drafts, with all experts in memory and with room for a quarter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from make_random_model import scaled_config, tiny_config, write_model
from tables import Deadline, Rows, add_minutes, command, markdown, write_section

from mimo_edge.bench.cases import Case, Settings
from mimo_edge.bench.results import Row
from mimo_edge.bench.session import Bench
from mimo_edge.budget import plan
from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError, DeviceError, UsageError
from mimo_edge.machine import usable_cores
from mimo_edge.units import format_bytes

EXPERTS = (16, 32, 64, 128)
SHARES = ((1, 8), (1, 4), (1, 2), (3, 4), (1, 1))
DRAFTS = (0, 1, 2, 3)
LAYERS, VOCAB, DEPTH, WARMUP, CONTEXT = 4, 4096, 128, 64, 2048


@dataclass(frozen=True)
class Setup:
    """What is measured: `tokens` are decoded `repetitions` times after DEPTH others."""

    folder: Path
    tokens: int
    repetitions: int
    minutes: float
    threads: int
    tiny: bool

    def config(self, experts: int, mtp: int) -> MimoConfig:
        """The geometry of a model."""
        if self.tiny:
            return tiny_config("MiMo-V2-Flash", mtp)
        return scaled_config("MiMo-V2-Flash", LAYERS, experts, VOCAB, mtp)


class Model:
    """A random model that is made when first needed."""

    def __init__(self, setup: Setup, experts: int, mtp: int = 0) -> None:
        self._setup, self._experts, self._mtp = setup, experts, mtp
        self.path = setup.folder / f"{experts}-experts-{mtp}-mtp.gguf"

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        if not self.path.exists():
            for other in self._setup.folder.glob("*-mtp.gguf"):
                other.unlink()  # one at a time
            write_model(self.path, self._setup.config(self._experts, self._mtp))
        return self.path.stat().st_size

    def ram_for(self, parts: int) -> int:
        """A cap that leaves room for one of `parts` parts of the experts."""
        _ = self.nbytes
        with Bundle.open(self.path) as bundle:
            lines = plan(bundle.config, bundle.tensors, CONTEXT).lines
        held = sum(line.nbytes for line in lines if line.name != "experts")
        return held + sum(line.nbytes for line in lines if line.name == "experts") // parts

    def decode(self, ram: int | None, draft: int = 0) -> Row:
        """Decoding with a cap on memory, in a process of its own. Raises BackendError when it ends
        for another reason than the cap."""
        setup, _ = self._setup, self.nbytes
        settings = Settings(
            str(self.path), context=CONTEXT, repetitions=setup.repetitions, warmup=WARMUP
        )
        case = Case("decode", setup.tokens, DEPTH, draft, ram, setup.threads)
        (result,) = Bench(settings).run([case])
        error = result.ours.error
        if error is not None and error["type"] != DeviceError.__name__:
            raise BackendError(f"{case.label} of {self.path}: {error['message']}")
        return result.ours


def _speed(row: Row) -> list[str]:
    """Tokens per second, hits and bytes read per token of a row, or why there are none."""
    if row.tps is None:
        return ["refused", "-", "-"]
    hits, read = row.hit_rate, row.read_bytes_per_token
    return [
        f"{row.tps.median:.2f}",
        "-" if hits is None else f"{hits:.1%}",
        "-" if read is None else f"{read / 1e6:.1f}",
    ]


def _memory(row: Row) -> str:
    """The kernel's peak, or that of the process where no cgroup can be made."""
    peak = row.measured_bytes
    return "-" if peak is None or row.error is not None else format_bytes(peak)


def experts_table(setup: Setup, rows: Rows) -> str:
    """Decoding by number of experts."""
    deadline = Deadline(setup.minutes)
    table = [
        ["experts", "model", "tok/s, all in memory", "room for half", "hits", "MB read per token"]
    ]
    for experts in EXPERTS:

        def row(experts: int = experts) -> list[str]:
            model = Model(setup, experts)
            whole = model.decode(None)
            half = model.decode(model.ram_for(2))
            size = format_bytes(model.nbytes)
            return [str(experts), size, _speed(whole)[0], *_speed(half)]

        table.append(rows.get(f"{experts} experts", deadline, row))
    return _finished(table, deadline)


def caps_table(setup: Setup, rows: Rows) -> str:
    """Decoding by the cap on memory."""
    deadline = Deadline(setup.minutes)
    table = [["cap", "of the model", "tok/s", "hits", "MB read per token", "of the bound", "peak"]]
    for part, of in SHARES:

        def row(part: int = part, of: int = of) -> list[str]:
            model = Model(setup, max(EXPERTS))
            ram = model.nbytes * part // of
            found = model.decode(ram)
            bound = "-"
            if found.tps is not None and found.bound_tps is not None:
                bound = f"{found.tps.median / found.bound_tps:.0%}"
            return [format_bytes(ram), f"{part}/{of}", *_speed(found), bound, _memory(found)]

        table.append(rows.get(f"cap {part}/{of}", deadline, row))
    return _finished(table, deadline)


def drafts_table(setup: Setup, rows: Rows) -> str:
    """A pass of the model by the drafts it verifies."""
    deadline = Deadline(setup.minutes)
    table = [
        ["drafts", "ms per pass, all in memory", "room for a quarter", "hits", "MB read per token"]
    ]
    for draft in DRAFTS:

        def row(draft: int = draft) -> list[str]:
            model = Model(setup, max(EXPERTS) // 2, 3)
            whole, part = (model.decode(ram, draft) for ram in (None, model.ram_for(4)))
            passes = [
                "refused" if found.verify_ms is None else f"{found.verify_ms:.1f}"
                for found in (whole, part)
            ]
            return [str(draft), *passes, *_speed(part)[1:]]

        table.append(rows.get(f"{draft} drafts", deadline, row))
    return _finished(table, deadline)


def _finished(table: Sequence[list[str]], deadline: Deadline) -> str:
    return markdown([row for row in table if row]) + deadline.note()


PARTS: dict[str, tuple[str, Callable[[Setup, Rows], str]]] = {
    "experts": ("Number of experts", experts_table),
    "caps": ("Cap on memory", caps_table),
    "drafts": ("Width of a verify", drafts_table),
}


def measure(setup: Setup, parts: Sequence[str]) -> str:
    """The tables of `parts`. Raises MimoEdgeError subclasses."""
    setup.folder.mkdir(parents=True, exist_ok=True)
    name = f"rows-{setup.tokens}x{setup.repetitions}-{setup.threads}" + "-tiny" * setup.tiny
    rows = Rows(setup.folder / f"{name}.json")
    texts = [f"{PARTS[part][0]}:\n\n{PARTS[part][1](setup, rows)}" for part in parts]
    for model in setup.folder.glob("*-mtp.gguf"):
        model.unlink()
    return "\n".join(texts)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="for models and rows")
    parser.add_argument("--part", choices=PARTS, action="append", help="one table; all of them")
    parser.add_argument("--tokens", type=int, default=32, help="decoded per measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--tiny", action="store_true", help="a model of 1 MB, to try the tool")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    add_minutes(parser, 6)
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}", "use 1 or more")
    setup = Setup(args.folder, args.tokens, args.repetitions, args.minutes, args.threads, args.tiny)
    text = measure(setup, [part for part in PARTS if part in (args.part or PARTS)])
    if args.write:
        write_section("growth", text, "How cost grows")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
