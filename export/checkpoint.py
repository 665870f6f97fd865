"""A Hugging Face checkpoint folder: config, index, shards, and tensors one at a time as f32.

Opening reads config.json, the index and every shard's header, and checks that they agree;
no tensor data. Reading decodes bf16, f16, f32, block-scaled fp8 and MXFP4, in row groups, so
that memory stays at the result plus a few MiB.

Source: spec section 4.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import CheckpointError
from mimo_edge.export import fp8, mxfp4, strict_json
from mimo_edge.export.safetensors_file import SafetensorsFile, StoredTensor

F32 = NDArray[np.float32]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
FP8 = "F8_E4M3"

_CONFIG_LIMIT_BYTES = 4 << 20
_INDEX_LIMIT_BYTES = 64 << 20  # V2.5's has 73,081 entries in about 9 MB
_CHUNK_VALUES = 4 << 20  # f32 values decoded at a time: 16 MiB
_FLOATS = ("BF16", "F16", "F32")
_MTP = re.compile(r"model\.(?:mtp\.layers|mtp_layers)\.(\d{1,4})\.")
# No separator, no drive letter, no leading dot: such a name cannot leave the folder. (A shard may
# still be a symbolic link, as in the Hub cache; the index cannot make one.)
_SHARD = re.compile(r"\w[\w.+=@ -]{0,250}\.safetensors", re.ASCII)
_QKV = re.compile(r"model\.(mtp\.)?layers\.(\d{1,4})\.self_attn\.qkv_proj\.weight")


class Checkpoint:
    """An opened checkpoint. Safe to read from several threads; holds no open files."""

    def __init__(
        self,
        path: Path,
        config: MimoConfig,
        files: Mapping[str, SafetensorsFile],
        index_sha256: str,
        stated_shards: int | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.index_sha256 = index_sha256
        self._files = files
        self._stated_shards = stated_shards
        self._closed = False
        tensors = {name: t for file in files.values() for name, t in file.tensors.items()}
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        window: int | None = None,
        ignore_config_keys: Iterable[str] = (),
    ) -> Checkpoint:
        """Open and check a checkpoint folder.

        `window` overrides W of the sliding layers, `ignore_config_keys` are config.json keys the
        caller vouches for. Raises CheckpointError when files are missing, damaged or disagree,
        ConfigError when the model is not one we run.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder", "give a checkpoint folder")
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}", "give a checkpoint folder")
        raw, config_bytes = strict_json.load_object(folder / CONFIG_FILE, _CONFIG_LIMIT_BYTES)
        stated = None
        if (folder / INDEX_FILE).is_file():
            index, index_bytes = strict_json.load_object(folder / INDEX_FILE, _INDEX_LIMIT_BYTES)
            files = _open_indexed(folder, _weight_map(index))
            digest = hashlib.sha256(index_bytes).hexdigest()
            stated = _stated_shards(index)
        elif (folder / SINGLE_FILE).is_file():
            file = SafetensorsFile(folder / SINGLE_FILE)
            files = {SINGLE_FILE: file}
            digest = hashlib.sha256(config_bytes + file.header_sha256.encode()).hexdigest()
        else:
            raise CheckpointError(
                f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}",
                "only safetensors checkpoints can be read",
            )
        names = (name for file in files.values() for name in file.tensors)
        config = MimoConfig.from_hf(
            raw,
            num_mtp_layers=_count_mtp(names),
            window=window,
            ignore_keys=ignore_config_keys,
        )
        return cls(folder, _with_generation_eos(config, folder), files, digest, stated)

    @property
    def name(self) -> str:
        """Folder name, or "owner/model" for a snapshot inside a Hugging Face Hub cache."""
        path = self.path.absolute()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return text_name("/".join(path.parent.parent.name.split("--")[1:]))
        return text_name(path.name)

    @property
    def files(self) -> tuple[str, ...]:
        """Shard names the tensors come from."""
        return tuple(self._files)

    @cached_property
    def ignored_files(self) -> tuple[str, ...]:
        """Weight files and folders of weight files that the index does not name, sorted."""
        ignored = []
        for entry in self.path.iterdir():
            if entry.is_dir():
                if any(entry.glob("*.safetensors")):
                    ignored.append(entry.name + "/")
            elif entry.suffix == ".safetensors" and entry.name not in self._files:
                ignored.append(entry.name)
        return tuple(sorted(ignored))

    @cached_property
    def tokenizer_files(self) -> Mapping[str, Path]:
        """Path by name of every tokenizer and chat template file there is."""
        found = {name: self.path / name for name in TOKENIZER_FILES}
        return MappingProxyType({name: path for name, path in found.items() if _is_there(path)})

    @property
    def chat_template(self) -> Path | None:
        """The chat template's own file, if any (else it is in tokenizer_config.json)."""
        files = self.tokenizer_files
        return files.get("chat_template.jinja") or files.get("chat_template.json")

    def stored(self, name: str) -> StoredTensor:
        """Where and how a tensor is stored. Raises CheckpointError when there is none."""
        if self._closed:
            raise CheckpointError(f"checkpoint {self.name} is closed")
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.name} has no tensor {name!r}") from None

    def read_raw(self, name: str) -> NDArray[Any]:
        """A tensor as stored: bf16 as u16, fp8 and packed MXFP4 as u8."""
        stored = self.stored(name)
        return self._files[stored.file].read(name)

    def read(self, name: str) -> F32:
        """A tensor decoded to f32, its scales applied.

        Packed MXFP4 [rows, cols/2] comes back as [rows, cols]; a fused qkv_proj keeps its
        stored row order (export/mapping regroups it). Raises CheckpointError, naming tensor and
        place, on NaN, infinity, or a scale that is missing, of another shape or not positive.
        """
        shape = self.stored(name).shape
        return self.read_rows(name, 0, shape[0]) if shape else self._read_scalar(name)

    def read_rows(self, name: str, start: int, stop: int, out: F32 | None = None) -> F32:
        """Rows start..stop-1 of `read(name)`, reading those rows only, into `out` if given."""
        stored = self.stored(name)
        rows = stored.shape[0] if stored.shape else 0
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"rows {start}..{stop} of {name}, which has {rows}")
        decode, shape = self._decoder(stored)
        values = np.empty((stop - start, *shape[1:]), dtype=np.float32) if out is None else out
        if values.shape != (stop - start, *shape[1:]):
            raise CheckpointError(f"{stop - start} rows of {name} do not fit {values.shape}")
        per_row = max(1, int(np.prod(shape[1:], dtype=np.int64)))
        step = max(1, _CHUNK_VALUES // per_row)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            raw = self._files[stored.file].read_rows(name, first, last)
            values[first - start : last - start] = decode(raw, first)
        return values

    def scale_of(self, name: str) -> StoredTensor | None:
        """The scale tensor of a weight, checked for dtype and shape; None if it needs none.

        Raises CheckpointError when it is missing or does not fit the weight.
        """
        stored = self.stored(name)
        quantization = self.config.quantization
        if stored.dtype == FP8:
            if quantization.quant_method != "fp8":
                raise CheckpointError(
                    f"{name} is fp8, but config.json has no quantization_config",
                    "without it the block size of the scales is unknown",
                )
            block = quantization.weight_block_size
            suffix, dtypes = "_scale_inv", ("F32", "BF16")
            layout = self.qkv_layout(name)
            rows, columns = self._matrix_shape(stored)
            scale_rows = layout.scale_rows(block[0]) if layout else fp8.blocks(rows, block[0])
            expected = (scale_rows, fp8.blocks(columns, block[1]))
        elif stored.dtype == "U8" and quantization.expert_store == "mxfp4":
            suffix, dtypes = "_scale", ("U8", "F8_E8M0")
            rows, pairs = self._matrix_shape(stored)
            if pairs * 2 % mxfp4.BLOCK:
                raise CheckpointError(f"{name}: {pairs * 2} columns are no blocks of {mxfp4.BLOCK}")
            expected = (rows, pairs * 2 // mxfp4.BLOCK)
        else:
            return None
        scale = self.tensors.get(name + suffix)
        if scale is None:
            raise CheckpointError(
                f"{name} is {stored.dtype}, but its scale {name + suffix} is missing"
            )
        if scale.dtype not in dtypes:
            raise CheckpointError(f"{scale.name} is {scale.dtype}, expected {' or '.join(dtypes)}")
        if scale.shape != expected:
            raise CheckpointError(
                f"{scale.name} has shape {list(scale.shape)}, but {stored.dtype} "
                f"{list(stored.shape)} needs {list(expected)}"
            )
        return scale

    def read_mxfp4(self, name: str) -> tuple[fp8.U8, fp8.U8]:
        """Packed codes u8 [rows, cols/2] and E8M0 scales u8 [rows, cols/32], scales checked."""
        scale = self.scale_of(name)
        if scale is None or self.stored(name).dtype != "U8":
            raise CheckpointError(f"{name} is {self.stored(name).dtype}, not MXFP4")
        scales = self.read_raw(scale.name)
        mxfp4.check_scales(scales, name)
        return self.read_raw(name), scales

    def qkv_layout(self, name: str) -> fp8.QkvLayout | None:
        """How the rows of a fused qkv_proj are sharded; None for any other tensor."""
        match = _QKV.fullmatch(name)
        if match is None:
            return None
        index = int(match[2]) + (self.config.num_hidden_layers if match[1] else 0)
        layout = self._qkv_rows(index, self._qkv_shards)
        stored = self.stored(name)
        if stored.shape[:1] != (layout.rows,):
            raise CheckpointError(
                f"{name} has shape {list(stored.shape)}, expected "
                f"{[layout.rows, self.config.hidden_size]}"
            )
        return layout

    def close(self) -> None:
        """Make every later read an error. (No files are held open.)"""
        self._closed = True

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _qkv_rows(self, index: int, shards: int) -> fp8.QkvLayout:
        c, heads = self.config, self.config.layer(index).num_key_value_heads
        return fp8.QkvLayout(
            shards, c.num_attention_heads * c.head_dim, heads * c.head_dim, heads * c.v_head_dim
        )

    @cached_property
    def _qkv_shards(self) -> int:
        """T of every fused qkv_proj, told by the global layers alone (spec section 4.2)."""
        c = self.config
        block_rows = c.quantization.weight_block_size[0]
        candidates = []
        for spec in c.layers:
            name = f"model.layers.{spec.index}.self_attn.qkv_proj.weight"
            scale = self.tensors.get(name + "_scale_inv")
            if not spec.sliding and scale is not None and scale.shape:
                possible = fp8.possible_shards(
                    c.num_attention_heads,
                    spec.num_key_value_heads,
                    c.head_dim,
                    c.v_head_dim,
                    scale.shape[0],
                    block_rows,
                )
                candidates.append((name, possible))
        shards = fp8.agree_on_shards(candidates, self._stated_shards)
        for heads in (c.num_attention_heads, c.num_key_value_heads, c.swa_num_key_value_heads):
            if heads % shards:
                raise CheckpointError(f"{heads} heads cannot be stored in {shards} shards")
        return shards

    def _decoder(
        self, stored: StoredTensor
    ) -> tuple[Callable[[NDArray[Any], int], F32], tuple[int, ...]]:
        """(stored rows, number of the first row) -> f32 rows; and the decoded shape."""
        name = stored.name
        if stored.dtype in _FLOATS:
            return lambda raw, row: _decode_float(raw, stored, row), stored.shape
        scale = self.scale_of(name)
        if scale is None:
            raise CheckpointError(
                f"{name} is {stored.dtype}, which is no weight this version can decode"
            )
        if stored.dtype == FP8:
            factors = _decode_float(self.read_raw(scale.name), None, 0)
            fp8.check_scales(factors, name)
            layout, block = self.qkv_layout(name), self.config.quantization.weight_block_size
            shard_rows = layout.shard_rows if layout else 0

            def decode_fp8(raw: NDArray[Any], row: int) -> F32:
                fp8.check_codes(raw, name, row)
                values = fp8.decode(raw)
                fp8.apply_scales(values, factors, block, row, shard_rows)
                return values

            return decode_fp8, stored.shape
        scales = self.read_raw(scale.name)
        mxfp4.check_scales(scales, name)
        return (
            lambda raw, row: mxfp4.decode(raw, scales[row : row + len(raw)]),
            (stored.shape[0], stored.shape[1] * 2),
        )

    def _read_scalar(self, name: str) -> F32:
        stored = self.stored(name)
        if stored.dtype not in _FLOATS:
            raise CheckpointError(f"{name} is a {stored.dtype} scalar, not a weight")
        return _decode_float(self.read_raw(name), stored, 0)

    def _matrix_shape(self, stored: StoredTensor) -> tuple[int, int]:
        if len(stored.shape) != 2:
            raise CheckpointError(
                f"{stored.name} is {stored.dtype} of shape {list(stored.shape)}, not a matrix"
            )
        return stored.shape[0], stored.shape[1]


def _decode_float(raw: NDArray[Any], stored: StoredTensor | None, first_row: int) -> F32:
    """bf16 (u16), f16 or f32 -> f32. With `stored`, refuses NaN and infinity naming the place."""
    if raw.dtype == np.uint16:
        bits = raw.astype(np.uint32)
        bits <<= 16  # in place: half the memory of an expression
        values = bits.view(np.float32)
    else:
        values = raw.astype(np.float32, copy=False)
    if stored is not None and not bool(np.all(np.isfinite(values))):
        place = [int(x) for x in np.argwhere(~np.isfinite(values))[0]]
        found = values[tuple(place)]
        if place:
            place[0] += first_row
        raise CheckpointError(
            f"{stored.name}: element {place} is {found}",
            "the tensor is damaged; download the file again",
        )
    return values


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """tensor -> shard of the index, every shard a plain file name inside the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{INDEX_FILE} puts {name[:120]!r} into {str(shard)[:120]!r}",
                "a shard must be a plain *.safetensors file name inside the folder",
            )
    return weight_map


def _open_indexed(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
    """Open every shard of the index and check that index and headers list the same tensors."""
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing from {folder}: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}",
            "download the rest of the checkpoint",
        )
    files: dict[str, SafetensorsFile] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        files[shard] = SafetensorsFile(folder / shard)
        for name in files[shard].tensors:
            if name in owner:
                raise CheckpointError(f"tensor {name!r} is in both {owner[name]} and {shard}")
            owner[name] = shard
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            where = f"it is in {owner[name]}" if name in owner else "no shard has it"
            raise CheckpointError(
                f"the index says tensor {name!r} is in {shard}, but {where}",
                "index and shards are from different versions; download both again",
            )
    if extra := [name for name in owner if name not in weight_map]:
        raise CheckpointError(
            f"{len(extra)} tensors are not in the index, e.g. {extra[0]!r} in {owner[extra[0]]}",
            "index and shards are from different versions; download both again",
        )
    return files


def _stated_shards(index: Mapping[str, Any]) -> int | None:
    """`tp_size` of the index metadata: the shards a fused qkv_proj was saved in."""
    metadata = index.get("metadata")
    value = metadata.get("tp_size") if isinstance(metadata, dict) else None
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal() and len(value) < 6:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
        raise CheckpointError(f"{INDEX_FILE} states tp_size {value!r}, not a number of shards")
    return value


def _count_mtp(names: Iterable[str]) -> int:
    """Number of MTP blocks, which must be numbered 0, 1, 2, ... without a gap."""
    found = {int(match[1]) for name in names if (match := _MTP.match(name))}
    if found != set(range(len(found))):
        raise CheckpointError(f"MTP blocks {sorted(found)} are not numbered 0, 1, 2, ...")
    return len(found)


def _is_there(path: Path) -> bool:
    """Whether a file that may be missing is there. A link to nothing (a download cut short) or a
    folder of its name is an error: going on without it would quietly make another model."""
    if path.is_file():
        return True
    if path.is_symlink() or path.exists():
        raise CheckpointError(
            f"{path} is {'a link to nothing' if not path.exists() else 'not a file'}",
            "download the checkpoint again",
        )
    return False


def text_name(name: str) -> str:
    """A folder's name as text that UTF-8 files can hold, whatever bytes the disk has."""
    return os.fsencode(name).decode("utf-8", "replace")


def _with_generation_eos(config: MimoConfig, folder: Path) -> MimoConfig:
    """Add generation_config.json's eos ids: config.json names one of the two MiMo stops on."""
    path = folder / "generation_config.json"
    if not _is_there(path):
        return config
    raw, _ = strict_json.load_object(path, _CONFIG_LIMIT_BYTES)
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise CheckpointError(f"generation_config.json: eos_token_id {value!r} is no token id")
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids))))
