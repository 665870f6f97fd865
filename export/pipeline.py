"""From a checkpoint to a bundle: the stages of an export, in order.

Every tensor is read, quantised and written in pieces (a group of rows, or one routed expert), so
memory stays at a few pieces whatever the size of the model. All work happens in a hidden folder
beside the output, `.NAME.partial`; a journal there says which pieces are on disk for good, so an
export that was killed goes on where it stopped and ends in the same bytes. The output folder
appears at the very end by one rename, whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import mimo_edge
from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import ExportError, UsageError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.gguf_tokenizer import read_chat_template, tokenizer_metadata
from mimo_edge.export.gguf_writer import GgufLayout, PlannedTensor, split_keys
from mimo_edge.export.journal import NAME as JOURNAL_NAME
from mimo_edge.export.journal import Journal
from mimo_edge.export.mapping import TensorMapping, TensorPlan, plan_tensors
from mimo_edge.gguf_file import split_name
from mimo_edge.gguf_meta import (
    ARCH_7B_MTP,
    Value,
    architecture,
    config_metadata,
    text,
    u32,
)
from mimo_edge.heat import Heat
from mimo_edge.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from mimo_edge.quant.base import F32, U8, Format
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.quant.metrics import ErrorMeter
from mimo_edge.quant.mxfp4 import blocks_from_checkpoint
from mimo_edge.quant.recipe import Recipe
from mimo_edge.quant.roles import Role

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""

_log = logging.getLogger(__name__)

FORMATS = ("gguf",)
PART = ".partial"  # suffix of every file until the export is whole
EXPERT_PARTS = ("gate", "up", "down")
# f32 bytes of one piece of a resident tensor.
_PIECE_BYTES = 32 << 20
# Written bytes after which data and journal are synced: what a crash can cost.
_COMMIT_BYTES = 32 << 20
_READ_BYTES = 4 << 20
# Kept free on the disk beyond what the export itself needs.
_MARGIN_BYTES = 16 << 20


class Measured(Protocol):
    """A calibration: see export/calibrate."""

    @property
    def imatrix(self) -> Imatrix: ...

    @property
    def heat(self) -> Heat: ...


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    profile: str = "phone",
    formats: Sequence[str] = ("gguf",),
    recipe: Recipe | str | None = None,
    calibration: Measured | Imatrix | str | Path | None = None,
    progress: Progress | None = None,
    *,
    window: int | None = None,
    ignore_config_keys: Iterable[str] = (),
    overwrite: bool = False,
    permute_by_heat: bool = False,
    threads: int | None = None,
) -> Bundle:
    """Quantise a Hugging Face checkpoint folder into a bundle folder and open it.

    `recipe` is a Recipe or the name of one; by default the profile's, with MXFP4 experts of a
    V2.6 checkpoint passed through code for code. `calibration` is a measured calibration, an
    Imatrix, or the path of an `imatrix.gguf` (with `experts.json` beside it, if there).
    `window` overrides W. `overwrite` replaces an existing bundle at the end of the export, not
    before. `permute_by_heat` stores the experts of a layer hottest first. `threads` pieces are
    quantised at a time (default: up to 4).

    An interrupted export is continued by the same call. Raises CheckpointError, ConfigError,
    QuantError or TokenizerError for a source that cannot be exported, ExportError when the
    output is in the way or the disk is full; nothing that looks whole is left behind then.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UsageError(f"unknown output format {unknown[0]!r}", f"known: {', '.join(FORMATS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}")
    threads = threads or min(4, os.cpu_count() or 1)
    target = Path(out).absolute()
    with Checkpoint.open(
        checkpoint, window=window, ignore_config_keys=ignore_config_keys
    ) as source:
        export = _prepare(
            source, target, profile, recipe, calibration, permute_by_heat, progress, threads
        )
        try:
            if not _open_staging(export, overwrite):
                return Bundle.open(target)  # finished by an earlier run
            for stage in STAGES:
                stage(export)
        except OSError as error:
            raise _disk_error(error, export) from error
        finally:
            export.close()
    return Bundle.open(target)


