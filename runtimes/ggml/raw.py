"""Weights as packed bytes: what the ggml backend loads, whatever file they come from.

Names are canonical (GGUF, q/k/v split also where the file fuses them), shapes are NumPy's
([out, in], stacked experts [E, out, in]). `PackedTensors` holds them in memory and can be made
from f32 weights; `GgufTensors` reads open GGUF files: mapped, or past the page cache where memory
is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError
from mimo_edge.experts.flash_file import FlashFile
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.quant.base import Format, format_by_ggml_type, get_format
from mimo_edge.runtimes.base import F32, TokenIds, Weights
from mimo_edge.runtimes.ggml.library import TYPES
from mimo_edge.runtimes.weights import DictWeights

U8 = NDArray[np.uint8]


class RawTensor(NamedTuple):
    """Packed rows `data` u8 [rows, row bytes] of a tensor of `shape`, rows = all but the last.

    `data` may be a mapped file, not read yet; `place` is (file, offset of data) then.
    """

    ggml_type: int
    shape: tuple[int, ...]
    data: U8
    place: tuple[Path, int] | None = None

    def rows(self, start: int, stop: int) -> RawTensor:
        """Rows start..stop of a matrix or elements of a vector of a type without blocks."""
        shape = (stop - start, *self.shape[1:])
        if len(self.shape) == 1:
            size = TYPES[self.ggml_type].type_size
            data = self.data[:, start * size : stop * size]
        else:
            size = self.data.shape[1]
            data = self.data[start:stop]
        place = self.place
        if place is not None:
            place = place[0], place[1] + start * size
        return RawTensor(self.ggml_type, shape, data, place)


class RawTensors(Protocol):
    """Packed weights by canonical name."""

    @property
    def config(self) -> MimoConfig: ...

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        ...

    def tensor(self, name: str) -> RawTensor:
        """Its packed bytes, or BundleError."""
        ...

    def read(self, raw: RawTensor) -> U8:
        """All bytes of one of its tensors, or of rows of one: u8 [nbytes], read now."""
        ...

    def embedding(self, token_ids: TokenIds) -> F32:
        """Rows of token_embd for token_ids [T] -> f32 [T, M], without loading the table."""
        ...

    def release_pages(self) -> None:
        """Give back memory that only caches what a file holds."""
        ...

    def close(self) -> None:
        """Release files and maps."""
        ...


def raw_tensor(name: str, ggml_type: int, shape: tuple[int, ...], data: U8) -> RawTensor:
    """Check type and byte count and shape the bytes [n] into rows. Raises BundleError."""
    info = TYPES.get(ggml_type)
    if info is None:
        raise BundleError(
            f"tensor {name} has ggml type {ggml_type}, which the ggml backend does not run",
            f"supported: {', '.join(t.name for t in TYPES.values())}",
        )
    if not shape or min(shape) < 1 or shape[-1] % info.blck_size:
        raise BundleError(
            f"tensor {name} of shape {list(shape)} is not whole {info.name} blocks of "
            f"{info.blck_size}"
        )
    width = shape[-1] // info.blck_size * info.type_size
    rows = int(np.prod(shape[:-1], dtype=object)) if len(shape) > 1 else 1
    if data.size != rows * width:
        raise BundleError(f"tensor {name} has {data.size} bytes, expected {rows * width}")
    return RawTensor(ggml_type, shape, data.reshape(rows, width))


def unpack(raw: RawTensor) -> F32:
    """Dequantise a whole tensor -> f32 of its shape."""
    return format_by_ggml_type(raw.ggml_type).dequantize(raw.data, raw.shape[-1]).reshape(raw.shape)


def _check_rows(table: RawTensor, token_ids: TokenIds) -> NDArray[np.int64]:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise BundleError(f"token id outside 0..{table.shape[0] - 1}")
    return ids


def _rows_to_f32(table: RawTensor, rows: U8) -> F32:
    return format_by_ggml_type(table.ggml_type).dequantize(rows, table.shape[1])


class PackedTensors:
    """A `RawTensors` held in memory: tests, small models, tools that build a model themselves."""

    def __init__(self, config: MimoConfig, tensors: Mapping[str, RawTensor]) -> None:
        self._config = config
        self._tensors = dict(tensors)

    @classmethod
    def pack(cls, weights: Weights, format_of: Callable[[str], str]) -> PackedTensors:
        """Quantise f32 `weights`; `format_of(name)` names the format of each matrix.

        Vectors, routers and router biases stay F32, as in every file.
        """
        config = weights.config
        tensors: dict[str, RawTensor] = {}
        for name, shape in expected_shapes(config).items():
            values = np.ascontiguousarray(weights.tensor(name), dtype=np.float32)
            plain = len(shape) == 1 or name.endswith("ffn_gate_inp.weight")
            fmt: Format = get_format("F32" if plain else format_of(name))
            data = fmt.quantize(values.reshape(-1, shape[-1]))
            tensors[name] = raw_tensor(name, fmt.ggml_type, shape, data.reshape(-1))
        return cls(config, tensors)

    def unpacked(self) -> DictWeights:
        """The same model dequantised: what an oracle should compute with."""
        return DictWeights(self._config, {n: unpack(t) for n, t in self._tensors.items()})

    @property
    def config(self) -> MimoConfig:
        return self._config

    def has(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> RawTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise BundleError(f"no tensor {name!r} in this model") from None

    def read(self, raw: RawTensor) -> U8:
        return np.ascontiguousarray(raw.data).reshape(-1)

    def embedding(self, token_ids: TokenIds) -> F32:
        table = self.tensor("token_embd.weight")
        return _rows_to_f32(table, table.data[_check_rows(table, token_ids)])

    def release_pages(self) -> None:
        """Nothing here is a file."""

    def close(self) -> None:
        self._tensors.clear()


class GgufTensors:
    """A `RawTensors` over open GGUF files (the model, and side files after it)."""

    def __init__(
        self, config: MimoConfig, files: Sequence[GgufFile], *, bounded: bool = False
    ) -> None:
        """`bounded`: read past the page cache, which counts as this process's memory."""
        self._config = config
        self._files = list(files)
        self._table: RawTensor | None = None
        self._bounded = bounded
        self._flash: dict[Path, FlashFile] = {}

    @property
    def config(self) -> MimoConfig:
        return self._config

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def tensor(self, name: str) -> RawTensor:
        found = self._find(name)
        if found is None:
            raise BundleError(f"no tensor {name!r} in {self._files[0].files[0]}")
        file, stored = found
        info = file.info(stored)
        raw = raw_tensor(stored, info.ggml_type, info.shape, file.raw(stored))
        raw = raw._replace(place=(info.file, info.offset))
        return raw if stored == name or ".attn_" not in name else self._part(name, raw)

    def read(self, raw: RawTensor) -> U8:
        """See `RawTensors.read`. Raises BundleError when the file cannot be read, or is no longer
        the one that was opened."""
        if not self._bounded or raw.place is None:
            return np.ascontiguousarray(raw.data).reshape(-1)
        path, offset = raw.place
        file = self._flash.get(path)
        if file is None:
            # The reader of experts has said what kind of reads this file allows.
            file = self._flash[path] = FlashFile(path, announce=False)
        found: U8 = np.frombuffer(file.load(offset, raw.data.size), np.uint8)
        file.check()
        return found

    def embedding(self, token_ids: TokenIds) -> F32:
        if self._table is None:
            self._table = self.tensor("token_embd.weight")
        table = self._table
        ids = _check_rows(table, token_ids)
        if not self._bounded:
            return _rows_to_f32(table, table.data[ids])
        rows = np.empty((len(ids), table.data.shape[1]), np.uint8)
        for at, token in enumerate(ids.tolist()):
            rows[at] = self.read(table.rows(token, token + 1))
        return _rows_to_f32(table, rows)

    def release_pages(self) -> None:
        for file in self._files:
            file.release_pages()

    def close(self) -> None:
        for flash in self._flash.values():
            flash.close()
        self._flash.clear()
        for file in self._files:
            file.close()
        self._table = None

    def _find(self, name: str) -> tuple[GgufFile, str] | None:
        """The file and the stored name of a tensor: fused q/k/v and llama.cpp's other name of
        the MTP head norm are looked for too."""
        prefix, _, last = name.rpartition("attn_")
        names = [name]
        if prefix and last[:2] in ("q.", "k.", "v."):
            names.append(f"{prefix}attn_qkv.{last[2:]}")
        if name.endswith(".layer_output_norm.weight"):
            names.append(name.replace("layer_output_norm", "nextn.shared_head_norm"))
        for file in self._files:
            for stored in names:
                if stored in file.tensors:
                    return file, stored
        return None

    def _part(self, name: str, fused: RawTensor) -> RawTensor:
        """Rows of q, k or v in a fused [q | k | v] tensor."""
        c = self._config
        g = c.layer(int(name.split(".")[1])).num_key_value_heads
        sizes = {
            "q": c.num_attention_heads * c.head_dim,
            "k": g * c.head_dim,
            "v": g * c.v_head_dim,
        }
        if fused.shape[0] != sum(sizes.values()):
            raise BundleError(
                f"{name}: the fused tensor has {fused.shape[0]} rows, expected "
                f"{sum(sizes.values())}"
            )
        part = name.rpartition("attn_")[2][0]
        start = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[part]
        return fused.rows(start, start + sizes[part])
