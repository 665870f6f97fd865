"""The hidden folder an export works in: locked, resumed when it is the same job, else refused."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mimo_edge
from mimo_edge.errors import BundleError, ExportError
from mimo_edge.export.job import PART, Export
from mimo_edge.export.journal import NAME as JOURNAL_NAME
from mimo_edge.export.journal import Journal
from mimo_edge.export.npu_stage import npu_staging
from mimo_edge.manifest import MANIFEST_NAME, Manifest
from mimo_edge.quant.imatrix import Imatrix

_log = logging.getLogger(__name__)


def staging_of(target: Path) -> Path:
    """The folder an export to `target` works in."""
    return target.parent / f".{target.name}{PART}"


def check_target(target: Path, overwrite: bool) -> bool:
    """Refuse an output that is in the way, before any work; whether a bundle is there."""
    if target.is_symlink():
        raise ExportError(f"{target} is a symbolic link", f"export to {target.resolve()} instead")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} exists and is not a folder", "choose another name")
    if target.is_dir() and os.path.ismount(target):
        raise ExportError(f"{target} is a mount point", f"export to {target / 'model'} instead")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not (target / MANIFEST_NAME).is_file():
        raise ExportError(
            f"{target} is a folder with other content, not a bundle", "choose another name"
        )
    if occupied and not overwrite and not staging_of(target).is_dir():
        raise ExportError(f"{target} exists", "choose another name or pass --overwrite")
    return occupied


def open_staging(export: Export, overwrite: bool) -> bool:
    """Lock the staging folder and read its journal; False when there is nothing left to do."""
    target, staging = export.target, export.staging
    occupied = check_target(target, overwrite)
    staging.mkdir(parents=True, exist_ok=True)
    export.journal = Journal(staging / JOURNAL_NAME)
    job = _job(export)
    if export.journal.job is not None and export.journal.job != job:
        if not overwrite:
            raise ExportError(
                f"{staging} holds an unfinished export that differs in "
                f"{', '.join(_differences(export.journal.job, job))}",
                "pass --overwrite to start afresh, or delete that folder",
            )
        _log.warning("starting afresh: the unfinished export in %s was another one", staging)
        export.journal.close()
        (staging / JOURNAL_NAME).unlink()
        clear(export.folder)
        export.journal = Journal(staging / JOURNAL_NAME)
    if export.journal.job is None:
        clear(export.folder)
        clear(npu_staging(staging))
        if occupied and not overwrite:
            # An export that may not overwrite begins where nothing is: this folder is what a run
            # left that was killed at the very end of tidying up, or somebody's mistake.
            export.close()
            tidy(staging)
            if _is_result(export):
                return False
            raise ExportError(f"{target} exists", "choose another name or pass --overwrite")
        export.folder.mkdir()
        export.journal.begin(job)
    elif not export.folder.exists():
        # Renamed into place by a run that was killed before it could tidy up.
        export.close()
        tidy(staging)
        if not occupied:
            raise ExportError(f"the unfinished export in {staging} was damaged", "run it again")
        return False
    elif occupied and not overwrite:
        raise ExportError(f"{target} exists", "choose another name or pass --overwrite")
    for entry in export.journal.entries:
        if "drop" in entry:
            export.done.pop(entry["drop"], None)
        else:
            export.done[entry["piece"]] = entry
    for name, layout in zip(export.file_names, export.layouts, strict=True):
        path = export.folder / (name + PART)
        path.parent.mkdir(parents=True, exist_ok=True)
        if (final := export.folder / name).exists():
            final.rename(path)  # killed between the last renames
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        export.fds.append(fd)
        os.ftruncate(fd, layout.size)
    return True


def tidy(staging: Path) -> None:
    """Remove the staging folder, its journal last: while there is anything, it says what for."""
    for entry in staging.iterdir():
        if entry.name == JOURNAL_NAME:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (staging / JOURNAL_NAME).unlink(missing_ok=True)
    staging.rmdir()


def _is_result(export: Export) -> bool:
    """Whether the bundle in place is of the same source in the same recipe."""
    try:
        manifest = Manifest.read(export.target)
    except BundleError:
        return False
    return (manifest.source_index_sha256, manifest.recipe, _forms(manifest)) == (
        export.source.index_sha256,
        export.recipe.to_dict(),
        (export.gguf, export.onnx is not None),
    )


def _forms(manifest: Manifest) -> tuple[bool, bool]:
    """Whether resident tensors are there in GGUF, and in ONNX form."""
    return manifest.onnx is None or manifest.onnx.gguf, manifest.onnx is not None


def _job(export: Export) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    headers = hashlib.sha256(b"".join(layout.header for layout in export.layouts)).hexdigest()
    shards = {}
    for name in export.source.files:
        info = (export.source.path / name).stat()
        shards[name] = [info.st_size, info.st_mtime_ns]
    side = {
        name: _side_digest(content)
        for name, content in export.side_files.items()
        if not isinstance(content, Imatrix)
    }
    return {
        "journal": 1,
        "tool version": mimo_edge.__version__,
        "source index": export.source.index_sha256,
        "source files": shards,
        "config": _jsonable(export.config.to_dict()),
        "profile": export.profile,
        "recipe": export.recipe.to_dict(),
        "layout": headers,
        "side files": side,
        "importance": _imatrix_digest(export),
        "linked files": sorted(export.linked),
        "npu": None if export.npu is None else export.npu.request.identity(),
        "permutation": {str(n): list(order) for n, order in export.permutation.items()},
    }


def _jsonable(value: Any) -> Any:
    """Tuples as lists, so that a job equals itself after a round trip through JSON."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _side_digest(content: bytes | Path) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest()


def _imatrix_digest(export: Export) -> str | None:
    if export.imatrix is None:
        return None
    digest = hashlib.sha256()
    for name in export.imatrix.names:
        counts = export.imatrix.counts(name)
        digest.update(name.encode() + counts.tobytes())
        for index in range(len(counts)):
            values = export.imatrix.importance(name, index)
            digest.update(b"-" if values is None else values.tobytes())
    return digest.hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in new if old.get(key) != new[key]]


def clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def disk_error(error: OSError, export: Export) -> ExportError:
    where = f"{export.staging}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        done = sum(piece.nbytes for piece in export.pieces if piece.key in export.done)
        return ExportError(
            f"the disk is full after {done} of {export.total_bytes} bytes ({where})",
            "free some space and run the same command again: finished pieces are kept",
        )
    if export.journal is None:  # nothing was begun, so there is nothing to go on with
        return ExportError(f"cannot write to {where}", "export to another place")
    return ExportError(f"the export failed at {where}", "run it again: finished pieces are kept")