# --- What is to be done ---------------------------------------------------------------------


class Piece(NamedTuple):
    """What is quantised, written and journalled at once.

    For a resident tensor: rows start..stop. For experts (`expert` >= 0): the expert that goes to
    place `expert` of the three stacks of `layer`."""

    key: str
    tensor: str
    start: int
    stop: int
    layer: int
    expert: int
    nbytes: int


class Chunk(NamedTuple):
    """Bytes to be written: file index, offset and CRC-32."""

    file: int
    offset: int
    data: memoryview
    crc32: int


@dataclass
class Export:
    """One export: what is fixed before it starts, and the open files while it runs."""

    source: Checkpoint
    target: Path
    profile: str
    recipe: Recipe
    mapping: TensorMapping
    formats: dict[str, Format]
    layouts: list[GgufLayout]
    file_names: list[str]
    file_of: dict[str, int]
    pieces: list[Piece]
    side_files: dict[str, bytes | Path | Imatrix]
    imatrix: Imatrix | None
    permutation: dict[int, tuple[int, ...]]
    progress: Progress | None
    threads: int
    journal: Journal | None = None
    fds: list[int] = field(default_factory=list)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensor_crcs: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> MimoConfig:
        return self.source.config

    @property
    def staging(self) -> Path:
        return self.target.parent / f".{self.target.name}{PART}"

    @property
    def folder(self) -> Path:
        """Where the bundle grows."""
        return self.staging / "bundle"

    @property
    def total_bytes(self) -> int:
        return sum(layout.size for layout in self.layouts)

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _prepare(
    source: Checkpoint,
    target: Path,
    profile: str,
    recipe: Recipe | str | None,
    calibration: Measured | Imatrix | str | Path | None,
    permute_by_heat: bool,
    progress: Progress | None,
    threads: int,
) -> Export:
    """Decide everything from names and shapes; no tensor data is read."""
    config = source.config
    mapping = plan_tensors(source)
    chosen = _choose_recipe(recipe, profile, config)
    if unused := chosen.unused_overrides(plan.name for plan in mapping.tensors):
        raise UsageError(f"the recipe's overrides {unused} match no tensor of {source.name}")
    formats = {}
    for plan in mapping.tensors:
        choice = chosen.format_for(plan.role, plan.shape[-1], plan.name)
        if choice.fallback:
            _log.warning("%s: %s", plan.name, choice.reason)
        formats[plan.name] = choice.format
    imatrix, heat = _measured(calibration)
    if permute_by_heat and (heat is None or not any(config.moe_layer_freq)):
        raise UsageError(
            "there is no expert heat to order experts by", "calibrate first (--calibrate FILE)"
        )
    if heat is not None:
        _check_heat(heat, config)
    if chosen.requires_importance and imatrix is None:
        raise UsageError(f"recipe {chosen.name} needs an importance matrix", "add --calibrate FILE")
    if not config.norm_topk_prob or config.routed_scaling_factor != 1.0:
        _log.warning(
            "stock llama.cpp ignores norm_topk_prob = %s and routed_scaling_factor = %s for this "
            "architecture; mimo-edge applies them",
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
    permutation = (
        {n: tuple(map(int, heat.order(n))) for n in sorted(heat.counts)}
        if permute_by_heat and heat is not None
        else {}
    )
    template = read_chat_template(source.tokenizer_files, source.chat_template)
    names, layouts = _layouts(source, mapping, formats, chosen, template)
    file_of = {name: i for i, layout in enumerate(layouts) for name in layout.tensors}
    side: dict[str, bytes | Path | Imatrix] = {}
    for name in ("tokenizer.json", "tokenizer.model"):
        if name in source.tokenizer_files:
            side[name] = source.tokenizer_files[name]
            break
    if template is not None:
        side["chat_template.jinja"] = template.encode()
    if heat is not None:
        side["experts.json"] = heat.permuted(permutation).to_bytes()
    if imatrix is not None:
        side["imatrix.gguf"] = imatrix
    return Export(
        source=source,
        target=target,
        profile=profile,
        recipe=chosen,
        mapping=mapping,
        formats=formats,
        layouts=layouts,
        file_names=names,
        file_of=file_of,
        pieces=list(_pieces(mapping, formats, permutation)),
        side_files=side,
        imatrix=imatrix,
        permutation=permutation,
        progress=progress,
        threads=threads,
    )


def _choose_recipe(recipe: Recipe | str | None, profile: str, config: MimoConfig) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return Recipe.named(recipe, family=config.family)
    default = Recipe.for_profile(profile, family=config.family)
    if config.quantization.expert_store == "mxfp4":
        # The release is 4-bit already: requantising it to another 4-bit code only loses.
        return Recipe.named("mxfp4", family=config.family)
    return default


def _measured(
    calibration: Measured | Imatrix | str | Path | None,
) -> tuple[Imatrix | None, Heat | None]:
    if calibration is None:
        return None, None
    if isinstance(calibration, Imatrix):
        return calibration, None
    if isinstance(calibration, (str, Path)):
        path = Path(calibration)
        heat = path.parent / "experts.json"
        return Imatrix.read(path), Heat.read(heat) if heat.is_file() else None
    return calibration.imatrix, calibration.heat


def _check_heat(heat: Heat, config: MimoConfig) -> None:
    layers = [n for n in range(config.num_hidden_layers) if config.layer(n).moe]
    sizes = {len(counts) for counts in heat.counts.values()}
    if sorted(heat.counts) != layers or sizes - {config.n_routed_experts}:
        raise UsageError(
            f"the expert heat covers {len(heat.counts)} layers of {sorted(sizes)} experts, the "
            f"model has {len(layers)} of {config.n_routed_experts}",
            "it was measured on another model",
        )


def _layouts(
    source: Checkpoint,
    mapping: TensorMapping,
    formats: Mapping[str, Format],
    recipe: Recipe,
    template: str | None,
) -> tuple[list[str], list[GgufLayout]]:
    """File names and layouts: resident tensors, then routed experts, then MiMo-7B's MTP block."""
    config = source.config
    planned = {
        plan.name: PlannedTensor(plan.name, formats[plan.name].ggml_type, plan.shape)
        for plan in mapping.tensors
    }
    experts = [p for p in mapping.tensors if p.is_expert_stack]
    side = [p for p in mapping.tensors if config.family == "mimo" and _is_mtp(p, config)]
    apart = {p.name for p in (*experts, *side)}
    resident = [p for p in mapping.tensors if p.name not in apart]
    general = {
        "general.architecture": text(architecture(config)),
        "general.type": text("model"),
        "general.name": text(source.name),
        "general.file_type": u32(recipe.file_type),
        "general.quantization_version": u32(2),
    }
    tokenizer = tokenizer_metadata(
        source.tokenizer_files, config.vocab_size, config.eos_token_ids, template
    )
    main = general | config_metadata(config)
    if tokenizer["tokenizer.ggml.model"].value == "none":
        main[f"{architecture(config)}.vocab_size"] = u32(config.vocab_size)
    main |= tokenizer
    parts: list[tuple[dict[str, Value], list[TensorPlan]]] = [(main, resident)]
    if experts:
        parts.append(({"general.architecture": general["general.architecture"]}, experts))
    count, tensors = len(parts), len(resident) + len(experts)
    names, layouts = [], []
    for number, (keys, plans) in enumerate(parts):
        split = split_keys(number, count, tensors) if count > 1 else {}
        names.append(split_name("model", number, count) if count > 1 else "model.gguf")
        layouts.append(GgufLayout(keys | split, [planned[p.name] for p in plans]))
    if side:
        keys = general | {"general.architecture": text(ARCH_7B_MTP)}
        keys[f"{ARCH_7B_MTP}.nextn_predict_layers"] = u32(config.num_mtp_layers)
        names.append("model-mtp.gguf")
        layouts.append(GgufLayout(keys, [planned[p.name] for p in side]))
    return names, layouts


def _is_mtp(plan: TensorPlan, config: MimoConfig) -> bool:
    return plan.layer is not None and plan.layer >= config.num_hidden_layers


def _pieces(
    mapping: TensorMapping,
    formats: Mapping[str, Format],
    permutation: Mapping[int, tuple[int, ...]],
) -> Iterator[Piece]:
    """Every piece, in a fixed order: tensors as planned, the experts of a layer together."""
    for plan in mapping.tensors:
        if plan.is_expert_stack:
            if not plan.name.endswith(".ffn_gate_exps.weight"):
                continue
            assert plan.layer is not None
            stacks = [mapping[_stack(plan.layer, part)] for part in EXPERT_PARTS]
            nbytes = sum(s.shape[1] * formats[s.name].row_bytes(s.shape[2]) for s in stacks)
            for e in range(plan.shape[0]):
                key = f"blk.{plan.layer}.expert.{e}"
                yield Piece(key, plan.name, 0, 0, plan.layer, e, nbytes)
            continue
        rows = plan.shape[0] if len(plan.shape) > 1 else 1
        size = formats[plan.name].row_bytes(plan.shape[-1])
        step = max(1, _PIECE_BYTES // (4 * plan.shape[-1]))
        if plan.layer in permutation and _follows_experts(plan):
            step = rows  # rows move, so they are loaded together (a router is small)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            key = f"{plan.name}.{start}"
            yield Piece(key, plan.name, start, stop, -1, -1, (stop - start) * size)


def _stack(layer: int, part: str) -> str:
    return f"blk.{layer}.ffn_{part}_exps.weight"


def _follows_experts(plan: TensorPlan) -> bool:
    return plan.role in (Role.ROUTER, Role.ROUTER_BIAS)


# --- The staging folder ---------------------------------------------------------------------


def _open_staging(export: Export, overwrite: bool) -> bool:
    """Lock the staging folder and read its journal; False when there is nothing left to do."""
    target, staging = export.target, export.staging
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} exists and is not a folder")
    occupied = target.is_dir() and any(target.iterdir())
    resumable = (staging / JOURNAL_NAME).is_file()
    if occupied and not overwrite and not resumable:
        raise ExportError(f"{target} exists", "choose another name or pass --overwrite")
    if occupied and not (target / MANIFEST_NAME).is_file():
        raise ExportError(
            f"{target} is a folder with other content, not a bundle", "choose another name"
        )
    if target.is_dir() and os.path.ismount(target):
        raise ExportError(f"{target} is a mount point", f"export to {target / 'model'} instead")
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
        _clear(export.folder)
        export.journal = Journal(staging / JOURNAL_NAME)
    if export.journal.job is None:
        _clear(export.folder)
        if occupied and not overwrite:
            raise ExportError(f"{target} exists", "choose another name or pass --overwrite")
        export.folder.mkdir()
        export.journal.begin(job)
    elif not export.folder.exists():
        # Renamed into place by a run that was killed before it could tidy up.
        export.close()
        shutil.rmtree(staging)
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
        if (final := export.folder / name).exists():
            final.rename(path)  # killed between the last renames
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        export.fds.append(fd)
        os.ftruncate(fd, layout.size)
    return True


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


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _disk_error(error: OSError, export: Export) -> ExportError:
    where = f"{export.staging}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        done = sum(piece.nbytes for piece in export.pieces if piece.key in export.done)
        return ExportError(
            f"the disk is full after {done} of {export.total_bytes} bytes ({where})",
            "free some space and run the same command again: finished pieces are kept",
        )
    return ExportError(f"the export failed at {where}", "run it again: finished pieces are kept")


# --- The stages -----------------------------------------------------------------------------


def check_space(export: Export) -> None:
    """Refuse before hours of work when the result cannot fit."""
    present = 0
    for fd in export.fds:
        present += os.fstat(fd).st_blocks * 512
    side = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in export.side_files.values()
        if not isinstance(content, Imatrix)
    )
    needed = max(0, export.total_bytes - present) + side + _MARGIN_BYTES
    free = shutil.disk_usage(export.staging).free
    if free < needed:
        raise ExportError(
            f"the export needs {needed} more bytes on {export.target.parent}, {free} are free",
            "free some space or export to another disk",
        )


