"""`mimo-edge probe`: measure this machine and write its profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mimo_edge.atomic_file import writing
from mimo_edge.cli.interrupts import ended_by_signals
from mimo_edge.cli.output import Output
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.units import format_bytes, parse_bytes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("probe")(probe)


def probe(
    folder: Annotated[
        Path,
        typer.Option(
            "--dir", help="Where bundles will lie: a file is written there, read and removed."
        ),
    ] = Path(),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Profile to write; by default the one that auto stands for."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Bundle or .gguf file whose expert size reads are measured at."),
    ] = None,
    file_size: Annotated[str, typer.Option(help="Size of the file.")] = "256MiB",
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with; all cores by default.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            help="About how long to measure, besides what writing and making the matrices takes."
        ),
    ] = 20.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine in under a minute and write its device profile.

    Memory rate and kernel cost per format through the real kernels; direct and buffered reads with
    1 to 8 lanes; ISA, sensors, free memory and cgroup limits. Run it while nothing else works.
    """
    from mimo_edge.devices.probe import BUSY_CORES, RECORD_BYTES
    from mimo_edge.devices.probe import probe as measure
    from mimo_edge.devices.this_machine import measured_path

    out = Output(json=json)
    path = measured_path() if output is None else output
    _check(path, make=output is None)
    record = RECORD_BYTES if model is None else _record_bytes(model)
    with ended_by_signals():
        found = measure(
            folder,
            threads=threads,
            record_bytes=record,
            file_bytes=parse_bytes(file_size),
            seconds=seconds,
            progress=lambda stage, done, total: out.progress(stage, done, total, unit="count"),
        )
    try:
        with writing(path, mode=0o644) as file:
            file.write(found.profile.to_toml().encode())
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error
    out.result({**found.to_dict(), "path": str(path)})
    out.text(found.profile.title)
    best = max(found.memory.values()) / 1e9
    out.text(f"memory      {best:.1f} GB/s by {found.threads} threads")
    limits = [f"{format_bytes(found.available_bytes)} free"] if found.available_bytes else []
    if found.cgroup_bytes is not None:
        limits.append(f"{format_bytes(found.cgroup_bytes)} left in the cgroup")
    out.text(f"for a process {format_bytes(found.profile.process_bytes)} ({', '.join(limits)})")
    out.text(f"caches      {format_bytes(found.profile.cache_bytes)}")
    out.text(f"ISA         {', '.join(found.profile.isa) or 'none known'}")
    lib = found.libggml
    variant = f", variant {lib['variant']}" if lib["variant"] else ""
    compiled = ", ".join(lib["compiled_for"]) or "no extensions"
    out.text(f"libggml     {lib['version']}{variant}, compiled for {compiled}")
    if found.hwcap is not None:
        out.text(f"HWCAP       {found.hwcap[0]:#x}, HWCAP2 {found.hwcap[1]:#x}")
    sensors = ", ".join(f"{name} {value:.0f} C" for name, value in found.sensors.items())
    out.text(f"sensors     {sensors or 'none'}")
    out.text("")
    if not found.direct_works:
        out.text("direct reads are refused here: buffered ones are shown")
    rows = [
        [format_bytes(block), lanes, way, f"{rate / 1e6:,.0f}"]
        for way, rates in (("direct", found.direct), ("buffered", found.buffered))
        for (block, lanes), rate in sorted(rates.items())
    ]
    out.table(rows, ["block", "lanes", "reads", "MB/s"])
    left = found.profile.beside
    out.text(
        f"\nbeside computing {left.reads:.0%} of it, and {left.kernels:.0%} of computing beside "
        "reads\n"
    )
    out.table(
        [
            [
                name.lower(),
                *(f"{rate / 1e9:.1f}" for rate in (k.row, k.rows4, k.batch, k.stored)),
                " / ".join(f"{rate / 1e9:.1f}" for rate in (*k.cold, k.cold_stored) if k.cold),
            ]
            for name, k in found.profile.kernels.items()
        ],
        ["GMAC/s", "1 row", "4 rows", "32 rows", "stored", "from memory: 1 to 4 rows / stored"],
    )
    cost = found.profile.engine
    out.text(
        f"\nengine      {cost.step * 1e3:.2f} ms a step, {cost.layer * 1e6:.0f} us a layer "
        f"({cost.layer4 * 1e6:.0f} verifying), {cost.streamed * 1e6:.0f} us a streamed one "
        f"({cost.streamed4 * 1e6:.0f}), {cost.arrival * 1e6:.0f} us an expert read, "
        f"{cost.draft * 1e3:.2f} ms a draft"
    )
    out.text("")
    if found.others_cores is not None and found.others_cores > BUSY_CORES:
        out.note(
            f"warning: other processes used {found.others_cores:.1f} cores meanwhile: the figures "
            "are too low, measure again when the machine is idle"
        )
    out.text(f"{path} after {found.seconds:.0f} s")


def _check(path: Path, make: bool) -> None:
    """Whether the profile can be written there, before a minute is spent. Raises UsageError,
    DeviceError."""
    if path.suffix != ".toml":
        raise UsageError(f"-o {path}", "name a file that ends in .toml, as --profile asks for")
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise _unwritable(path, "it is a folder")
        if not path.parent.is_dir():
            raise _unwritable(path, f"there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise _unwritable(path, f"the folder {path.parent} is not yours to write to")
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error


def _unwritable(path: Path, why: str) -> DeviceError:
    return DeviceError(f"cannot write {path}: {why}", "name another with -o")


def _record_bytes(model: str) -> int:
    """The largest part of an expert that is one read; of a dense model the usual size."""
    from mimo_edge.bundle import Bundle
    from mimo_edge.devices.probe import RECORD_BYTES
    from mimo_edge.experts.reader import part_bytes

    with Bundle.open(model) as bundle:
        experts = max(1, bundle.config.n_routed_experts)
        tensors = bundle.tensors.items()
        sizes = [part_bytes(t.nbytes // experts) for name, t in tensors if "_exps." in name]
    return max(sizes, default=RECORD_BYTES)
