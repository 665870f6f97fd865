"""An export that starts from a bundle: its files stay as they are, the ONNX form comes beside them.

Weights are read back from the bundle's GGUF files, so what is stored in few bits there loses once
more where the ONNX form has another format; from the checkpoint nothing is lost twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mimo_edge
from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import ExportError, UsageError
from mimo_edge.export.job import (
    _PIECE_BYTES,
    PART,
    Export,
    Layout,
    Progress,
    onnx_pieces,
    stored_format,
)
from mimo_edge.export.mapping import TensorMapping
from mimo_edge.manifest import Manifest
from mimo_edge.onnx_io import FOLDER
from mimo_edge.quant.base import get_format
from mimo_edge.quant.recipe import Recipe


@dataclass(frozen=True)
class BundleSource:
    """A bundle as the source of an export."""

    path: Path
    files: tuple[str, ...]
    index_sha256: str
    config: MimoConfig


def prepare_from_bundle(
    bundle: Bundle, target: Path, staging: Path, progress: Progress | None, threads: int
) -> Export:
    """Decide everything from names and shapes. Raises UsageError when the bundle cannot be read
    back: a bare GGUF file, or one whose resident tensors are in ONNX form alone."""
    from mimo_edge.export.onnx.stage import ModelRows, plan_job

    base = bundle.manifest
    if base is None:
        raise UsageError(f"{bundle.path} is a bare GGUF file", "give a bundle or a checkpoint")
    if base.onnx is not None and not base.onnx.gguf:
        raise UsageError(
            f"{bundle.path} holds its resident tensors in ONNX form alone",
            "export the checkpoint again",
        )
    formats = {name: get_format(info.type_name) for name, info in bundle.tensors.items()}
    job = plan_job(
        bundle.config,
        lambda name: stored_format(formats, name),
        ModelRows(bundle.weights(), bundle.config, {}),
        _PIECE_BYTES,
    )
    kept = [name for name in base.files if not name.startswith(f"{FOLDER}/")]
    layouts: list[Layout] = [*job.files.values()]
    return Export(
        source=BundleSource(bundle.path, tuple(kept), base.source_index_sha256, bundle.config),
        name=base.source_name,
        target=target,
        staging=staging,
        profile=base.profile,
        recipe=Recipe.from_dict(base.recipe),
        mapping=TensorMapping([], {}),
        formats={},
        layouts=layouts,
        file_names=[*job.files],
        file_of={},
        pieces=list(onnx_pieces(job)),
        side_files={**job.side_files},
        imatrix=None,
        permutation={},
        progress=progress,
        threads=threads,
        onnx=job,
        base=base,
        linked={name: (bundle.path / name).resolve() for name in kept},
    )


def bytes_to_copy(export: Export) -> int:
    """Bytes of the bundle's files that cannot be linked, because they are on another disk."""
    device = export.staging.stat().st_dev
    return sum(s.st_size for p in export.linked.values() if (s := p.stat()).st_dev != device)


def link_files(export: Export) -> None:
    """The bundle's files: the same ones under another name where that can be, else copies that
    are compared with the manifest."""
    if export.base is None:
        return
    for name, path in export.linked.items():
        entry = export.base.files[name]
        made = export.folder / (name + PART)
        made.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, made)
        except OSError:  # another disk, or a file system without links
            _copy(path, made, entry.sha256)
        export.files[name] = entry


def _copy(path: Path, made: Path, sha256: str) -> None:
    shutil.copyfile(path, made)
    with made.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != sha256:
        raise ExportError(f"{path} differs from its manifest", "mimo-edge verify tells where")


def extended_manifest(export: Export) -> Manifest:
    """The bundle's own manifest, with the ONNX form."""
    assert export.base is not None
    assert export.onnx is not None
    names = (*export.linked, *export.file_names, *export.side_files, *export.compiled)
    return replace(
        export.base,
        tool_version=mimo_edge.__version__,
        files={name: export.files[name] for name in names},
        onnx=export.onnx.manifest_entry(gguf=True),
    )