def write_tensors(export: Export) -> None:
    """Quantise and write every piece that the journal does not list yet."""
    assert export.journal is not None
    total = sum(piece.nbytes for piece in export.pieces)
    written = sum(piece.nbytes for piece in export.pieces if piece.key in export.done)
    export.report("quantise", written, total)
    todo = [piece for piece in export.pieces if piece.key not in export.done]
    pending: list[dict[str, Any]] = []
    uncommitted = 0
    for piece, chunks, entry in _computed(export, todo):
        for chunk in chunks:
            _write_at(export.fds[chunk.file], chunk.data, chunk.offset)
        pending.append(entry)
        uncommitted += piece.nbytes
        written += piece.nbytes
        if uncommitted >= _COMMIT_BYTES:
            _commit(export, pending)
            pending, uncommitted = [], 0
        export.report("quantise", written, total)
    _commit(export, pending)


def _commit(export: Export, entries: list[dict[str, Any]]) -> None:
    assert export.journal is not None
    for fd in export.fds:
        os.fsync(fd)
    export.journal.append(entries)
    for entry in entries:
        export.done[entry["piece"]] = entry


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


Computed = tuple[list[Chunk], dict[str, Any]]


def _computed(
    export: Export, pieces: list[Piece]
) -> Iterator[tuple[Piece, list[Chunk], dict[str, Any]]]:
    """Pieces in order, `threads` of them computed at a time."""
    waiting: deque[tuple[Piece, Future[Computed]]] = deque()
    pool = ThreadPoolExecutor(export.threads, thread_name_prefix="quantise")
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_compute, export, piece)))
            if len(waiting) > export.threads:
                first, future = waiting.popleft()
                yield first, *future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, *future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _compute(export: Export, piece: Piece) -> Computed:
    """Read and quantise one piece. The journal entry keeps each chunk's place and CRC-32, and
    per tensor the sums its error is made of."""
    chunks: list[Chunk] = []
    errors: dict[str, list[float]] = {}
    unweighted: list[str] = []
    if piece.expert < 0:
        plan = export.mapping[piece.tensor]
        values = _resident_rows(export, plan, piece)
        _quantise(export, plan, values, piece.start, None, chunks, errors, unweighted)
    else:
        moved = export.permutation.get(piece.layer)
        expert = moved[piece.expert] if moved else piece.expert
        for part in EXPERT_PARTS:
            plan = export.mapping[_stack(piece.layer, part)]
            first_row = piece.expert * plan.shape[1]
            if plan.mxfp4 and export.formats[plan.name].name == "MXFP4":
                raw = blocks_from_checkpoint(*plan.expert_mxfp4(export.source, expert))
                chunks.append(_chunk(export, plan, raw, first_row))
                continue
            values = plan.load_expert(export.source, expert)
            _quantise(export, plan, values, first_row, expert, chunks, errors, unweighted)
    entry: dict[str, Any] = {
        "piece": piece.key,
        "chunks": [[c.file, c.offset, len(c.data), c.crc32] for c in chunks],
    }
    if piece.expert >= 0:
        crc = 0
        for chunk in chunks:
            crc = zlib.crc32(chunk.data, crc)
        entry["crc"] = crc
    if errors:
        entry["errors"] = errors
    if unweighted:
        entry["unweighted"] = unweighted
    return chunks, entry


