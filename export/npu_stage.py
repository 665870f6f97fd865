"""The NPU part of an export: a stage that compiles the dense graphs for every target.

Every component that was compiled is kept in the staging folder with a note of what it became, so an
export that was interrupted compiles the others only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, ProviderError, TokenizerError, UsageError
from mimo_edge.export.calibrate import MIN_TOKENS, Encoder
from mimo_edge.manifest import FileEntry
from mimo_edge.npu_io import (
    INDEX_NAME,
    NORMS_NAME,
    NpuComponent,
    NpuVariant,
    buckets,
    read_index,
    write_index,
)
from mimo_edge.onnx_io import FOLDER, PACKAGE_MANIFEST
from mimo_edge.runtimes.base import TokenIds, Weights
from mimo_edge.runtimes.onnx.qnn_targets import Target, targets

if TYPE_CHECKING:
    from mimo_edge.export.job import Export
    from mimo_edge.export.onnx.activations import Activations
    from mimo_edge.export.onnx.npu_compile import NpuPlan

PRECISIONS = ("int4", "fp16")
DEFAULT_CONTEXT = 4096
# Least cache length of global layers: shorter ones would be more graphs for little.
_LEAST_ROWS = 1024
_LAYERS_PER_SHARD = 8
_PART = ".partial"  # see job.PART


@dataclass(frozen=True)
class NpuRequest:
    """What was asked for: targets ("v73", "sa8255"), precision, the longest context, and the text
    to calibrate on."""

    targets: tuple[Target, ...]
    precision: str = "int4"
    context: int = DEFAULT_CONTEXT
    text: str | None = None

    @classmethod
    def of(
        cls, names: str | Sequence[str], precision: str, context: int, text: str | None
    ) -> NpuRequest:
        """Raises UsageError on unknown names, ProviderError when nothing can be compiled here."""
        from mimo_edge.runtimes.onnx import qnn

        if precision not in PRECISIONS:
            raise UsageError(f"NPU precision {precision!r}", f"use {' or '.join(PRECISIONS)}")
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise UsageError(f"NPU context = {context!r}", "use 1 or more")
        found = targets(names if isinstance(names, str) else ",".join(names))
        if reason := qnn.why_unavailable():
            raise ProviderError(f"nothing can be compiled for NPUs here: {reason}")
        return cls(found, precision, context, text)

    def identity(self) -> dict[str, Any]:
        """JSON-ready: everything that decides what is compiled."""
        text = None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()
        return {
            "targets": [list(target) for target in self.targets],
            "precision": self.precision,
            "context": self.context,
            "text": text,
        }


@dataclass
class NpuJob:
    """A request and the model it is for; `files` are what it made, by name in the bundle."""

    request: NpuRequest
    weights: Weights
    token_ids: TokenIds
    files: list[str] = field(default_factory=list)
    activations: Activations | None = None  # measured once, for all targets


def plan_npu(request: NpuRequest, weights: Weights, tokenizer: Encoder | None) -> NpuJob:
    """Turn the calibration text into tokens. Raises UsageError when there is none to measure
    activations on."""
    if request.text is None:
        if request.precision == "int4":
            raise UsageError(
                "int4 graphs for NPUs need the ranges of their activations",
                "add --calibrate TEXT, or choose --npu-precision fp16",
            )
        # Graphs are still checked by running them: on whatever tokens there are.
        ids = np.arange(4 * MIN_TOKENS, dtype=np.int32) % weights.config.vocab_size
        return NpuJob(request, weights, ids)
    if tokenizer is None:
        raise TokenizerError("a calibration text cannot be read without a tokenizer")
    ids = np.asarray(tokenizer.encode(request.text, allow_special=True), np.int32)
    if len(ids) < MIN_TOKENS:
        raise UsageError(
            f"a text of {len(ids)} tokens is too short to calibrate on",
            f"give at least {MIN_TOKENS}, better several thousand",
        )
    return NpuJob(request, weights, ids)


def compile_npu(export: Export) -> None:
    """The stage: compile what is not compiled yet, then put everything into the bundle."""
    job = export.npu
    if job is None:
        return
    assert export.onnx is not None
    staging = npu_staging(export.staging)
    config, request = job.weights.config, job.request
    plan = _plan(config, request)
    variants = {
        variant.name: variant
        for variant in (_compile(export, job, plan, target, staging) for target in request.targets)
    }
    _install(export, job, staging, variants)


def npu_staging(staging: Path) -> Path:
    """Where compiled graphs wait for the bundle."""
    return staging / "npu"


def _plan(config: MimoConfig, request: NpuRequest) -> NpuPlan:
    from mimo_edge.export.onnx.npu_compile import NpuPlan
    from mimo_edge.export.onnx.npu_graphs import Precision

    context = min(request.context, config.max_position_embeddings)
    return NpuPlan(
        config,
        request.targets,
        cast("Precision", request.precision),
        buckets(context, _LEAST_ROWS),
        _LAYERS_PER_SHARD,
    )


def _compile(
    export: Export, job: NpuJob, plan: NpuPlan, target: Target, staging: Path
) -> NpuVariant:
    """Compile for one target. Raises ProviderError when it takes nothing."""
    from mimo_edge.export.onnx.activations import measure_activations
    from mimo_edge.export.onnx.npu_compile import Compiler

    assert export.onnx is not None
    parts = plan.components()
    made: list[NpuComponent] = []
    notes = staging / "done" / target.variant
    notes.mkdir(parents=True, exist_ok=True)
    compiler: Compiler | None = None
    try:
        for number, part in enumerate(parts):
            export.report(f"compile for {target.name}", number, len(parts))
            note = notes / f"{part.name}.json"
            found = _read_note(note)
            if found is None:
                if compiler is None:
                    if job.activations is None:
                        job.activations = measure_activations(
                            job.weights,
                            plan.measured(),
                            export.onnx.reader,
                            job.token_ids,
                            staging / "measure",
                            lambda done, total: export.report("measure activations", done, total),
                        )
                    compiler = Compiler(
                        plan,
                        target,
                        export.onnx.reader,
                        job.activations,
                        staging / "made",
                        staging / "work",
                    )
                found = tuple(compiler.component(part))
                _write_note(note, target, plan, found)
            made += found
    finally:
        if compiler is not None:
            compiler.close()
    export.report(f"compile for {target.name}", len(parts), len(parts))
    if all(part.precision == "cpu" for part in made):
        raise ProviderError(
            f"{target.name} takes no part of this model: {made[0].reason}",
            "choose another NPU, or leave --npu out",
        )
    return NpuVariant(target.name, target.arch, target.soc_model, plan.buckets, tuple(made))


def _install(export: Export, job: NpuJob, staging: Path, variants: dict[str, NpuVariant]) -> None:
    """Move what was compiled into the bundle, with the index, and list it for the manifest."""
    folder = export.folder / FOLDER
    for variant in variants.values():
        for component in variant.components:
            place = Path(component.name) / variant.name
            names = sorted({name for files in component.files.values() for name in files})
            (folder / place).mkdir(parents=True, exist_ok=True)
            for name in names:
                _list(export, job, staging / "made" / place / name, f"{place}/{name}")
    _write(export, job, INDEX_NAME, write_index(variants))
    _write(export, job, NORMS_NAME, head_norms(job.weights))
    manifest = folder / f"{PACKAGE_MANIFEST}{_PART}"
    manifest.write_bytes(with_npu_variants(manifest.read_bytes(), variants))
    export.files[f"{FOLDER}/{PACKAGE_MANIFEST}"] = _entry(manifest)
    shutil.rmtree(staging / "work", ignore_errors=True)
    shutil.rmtree(staging / "measure", ignore_errors=True)


def with_npu_variants(manifest: bytes, variants: dict[str, NpuVariant]) -> bytes:
    """ONNX Runtime's package manifest with the compiled variants; the graph it names is that of the
    fewest tokens and rows."""
    raw = json.loads(manifest)
    for variant in variants.values():
        for component in variant.components:
            if component.precision == "cpu":
                continue
            known = raw["components"].setdefault(component.name, {"variants": {}})["variants"]
            known[variant.name] = {
                "variant_directory": f"{component.name}/{variant.name}",
                "ep": "QNNExecutionProvider",
                "executor_info": {"ort": {"model_file": component.files[min(component.files)][0]}},
            }
    return (json.dumps(raw, indent=1) + "\n").encode()


def head_norms(weights: Weights) -> bytes:
    """The final norms f32 [1 + MTP blocks, M], the model's first."""
    config = weights.config
    names = ["output_norm.weight"]
    blocks = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
    names += [f"blk.{index}.layer_output_norm.weight" for index in blocks]
    rows = np.stack([weights.tensor(name) for name in names])
    return rows.astype("<f4").tobytes()


