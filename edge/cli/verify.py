"""`mimo-edge verify`: every byte of a bundle against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimo_edge.cli.output import Output
from mimo_edge.units import format_bytes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find damage: compare every byte of a bundle with its checksums.

    Names the smallest thing that is bad: an expert of a layer, a tensor, or a file.
    """
    from mimo_edge.bundle import Bundle

    output = Output(json=json)
    with Bundle.open(bundle) as opened:
        report = opened.verify(output.progress)
    output.text(
        f"{bundle} is whole: {report.files} files, {format_bytes(report.nbytes)}, "
        f"{report.tensors} tensors, {report.experts} experts"
    )
    output.result(
        {
            "path": str(bundle),
            "ok": True,
            "files": report.files,
            "bytes": report.nbytes,
            "tensors": report.tensors,
            "experts": report.experts,
        }
    )