def _resident_rows(export: Export, plan: TensorPlan, piece: Piece) -> F32:
    """f32 [rows, cols] of a piece; vectors are one row."""
    moved = export.permutation.get(plan.layer) if plan.layer is not None else None
    if moved is not None and _follows_experts(plan):
        values: F32 = plan.load(export.source)[np.array(moved)]
    elif len(plan.shape) == 1:
        values = plan.load(export.source)
    else:
        values = plan.load_rows(export.source, piece.start, piece.stop)
    return values.reshape(-1, plan.shape[-1])


def _quantise(
    export: Export,
    plan: TensorPlan,
    values: F32,
    first_row: int,
    expert: int | None,
    chunks: list[Chunk],
    errors: dict[str, list[float]],
    unweighted: list[str],
) -> None:
    fmt = export.formats[plan.name]
    importance = None
    if export.imatrix is not None and fmt.uses_importance:
        importance = _importance(export.imatrix, plan.name, expert)
        if importance is None:
            unweighted.append(plan.name if expert is None else f"{plan.name}[{expert}]")
            if fmt.requires_importance:
                importance = np.ones(plan.shape[-1], np.float32)
    raw = fmt.quantize(values, importance)
    chunks.append(_chunk(export, plan, raw, first_row))
    if fmt.name != "F32":
        meter = ErrorMeter(fmt)
        meter.add(values, raw)
        result = meter.result()
        # NumPy's own summation, not BLAS: the same sum on every run, whatever the threads.
        power = float(np.square(values, dtype=np.float64).sum())
        worst = result.worst.relative_rms if result.worst else 0.0
        if not np.isfinite(worst):
            worst = -1.0  # JSON has no infinity; an all-zero block that became something
        errors[plan.name] = [power, result.relative_rms, worst]


