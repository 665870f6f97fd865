"""What an export knows about use and importance: measured now, or read from files.

A text is run through the checkpoint once; the result is kept in the staging folder, so that an
interrupted export does not measure again, and always read back from there: files hold single
precision, and a resumed export must see the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

import mimo_edge
from mimo_edge.errors import UsageError
from mimo_edge.export.calibrate import HEAT_NAME, IMATRIX_NAME, calibrate
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.gguf_file import MAGIC
from mimo_edge.heat import Heat
from mimo_edge.manifest import MANIFEST_NAME, Manifest
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
_READ_BYTES = 1 << 20


class Measured(Protocol):
    """A calibration held in memory: see export/calibrate."""

    @property
    def imatrix(self) -> Imatrix: ...

    @property
    def heat(self) -> Heat: ...


def measure(
    source: Checkpoint,
    calibration: Measured | Imatrix | str | Path | None,
    staging: Path,
    progress: Progress | None,
) -> tuple[Imatrix | None, Heat | None]:
    """(importance, heat) of a calibration given in any form; a text is measured here.

    Raises UsageError for a file that cannot serve, BundleError for a damaged one.
    """
    if calibration is None:
        return None, None
    if isinstance(calibration, Imatrix):
        return calibration, None
    if not isinstance(calibration, (str, Path)):
        return calibration.imatrix, calibration.heat
    path = Path(calibration)
    head, digest = _fingerprint(path)
    if head == MAGIC:
        # Checked against this model; its counts are heat without router mass.
        read = calibrate(CheckpointWeights(source), None, path)
        return read.imatrix, _heat_beside(path.parent) or read.heat
    job = f"{digest} {source.index_sha256} {source.config} {mimo_edge.__version__}"
    cache = staging / f"calibration-{hashlib.sha256(job.encode()).hexdigest()[:16]}"
    if not ((cache / IMATRIX_NAME).is_file() and (cache / HEAT_NAME).is_file()):
        total = sum((source.path / name).stat().st_size for name in source.files)

        def report(done: int, blocks: int) -> None:
            if progress is not None:  # one pass over the checkpoint: its bytes, about
                progress("calibrate", total * done // max(1, blocks), total)

        weights, tokenizer = CheckpointWeights(source), _tokenizer(source, path)
        calibrate(weights, tokenizer, path, progress=report).save(cache)
    return Imatrix.read(cache / IMATRIX_NAME), Heat.read(cache / HEAT_NAME)


def _heat_beside(folder: Path) -> Heat | None:
    """Heat in the source's numbers of experts, as an imatrix.gguf has them: the heat of a bundle
    whose experts were reordered counts in places."""
    if not (folder / HEAT_NAME).is_file():
        return None
    heat = Heat.read(folder / HEAT_NAME)
    if not (folder / MANIFEST_NAME).is_file():
        return heat
    places = {
        layer: np.argsort(order).tolist()
        for layer, order in Manifest.read(folder).permutation.items()
    }
    return heat.permuted(places)


def _tokenizer(source: Checkpoint, text: Path) -> Tokenizer:
    files = source.tokenizer_files
    if "tokenizer.json" in files:
        return Tokenizer.from_file(files["tokenizer.json"])
    if "tokenizer.model" in files:
        return Tokenizer.from_sentencepiece(files["tokenizer.model"])
    raise UsageError(f"{source.name} has no tokenizer to read {text} with")


def _fingerprint(path: Path) -> tuple[bytes, str]:
    """(first bytes, sha256) of a file."""
    digest, head = hashlib.sha256(), b""
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                head = head or data[: len(MAGIC)]
                digest.update(data)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check --calibrate") from error
    return head, digest.hexdigest()
