"""Options of the commands that open a model: one wording for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError

Draft = Annotated[str, typer.Option(help="Tokens drafted per step: 0, 1, 2, 3 or auto.")]
Ram = Annotated[str | None, typer.Option(help='Bound on memory, as "900MiB".')]
Profile = Annotated[str | None, typer.Option(help="Device profile.")]
BackendName = Annotated[
    str, typer.Option(help="ggml, onnx, reference, or auto: ggml for bundles and GGUF files.")
]
Ep = Annotated[
    str,
    typer.Option(
        help="Execution provider of the onnx backend: cpu, auto, qnn, qnn:NPU, or the name of the "
        "one in --ep-library."
    ),
]
EpLibrary = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Plug-in library that holds the provider.")
]
EpOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Option of the provider, over the profile's; may be given several times.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the computation.")]
KvType = Annotated[
    str | None,
    typer.Option(
        help="KV cache of the ggml backend: f16 (default; f32 where that is small), q8_0 or f32."
    ),
]
Governor = Annotated[
    bool | None,
    typer.Option(
        "--governor/--no-governor",
        help="Use less when hot, on a low battery or short of memory; on with a profile.",
    ),
]
Pin = Annotated[
    int, typer.Option(help="Hottest experts of every layer that always stay in memory.")
]
Snapshots = Annotated[
    str,
    typer.Option(
        help="Folder where processed system texts and tools are kept; auto is the user's cache "
        "folder, off keeps none."
    ),
]
SnapshotBytes = Annotated[str, typer.Option(help="Most bytes kept there.")]
IdleBytes = Annotated[
    str | None,
    typer.Option(
        help="Memory for conversations that wait; beyond it they go to the snapshot folder "
        "(what the memory plan leaves; without --ram any amount)."
    ),
]
SNAPSHOTS, SNAPSHOT_BYTES = "auto", "512MiB"


def snapshot_folder(snapshots: str, out: Output) -> Path | None:
    """The folder `--snapshots` means; None when nothing is kept. The user's cache folder is left
    out when it cannot be written, a folder that was named is not."""
    if snapshots == "off":
        return None
    if snapshots != "auto":
        return Path(snapshots)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "mimo-edge" / "snapshots"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # no home
        out.note(f"processed prompts are not kept: {error}")
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        out.note(f"processed prompts are not kept: {folder} cannot be written")
        return None
    return folder


def provider(ep: str, library: Path | None, options: list[str] | None) -> dict[str, Any]:
    """What `Runtime.open` is told about execution providers. Raises UsageError."""
    pairs = {}
    for text in options or ():
        key, found, value = text.partition("=")
        if not found or not key:
            raise UsageError(f"--ep-option {text!r}", "write KEY=VALUE")
        pairs[key] = value
    return {"ep": ep, "ep_library": None if library is None else str(library), "ep_options": pairs}


def kept(
    snapshots: str, snapshot_bytes: str, idle_bytes: str | None, out: Output
) -> dict[str, Any]:
    """What `Runtime.open` is told about snapshots and idle conversations."""
    folder = snapshot_folder(snapshots, out)
    idle = 0 if idle_bytes == "0" else idle_bytes
    if folder is None:
        return {"idle_bytes": idle}
    return {"snapshots": folder, "snapshot_bytes": snapshot_bytes, "idle_bytes": idle}