def _importance(imatrix: Imatrix, name: str, expert: int | None) -> F32 | None:
    """Importance of a tensor; a fused q/k/v has the inputs of its q."""
    known = set(imatrix.names)
    if name not in known and name.replace(".attn_qkv.", ".attn_q.") in known:
        name = name.replace(".attn_qkv.", ".attn_q.")
    return imatrix.importance(name, expert)


def _chunk(export: Export, plan: TensorPlan, raw: U8, first_row: int) -> Chunk:
    file = export.file_of[plan.name]
    offset = export.layouts[file].offsets[plan.name] + first_row * raw.shape[1]
    data = memoryview(np.ascontiguousarray(raw).reshape(-1))
    return Chunk(file, offset, data, zlib.crc32(data))


def write_side_files(export: Export) -> None:
    """Tokenizer, chat template, heat and importance matrix."""
    for name, content in export.side_files.items():
        path = export.folder / (name + PART)
        (export.folder / name).unlink(missing_ok=True)  # killed between the last renames
        if isinstance(content, Imatrix):
            content.write(path)
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
            _write_file(path, data)
        export.files[name] = _hash_file(path)


def seal(export: Export) -> None:
    """Write the headers, then read everything back: what the manifest says is what is on disk."""
    total = export.total_bytes
    done = 0
    expected: list[dict[int, tuple[int, int, str]]] = [{} for _ in export.layouts]
    for key, entry in export.done.items():
        for file, offset, size, crc in entry["chunks"]:
            expected[file][offset] = (size, crc, key)
    for index, layout in enumerate(export.layouts):
        _write_at(export.fds[index], memoryview(layout.header), 0)
        os.fsync(export.fds[index])
        digest = hashlib.sha256()
        tensor_at = {offset: name for name, offset in layout.offsets.items()}
        name, position = "", 0
        while position < layout.size:
            name = tensor_at.get(position, name)
            size, crc, key = expected[index].get(position, (0, 0, ""))
            if not key:  # the header, or the padding behind a tensor
                later = [offset for offset in expected[index] if offset > position]
                size = (
                    min(later, default=layout.size) - position if position else len(layout.header)
                )
            found = 0
            for data in _read_range(export.fds[index], position, size):
                digest.update(data)
                if key:
                    found = zlib.crc32(data, found)
                    export.tensor_crcs[name] = zlib.crc32(data, export.tensor_crcs.get(name, 0))
                done += len(data)
                export.report("check", done, total)
            if key and found != crc:
                assert export.journal is not None
                export.journal.append([{"drop": key}])
                raise ExportError(
                    f"the disk returned other bytes than were written ({key} in "
                    f"{export.file_names[index]})",
                    "run the export again; check the disk if it happens twice",
                )
            position += size
        export.files[export.file_names[index]] = FileEntry(layout.size, digest.hexdigest())


