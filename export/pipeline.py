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
import re
import shutil
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mimo_edge
from mimo_edge.bundle import Bundle
from mimo_edge.errors import ExportError, UsageError
from mimo_edge.export import hub
from mimo_edge.export.calibrate import is_gguf, read_tokenizer
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.from_bundle import (
    bytes_to_copy,
    extended_manifest,
    link_files,
    prepare_from_bundle,
)
from mimo_edge.export.job import PART, Export, Piece, Progress, prepare
from mimo_edge.export.measured import Measured, measure
from mimo_edge.export.npu_stage import DEFAULT_CONTEXT, NpuRequest, compile_npu, plan_npu
from mimo_edge.export.pieces import Chunk, Computed, compute
from mimo_edge.export.staging import check_target, clear, disk_error, open_staging, staging_of, tidy
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.heat import expert_names
from mimo_edge.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from mimo_edge.model_source import open_tokenizer
from mimo_edge.onnx_io import FOLDER
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.quant.recipe import Recipe
from mimo_edge.text_file import read_text

_log = logging.getLogger(__name__)

FORMATS = ("gguf", "onnx", "both")
BUILT_IN = "mimo-nano"
# Written bytes after which data and journal are synced: what a crash can cost.
_COMMIT_BYTES = 32 << 20
_READ_BYTES = 4 << 20
# Of a text that activations are measured on.
_TEXT_BYTES = 1 << 20
# Kept free on the disk beyond what the export itself needs.
_MARGIN_BYTES = 16 << 20
# One expert's matrix as the manifest's `unweighted` names it.
_EXPERT_MATRIX = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.weight\[(\d+)\]")


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    profile: str = "phone",
    formats: Sequence[str] = ("gguf",),
    recipe: Recipe | str | None = None,
    calibration: Measured | Imatrix | str | Path | None = None,
    progress: Progress | None = None,
    *,
    overrides: Iterable[tuple[str, str]] = (),
    window: int | None = None,
    ignore_config_keys: Iterable[str] = (),
    overwrite: bool = False,
    permute_by_heat: bool = False,
    threads: int | None = None,
    npu: str | Sequence[str] | None = None,
    npu_precision: str = "int4",
    npu_context: int = DEFAULT_CONTEXT,
) -> Bundle:
    """Quantise a Hugging Face checkpoint into a bundle folder and open it.

    `checkpoint` is a folder, a Hub id (owner/name), or "mimo-nano", the model that ships with us.
    `formats`: how resident tensors are written, "gguf", "onnx" or "both"; routed experts are GGUF
    always, once. A bundle folder as `checkpoint` gets the ONNX form beside its own files ("both").
    `recipe` is a Recipe or the name of one; by default the profile's, with MXFP4 experts of a
    V2.6 checkpoint passed through code for code. `calibration` is a measured calibration, an
    Imatrix, or the path of a text to measure on, or of an `imatrix.gguf` (with `experts.json`
    beside it, if there).
    `overrides` are (glob on tensor names, format) that win over the recipe. `window` overrides W.
    `overwrite` replaces an existing bundle at the end of the export, not
    before. `permute_by_heat` stores the experts of a layer hottest first. `threads` pieces are
    quantised at a time (default: up to 4). `npu` names NPUs ("v73,sa8255") that the dense part is
    compiled for as well, in "int4" (calibrated on the text of `calibration`; of mimo-nano on its
    own) or "fp16", for contexts up to `npu_context`; it takes the ONNX form along.

    An interrupted export is continued by the same call. Raises CheckpointError, ConfigError,
    QuantError or TokenizerError for a source that cannot be exported, ExportError when the
    output is in the way or the disk is full, ProviderError when an NPU takes no part of the model;
    nothing that looks whole is left behind then.
    """
    request = None
    if npu is not None:
        text = _calibration_text(calibration, checkpoint) if npu_precision == "int4" else None
        request = NpuRequest.of(npu, npu_precision, npu_context, text)
        formats = (*formats, "onnx")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UsageError(f"unknown output format {unknown[0]!r}", f"known: {', '.join(FORMATS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}")
    threads = threads or min(4, os.cpu_count() or 1)
    gguf, onnx = (any(name in (form, "both") for name in formats) for form in ("gguf", "onnx"))
    if not gguf and not onnx:
        raise UsageError("no output format", f"known: {', '.join(FORMATS)}")
    target = Path(out).absolute()
    if target.name in ("", ".."):  # names no folder that could be made or renamed
        target = target.resolve()
    staging = staging_of(target)
    check_target(target, overwrite)
    if (Path(checkpoint) / MANIFEST_NAME).is_file():
        asked = (recipe, None if npu is not None else calibration, window)
        if any(option is not None for option in asked) or any(
            (tuple(overrides), tuple(ignore_config_keys), permute_by_heat)
        ):
            raise UsageError(
                f"{checkpoint} is a bundle: its formats and experts stay as they are",
                "export the checkpoint to change them",
            )
        if not (gguf and onnx):
            raise UsageError(f"{checkpoint} is a bundle: its GGUF files stay", "use --format both")
        with Bundle.open(checkpoint) as given:
            export = prepare_from_bundle(given, target, staging, progress, threads)
            if request is not None:
                tokenizer = open_tokenizer(given.tokenizer_path) if given.tokenizer_path else None
                export.npu = plan_npu(request, given.weights(), tokenizer)
            return _run(export, overwrite)
    with Checkpoint.open(
        _folder(checkpoint), window=window, ignore_config_keys=ignore_config_keys
    ) as source:
        imatrix, heat = measure(source, calibration, staging, progress)
        export = prepare(
            source,
            BUILT_IN if str(checkpoint) == BUILT_IN else source.name,
            target,
            staging,
            profile,
            recipe,
            tuple(overrides),
            imatrix,
            heat,
            permute_by_heat,
            progress,
            threads,
            gguf,
            onnx,
        )
        if request is not None:
            export.npu = plan_npu(request, CheckpointWeights(source), read_tokenizer(source))
        return _run(export, overwrite)


