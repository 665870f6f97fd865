"""`mimo-edge export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError
from mimo_edge.units import format_bytes

if TYPE_CHECKING:
    from mimo_edge.bundle import Bundle


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, Hub id (owner/name), mimo-nano; with --format both a bundle."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Bundle folder to make.")],
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Device profile it is made for (mimo-edge devices list): phones, routers and Pi 5 "
            "take recipe q4_0, cars and workstations q4_k. MXFP4 experts of a V2.6 checkpoint stay "
            "as they are.",
        ),
    ] = "phone",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Format of most of the bytes, instead of the profile's: q8_0, q6_k, q5_k, q4_k, "
            "q4_0, iq4_nl, iq4_xs, mxfp4, q3_k, iq3_xxs, q2_k, iq2_xxs, f16, bf16 or f32.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=FORMAT", help="Format of tensors by name; may be given several times."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="How resident tensors are written: gguf, onnx, or both. Routed experts are GGUF.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to measure importance and expert heat on, or an imatrix.gguf.",
        ),
    ] = None,
    permute_by_heat: Annotated[
        bool, typer.Option("--permute-by-heat", help="Store the experts of a layer hottest first.")
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="W",
            help="Tokens a sliding layer sees, the query included; default: sliding_window_size "
            "of the checkpoint plus one.",
        ),
    ] = None,
    ignore_config_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Vouch for a config.json key we do not know: it changes nothing. May be given "
            "several times.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle when all is done.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Pieces quantised at a time; default: up to 4."),
    ] = None,
    npu: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Compile the dense part for Qualcomm NPUs too (extra npu): v68, v69, v73, v75, "
            "v79, v81, or chips such as sa8295, sa8255, sm8750.",
        ),
    ] = None,
    npu_precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="int4 (with u16 activations, calibrated on the text of --calibrate) or fp16.",
        ),
    ] = "int4",
    npu_context: Annotated[
        int, typer.Option(metavar="N", help="Longest context of the NPU graphs.")
    ] = 4096,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every role and its error.")
    ] = False,
) -> None:
    """Quantise a checkpoint into a bundle. Run it again to continue after an interruption."""
    from mimo_edge.cli.inspect import print_roles
    from mimo_edge.export.pipeline import export_bundle
    from mimo_edge.inventory import inventory

    output = Output(json=json, verbose=verbose)
    notes = _Notes(output)
    logging.getLogger("mimo_edge").addHandler(notes)
    try:
        with export_bundle(
            checkpoint,
            out,
            profile,
            tuple(formats or ("gguf",)),
            recipe,
            calibrate,
            output.progress,
            overrides=[_override(argument) for argument in override or ()],
            window=window,
            ignore_config_keys=ignore_config_key or (),
            overwrite=overwrite,
            permute_by_heat=permute_by_heat,
            threads=threads,
            npu=npu,
            npu_precision=npu_precision,
            npu_context=npu_context,
        ) as bundle:
            sizes = _sizes(bundle)
    except KeyboardInterrupt:
        output.note("finished pieces are kept: the same command goes on from here")
        raise
    finally:
        logging.getLogger("mimo_edge").removeHandler(notes)
    made = inventory(out)
    output.text(f"{made.name} -> {out}: {format_bytes(sum(sizes.values()))}")
    output.table([[f"  {name}", format_bytes(size)] for name, size in sizes.items()])
    for reason, count in made.skipped.items():
        output.text(f"  left out: {count} tensors: {reason}")
    if verbose:
        print_roles(output, made)
    output.result({"path": str(out), "warnings": notes.messages, **made.to_dict()})


def _sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of each file; the many of the ONNX form are one line."""
    sizes: dict[str, int] = {}
    for path in bundle.files:
        name = path.relative_to(bundle.path).parts[0]
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def _override(argument: str) -> tuple[str, str]:
    pattern, found, name = argument.rpartition("=")
    if not found or not pattern or not name:
        raise UsageError(f"--override {argument!r}", "write GLOB=FORMAT, as in '*.attn_v.*=Q8_0'")
    return pattern, name


class _Notes(logging.Handler):
    """Warnings of the library as remarks on stderr."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.messages.append(message)
        self._output.note(f"warning: {message}")