def _read_range(fd: int, offset: int, size: int) -> Iterator[bytes]:
    while size:
        data = os.pread(fd, min(size, _READ_BYTES), offset)
        if not data:
            raise OSError(errno.EIO, "file ended early")
        yield data
        offset += len(data)
        size -= len(data)


def write_manifest(export: Export) -> None:
    """The manifest, built from the journal alone, so that a resumed export writes the same."""
    experts: dict[int, list[int]] = {}
    sums: dict[str, list[list[float]]] = {}
    unweighted: list[str] = []
    for piece in export.pieces:
        entry = export.done[piece.key]
        if piece.expert >= 0:
            experts.setdefault(piece.layer, []).append(entry["crc"])
        for name, values in entry.get("errors", {}).items():
            sums.setdefault(name, []).append(values)
        unweighted += entry.get("unweighted", [])
    if unweighted:
        _log.warning(
            "%d tensors or experts had no calibration data and were quantised unweighted: %s",
            len(unweighted),
            ", ".join(unweighted),
        )
    order = [name for layout in export.layouts for name in layout.tensors]
    stacks = {plan.name for plan in export.mapping.tensors if plan.is_expert_stack}
    reasons: dict[str, int] = {}
    for reason in export.mapping.skipped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    side = export.side_files
    manifest = Manifest(
        tool_version=mimo_edge.__version__,
        source_name=export.source.name,
        source_index_sha256=export.source.index_sha256,
        config=export.config,
        profile=export.profile,
        recipe=export.recipe.to_dict(),
        model_file=export.file_names[0],
        mtp_file="model-mtp.gguf" if "model-mtp.gguf" in export.file_names else None,
        tokenizer_file=next((n for n in ("tokenizer.json", "tokenizer.model") if n in side), None),
        chat_template_file="chat_template.jinja" if "chat_template.jinja" in side else None,
        heat_file="experts.json" if "experts.json" in side else None,
        imatrix_file="imatrix.gguf" if "imatrix.gguf" in side else None,
        files={n: export.files[n] for n in (*export.file_names, *side)},
        tensors={
            name: _tensor_entry(export, name, sums.get(name), name in stacks) for name in order
        },
        experts={layer: tuple(crcs) for layer, crcs in experts.items()},
        permutation=export.permutation,
        unweighted=tuple(unweighted),
        skipped=reasons,
    )
    (export.folder / MANIFEST_NAME).unlink(missing_ok=True)
    _write_file(export.folder / (MANIFEST_NAME + PART), manifest.to_bytes())