def _list(export: Export, job: NpuJob, source: Path, name: str) -> None:
    """A compiled file of the staging folder becomes the bundle's. It stays where it was as well,
    so that a run killed from here on finds it again."""
    made = export.folder / FOLDER / f"{name}{_PART}"
    made.unlink(missing_ok=True)
    try:
        os.link(source, made)
    except OSError:  # a file system without links
        shutil.copyfile(source, made)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    export.files[f"{FOLDER}/{name}"] = _entry(made)
    job.files.append(f"{FOLDER}/{name}")


def _write(export: Export, job: NpuJob, name: str, data: bytes) -> None:
    made = export.folder / FOLDER / f"{name}{_PART}"
    with made.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    export.files[f"{FOLDER}/{name}"] = _entry(made)
    job.files.append(f"{FOLDER}/{name}")


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


# --- notes of what is done ------------------------------------------------------------------


def _read_note(path: Path) -> tuple[NpuComponent, ...] | None:
    try:
        variants = read_index(path.read_bytes(), str(path))
    except (OSError, BundleError):
        return None  # not done, or killed while it was noted
    return next(iter(variants.values())).components


def _write_note(path: Path, target: Target, plan: NpuPlan, made: tuple[NpuComponent, ...]) -> None:
    variant = NpuVariant(target.name, target.arch, target.soc_model, plan.buckets, made)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(write_index({variant.name: variant}))
    temporary.replace(path)
