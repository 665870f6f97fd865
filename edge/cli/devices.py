"""`mimo-edge devices`: the device profiles there are, and what is in them."""

from __future__ import annotations

from typing import Annotated

import typer

from mimo_edge.cli.output import Output
from mimo_edge.units import format_bytes


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Device profiles: list them, show one with its sources, compare two.",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.command("list")(list_profiles)
    group.command("show")(show)
    group.command("diff")(diff)
    app.add_typer(group, name="devices")


def list_profiles(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the profiles that ship with us, and this machine (auto)."""
    from mimo_edge.devices.profile import AUTO, load_profile, profile_names

    out = Output(json=json)
    found = [load_profile(name) for name in (AUTO, *profile_names())]
    out.result({"profiles": [p.to_dict() for p in found]})
    out.table(
        [
            [
                p.name,
                format_bytes(p.ram_bytes),
                format_bytes(p.process_bytes),
                f"{p.memory_bytes_per_s / 1e9:.0f} GB/s",
                f"{p.reads[-1].bytes_per_s / 1e6:,.0f} MB/s",
                p.recipe,
                p.title,
            ]
            for p in found
        ],
        ["profile", "RAM", "process", "memory", "flash", "recipe", ""],
    )


def show(
    profile: Annotated[str, typer.Argument(help="Name of a profile, a .toml file, or auto.")],
    toml: Annotated[
        bool, typer.Option("--toml", help="As a file, complete in itself, to start your own from.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every figure of a profile, how well it is known, and its source."""
    from mimo_edge.devices.profile import load_profile

    out = Output(json=json)
    found = load_profile(profile)
    out.result(found.to_dict())
    if toml:
        out.text(found.to_toml(), end="")
        return
    out.text(f"{found.name}: {found.title}")
    if found.chain:
        out.text(f"inherits {' -> '.join(found.chain)}")
    for key, value, source in found.figures():
        out.text(f"\n{key} = {value}\n  {source.evidence}: {source.text}")


def diff(
    first: Annotated[str, typer.Argument(help="Name of a profile, a .toml file, or auto.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the figures in which two profiles differ."""
    from mimo_edge.devices.profile import load_profile

    out = Output(json=json)
    a, b = load_profile(first), load_profile(second)
    shown = zip(a.figures(), b.figures(), strict=True)
    rows = [(key, x, y) for (key, x, _), (_, y, _) in shown if x != y]
    out.result({"first": a.name, "second": b.name, "differ": {k: [x, y] for k, x, y in rows}})
    for key, x, y in rows:
        out.text(f"{key}\n  {a.name}: {x}\n  {b.name}: {y}")
    if not rows:
        out.text(f"{a.name} and {b.name} have the same figures")