def _tensor_entry(
    export: Export, name: str, sums: list[list[float]] | None, stack: bool
) -> TensorEntry:
    fmt = export.formats[name]
    layout = export.layouts[export.file_of[name]]
    relative = worst = None
    if sums:
        power = sum(p for p, _, _ in sums)
        error = sum(p * r * r for p, r, _ in sums)
        relative = _rounded((error / power) ** 0.5) if power else 0.0
        worst = None if any(w < 0 for _, _, w in sums) else _rounded(max(w for _, _, w in sums))
    return TensorEntry(
        fmt.name,
        layout.tensors[name].nbytes,
        None if stack else export.tensor_crcs[name],
        relative,
        worst,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def publish(export: Export) -> None:
    """Final names, the manifest's last; then the folder appears under its own name at once."""
    for name in (*export.file_names, *export.side_files, MANIFEST_NAME):
        (export.folder / (name + PART)).rename(export.folder / name)
    _sync_folder(export.folder)
    target, old = export.target, export.staging / "replaced"
    _clear(old)
    if target.is_dir() and any(target.iterdir()):
        target.rename(old)
    export.folder.rename(target)
    _sync_folder(target.parent)
    export.close()
    shutil.rmtree(export.staging)


STAGES: tuple[Callable[[Export], None], ...] = (
    check_space,
    write_tensors,
    write_side_files,
    seal,
    write_manifest,
    publish,
)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hash_file(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
