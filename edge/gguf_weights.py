"""A GGUF file as `Weights`: every tensor dequantised to f32 when asked for."""

from __future__ import annotations

import re

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, QuantError, UsageError
from mimo_edge.gguf_file import U8, GgufFile
from mimo_edge.quant.base import format_by_ggml_type
from mimo_edge.row_reader import RowReader
from mimo_edge.runtimes.base import F32, ExpertWeights, TokenIds

_QKV = re.compile(r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)")


class GgufWeights:
    """Weights of an open GGUF file, ours or a third party's; keeps no tensor in memory.

    Raises BundleError for a tensor that is not there or whose bytes cannot be decoded.
    """

    def __init__(self, file: GgufFile, config: MimoConfig) -> None:
        self._file = file
        self._config = config
        self._embedding: RowReader | None = None

    @property
    def config(self) -> MimoConfig:
        return self._config

    def has(self, name: str) -> bool:
        return self._resolve(name) is not None

    def tensor(self, name: str) -> F32:
        """f32 in [out, in] order; q, k and v split also where the file fuses them.

        A stack of experts is refused: it may not fit in memory.
        """
        resolved = self._resolve(name)
        if resolved is None:
            raise BundleError(f"no tensor {name!r} in {self._file.files[0]}")
        stored, start, stop = resolved
        shape = self._file.info(stored).shape
        if len(shape) > 2:
            raise BundleError(
                f"{name} is a stack of {shape[0]} experts", "take them one at a time with expert()"
            )
        if len(shape) == 1:
            # Vectors are one row of weights, but a part of a fused bias is a part of that row.
            row = self._decode(stored, self._file.raw_rows(stored, 0, 1))
            return row.reshape(-1)[start:stop]
        return self._decode(stored, self._file.raw_rows(stored, start, stop))

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start..stop of a tensor, f32 [n, in]; a vector is one row."""
        resolved = self._resolve(name)
        if resolved is None:
            raise BundleError(f"no tensor {name!r} in {self._file.files[0]}")
        stored, first, last = resolved
        if len(self._file.info(stored).shape) == 1:
            return self.tensor(name)[None][start:stop]
        if not 0 <= start <= stop <= last - first:
            raise BundleError(f"rows {start}..{stop} of {name}, which has {last - first}")
        return self._decode(stored, self._file.raw_rows(stored, first + start, first + stop))

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        parts = []
        for part in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            if name not in self._file.tensors:
                raise BundleError(f"layer {layer} has no routed experts")
            experts, rows, _ = self._file.info(name).shape
            if not 0 <= expert < experts:
                raise BundleError(f"expert {expert} of layer {layer}, which has {experts}")
            raw = self._file.raw_rows(name, expert * rows, (expert + 1) * rows)
            parts.append(self._decode(name, raw))
        return ExpertWeights(*parts)

    def embedding(self, token_ids: TokenIds) -> F32:
        """Rows of the embedding for token_ids [T] -> f32 [T, M]; only those rows are read."""
        name = "token_embd.weight"
        vocab = self._file.info(name).shape[0]
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UsageError(f"token id {bad} is outside the vocabulary of {vocab}")
        if self._embedding is None:
            self._embedding = RowReader(self._file, name)
        return self._decode(name, self._embedding.rows(ids))

    def close(self) -> None:
        if self._embedding is not None:
            self._embedding.close()
        self._file.close()

    def _resolve(self, name: str) -> tuple[str, int, int] | None:
        """(stored tensor, first row, end row) that a canonical name stands for."""
        tensors = self._file.tensors
        if name in tensors:
            return name, 0, tensors[name].shape[0]
        if match := _QKV.fullmatch(name):
            fused = f"blk.{match[1]}.attn_qkv.{match[3]}"
            return self._part(int(match[1]), match[2], fused) if fused in tensors else None
        if name == "output.weight" and self._config.tie_word_embeddings:
            return self._resolve("token_embd.weight")
        if name.endswith(".layer_output_norm.weight"):
            other = name.replace(".layer_output_norm.", ".nextn.shared_head_norm.")
            return self._resolve(other)
        return None

    def _part(self, index: int, part: str, fused: str) -> tuple[str, int, int] | None:
        c = self._config
        if index >= c.num_hidden_layers + c.num_mtp_layers:
            return None
        groups = c.layer(index).num_key_value_heads
        q, k = c.num_attention_heads * c.head_dim, groups * c.head_dim
        start = {"q": 0, "k": q, "v": q + k}[part]
        size = {"q": q, "k": k, "v": groups * c.v_head_dim}[part]
        return fused, start, start + size

    def _decode(self, name: str, raw: U8) -> F32:
        info = self._file.info(name)
        try:
            return format_by_ggml_type(info.ggml_type).dequantize(raw, info.shape[-1])
        except QuantError as error:
            raise BundleError(f"{info.file}: {name}: {error.message}", error.hint) from error