def _calibration_text(
    calibration: Measured | Imatrix | str | Path | None, checkpoint: str | Path
) -> str | None:
    """The text activations are measured on: that of `calibration`, mimo-nano's own, or none."""
    if isinstance(calibration, (str, Path)) and not is_gguf(Path(calibration)):
        return read_text(Path(calibration), _TEXT_BYTES, "calibration text")
    if str(checkpoint) == BUILT_IN:
        from mimo_edge.nano.commands import calibration_text

        return calibration_text()
    return None


def _run(export: Export, overwrite: bool) -> Bundle:
    """Every stage, or what an earlier run left of them."""
    try:
        if open_staging(export, overwrite):
            for stage in STAGES:
                stage(export)
    except OSError as error:
        raise disk_error(error, export) from error
    finally:
        export.close()
    return Bundle.open(export.target)


def _folder(checkpoint: str | Path) -> Path:
    if str(checkpoint) == BUILT_IN and not Path(checkpoint).exists():
        from mimo_edge.nano.commands import checkpoint_dir

        return checkpoint_dir()
    return hub.resolve(checkpoint)


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
    needed += bytes_to_copy(export)
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


def _computed(
    export: Export, pieces: list[Piece]
) -> Iterator[tuple[Piece, list[Chunk], dict[str, Any]]]:
    """Pieces in order, `threads` of them computed at a time."""
    waiting: deque[tuple[Piece, Future[Computed]]] = deque()
    pool = ThreadPoolExecutor(export.threads, thread_name_prefix="quantise")
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(compute, export, piece)))
            if len(waiting) > export.threads:
                first, future = waiting.popleft()
                yield first, *future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, *future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_side_files(export: Export) -> None:
    """Tokenizer, chat template, heat and importance matrix."""
    ours = {export.folder / (name + PART) for name in export.file_names}
    for stray in export.folder.rglob("*"):  # of a run killed while it wrote these, or later
        if stray not in ours and not stray.is_dir():
            stray.unlink()
    for name, content in export.side_files.items():
        path = export.folder / (name + PART)
        path.parent.mkdir(parents=True, exist_ok=True)
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
        starts = sorted(expected[index])
        name, position = "", 0
        while position < layout.size:
            name = tensor_at.get(position, name)
            size, crc, key = expected[index].get(position, (0, 0, ""))
            if not key:  # the header, or the padding behind a tensor
                after = bisect_right(starts, position)
                size = (starts[after] if after < len(starts) else layout.size) - position
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
    if export.base is not None:
        made = extended_manifest(export)
        _write_file(export.folder / (MANIFEST_NAME + PART), made.to_bytes())
        return
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
        names = _unweighted_names(unweighted)
        _log.warning(
            "%d tensors or experts had no calibration data and were quantised unweighted: %s",
            len(names),
            ", ".join(names),
        )
    order = [name for layout in export.gguf_layouts for name in layout.tensors]
    stacks = {plan.name for plan in export.mapping.tensors if plan.is_expert_stack}
    side = export.side_files
    # The ONNX form last, as where it is added to a bundle.
    present = (*export.file_names, *side, *export.compiled)
    files = sorted(present, key=lambda name: name.startswith(f"{FOLDER}/"))
    manifest = Manifest(
        tool_version=mimo_edge.__version__,
        source_name=export.name,
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
        files={n: export.files[n] for n in files},
        tensors={
            name: _tensor_entry(export, name, sums.get(name), name in stacks) for name in order
        },
        experts={layer: tuple(crcs) for layer, crcs in experts.items()},
        permutation=export.permutation,
        unweighted=tuple(unweighted),
        skipped=export.mapping.skipped_by_reason(),
        onnx=None if export.onnx is None else export.onnx.manifest_entry(export.gguf),
    )
    _write_file(export.folder / (MANIFEST_NAME + PART), manifest.to_bytes())


def _unweighted_names(unweighted: Iterable[str]) -> list[str]:
    """The manifest's names for people: the three matrices of an expert are one."""
    names = []
    for name in unweighted:
        if match := _EXPERT_MATRIX.fullmatch(name):
            names += expert_names([(int(match[1]), int(match[2]))])
        else:
            names.append(name)
    return list(dict.fromkeys(names))


def _tensor_entry(
    export: Export, name: str, sums: list[list[float]] | None, stack: bool
) -> TensorEntry:
    fmt = export.formats[name]
    layout = export.gguf_layouts[export.file_of[name]]
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
    written = (*export.file_names, *export.side_files, *export.compiled)
    for name in (*export.linked, *written, MANIFEST_NAME):
        (export.folder / (name + PART)).rename(export.folder / name)
    for folder in export.folder.rglob("*/"):
        _sync_folder(folder)
    _sync_folder(export.folder)
    target, old = export.target, export.staging / "replaced"
    clear(old)
    if target.is_dir() and any(target.iterdir()):
        target.rename(old)
    export.folder.rename(target)
    _sync_folder(target.parent)
    export.close()
    tidy(export.staging)


STAGES: tuple[Callable[[Export], None], ...] = (
    check_space,
    write_tensors,
    write_side_files,
    link_files,
    seal,
    compile_npu,
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
