"""Weights as packed bytes: what the ggml backend loads, whatever file they come from.

Names are canonical (GGUF, q/k/v split also where the file fuses them), shapes are NumPy's
([out, in], stacked experts [E, out, in]). `PackedTensors` holds them in memory and can be made
from f32 weights; `GgufTensors` reads them from open GGUF files when their bytes are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cancel import CancelSignal
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.quant.base import Format, format_by_ggml_type, get_format
from mimo_edge.row_reader import RowReader
from mimo_edge.runtimes.base import F32, TokenIds, Weights
from mimo_edge.runtimes.ggml.library import TYPES
from mimo_edge.runtimes.weights import DictWeights

U8 = NDArray[np.uint8]

Fill = Callable[[int, U8], None]
"""fill(start, out): put the tensor's bytes from `start` on into out u8 [n]."""


class RawTensor:
    """Packed bytes of a tensor of `shape`: in memory, or in a file and read when asked for."""

    def __init__(self, ggml_type: int, shape: tuple[int, ...], data: U8 | Fill) -> None:
        """`data`: contiguous u8, of any shape, or what reads it."""
        self.ggml_type = ggml_type
        self.shape = shape
        self._data = data
        kind = TYPES[ggml_type]
        self._row_bytes = shape[-1] // kind.blck_size * kind.type_size
        self._rows = int(np.prod(shape[:-1], dtype=np.int64))  # 1 for a vector

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._rows * self._row_bytes

    @property
    def data(self) -> U8:
        """Packed rows u8 [rows, row bytes], rows = all but the last axis."""
        if not callable(self._data):
            return self._data.reshape(self._rows, self._row_bytes)
        out: U8 = np.empty((self._rows, self._row_bytes), np.uint8)
        self._data(0, out.reshape(-1))
        return out

    def read_into(self, out: U8) -> None:
        """Put all bytes into out u8 [nbytes]."""
        if callable(self._data):
            self._data(0, out)
        else:
            out[...] = self._data.reshape(-1)

    def rows(self, start: int, stop: int) -> RawTensor:
        """Rows start..stop of a matrix or elements of a vector of a type without blocks."""
        unit = self._row_bytes if len(self.shape) > 1 else TYPES[self.ggml_type].type_size
        shape, first, last = (stop - start, *self.shape[1:]), start * unit, stop * unit
        data = self._data
        if not callable(data):
            return RawTensor(self.ggml_type, shape, data.reshape(-1)[first:last])
        fill = data
        return RawTensor(self.ggml_type, shape, lambda at, out: fill(first + at, out))


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

    def embedding(self, token_ids: TokenIds, cancel: CancelSignal | None = None) -> F32:
        """Rows of token_embd for token_ids [T] -> f32 [T, M], without loading the table."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def raw_tensor(
    name: str, ggml_type: int, shape: tuple[int, ...], data: U8 | Fill, nbytes: int | None = None
) -> RawTensor:
    """A tensor after a check of its type, shape and byte count (`nbytes`, or that of `data`).
    Raises BundleError."""
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
    found = nbytes if callable(data) else data.size
    if found != rows * width:
        raise BundleError(f"tensor {name} has {found} bytes, expected {rows * width}")
    return RawTensor(ggml_type, shape, data)


def unpack(raw: RawTensor) -> F32:
    """Dequantise a whole tensor -> f32 of its shape."""
    return format_by_ggml_type(raw.ggml_type).dequantize(raw.data, raw.shape[-1]).reshape(raw.shape)


_TABLE = "token_embd.weight"


def _embedding(
    table: RawTensor, token_ids: TokenIds, gather: Callable[[NDArray[np.int64]], U8]
) -> F32:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise BundleError(f"token id outside 0..{table.shape[0] - 1}")
    return format_by_ggml_type(table.ggml_type).dequantize(gather(ids), table.shape[1])


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

    def embedding(self, token_ids: TokenIds, cancel: CancelSignal | None = None) -> F32:
        table = self.tensor(_TABLE)
        return _embedding(table, token_ids, lambda ids: np.ascontiguousarray(table.data[ids]))

    def close(self) -> None:
        self._tensors.clear()


class GgufTensors:
    """A `RawTensors` over open GGUF files (the model, and side files after it)."""

    def __init__(
        self,
        config: MimoConfig,
        files: Sequence[GgufFile],
        *,
        bounded: bool = False,
        table_crc32: int | None = None,
    ) -> None:
        """`bounded`: leave nothing of the files in the page cache. `table_crc32` of the embedding
        lets a model go on with a file that was repaired while running."""
        self._config = config
        self._files = list(files)
        self._bounded = bounded
        self._table_crc32 = table_crc32
        self._table: RawTensor | None = None
        self._rows: RowReader | None = None
        if bounded:
            for file in self._files:
                file.drop_pages()

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
        raw = raw_tensor(
            stored,
            info.ggml_type,
            info.shape,
            lambda start, out: file.read_into(stored, start, out),
            info.nbytes,
        )
        return raw if stored == name or ".attn_" not in name else self._part(name, raw)

    def embedding(self, token_ids: TokenIds, cancel: CancelSignal | None = None) -> F32:
        """See RawTensors. Raises BundleError when a row cannot be read, Cancelled."""
        if self._table is None or self._rows is None:
            self._table = self.tensor(_TABLE)
            file = next(file for file in self._files if _TABLE in file.tensors)
            self._rows = RowReader(file, _TABLE, past_cache=self._bounded, crc32=self._table_crc32)
        rows = self._rows
        return _embedding(self._table, token_ids, lambda ids: rows.rows(ids, cancel))

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        for file in self._files:
            file.close()

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
