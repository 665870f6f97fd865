"""Models with a real MiMo model's layer geometry and random weights, as GGUF files.

For measurements: stock llama.cpp loads them, and they work on token ids. Weights are drawn from
N(0, 1/in), so they have zero mean: with a mean, activations share a direction, all tokens route
alike and every expert cache looks good. A matrix is cut from one pool of quantised normal rows per
format and width, every row at another place: gigabytes are written at disk speed and peak memory is
one pool and one piece of a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import ExportError, UsageError
from mimo_edge.export.gguf_writer import GgufLayout, PlannedTensor
from mimo_edge.gguf_meta import architecture, config_metadata, expected_shapes, text, u32
from mimo_edge.known_models import known_model
from mimo_edge.quant.base import Format, get_format

U8 = NDArray[np.uint8]

POOL_ELEMENTS = 1 << 21
PIECE_BYTES = 32 << 20


def scaled_config(
    name: str,
    layers: int,
    experts: int | None,
    vocab: int | None,
    mtp: int,
    pattern: str | None = None,
) -> MimoConfig:
    """The released model `name` cut to its first `layers` layers, `experts` per layer. `pattern`
    says which of them slide ("1") or are global ("0"), repeated to their number; by default as in
    the released model."""
    config = known_model(name)
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(f"--layers {layers}", f"{name} has 1 to {config.num_hidden_layers}")
    hybrid = config.hybrid_layer_pattern[:layers]
    if pattern is not None:
        if not pattern or set(pattern) - {"0", "1"}:
            raise UsageError(f"--pattern {pattern!r}", "write 0 for global, 1 for sliding layers")
        hybrid = tuple(int(pattern[i % len(pattern)]) for i in range(layers))
    changed = replace(
        config,
        num_hidden_layers=layers,
        hybrid_layer_pattern=hybrid,
        moe_layer_freq=config.moe_layer_freq[:layers],
        num_mtp_layers=mtp,
        eos_token_ids=() if vocab is not None else config.eos_token_ids,
        vocab_size=config.vocab_size if vocab is None else vocab,
    )
    return changed if experts is None else replace(changed, n_routed_experts=experts)


def tiny_config(name: str, mtp: int) -> MimoConfig:
    """Small widths that every format accepts, the structure of `name`."""
    config = scaled_config(name, 4, None, 512, mtp)
    common: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
    }
    if config.family == "mimo":
        return replace(config, **common, head_dim=64, v_head_dim=64)
    return replace(
        config,
        **common,
        swa_num_key_value_heads=2,
        head_dim=96,
        v_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        sliding_window=33,
    )


class RandomRows:
    """Rows of N(0, 1/in) in one format, cut from a pool of quantised blocks."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pools: dict[tuple[str, int, float], U8] = {}

    def normal(self, count: int, spread: float) -> NDArray[np.float32]:
        """f32 [count] from N(0, spread^2)."""
        return self._rng.standard_normal(count, dtype=np.float32) * np.float32(spread)

    def pieces(self, fmt: Format, rows: int, columns: int, spread: float) -> Iterator[U8]:
        """The bytes of a [rows, columns] matrix of N(0, spread^2), a few MiB at a time."""
        pool = self._pool(fmt, columns, spread)
        blocks = columns // fmt.block_size
        step = max(1, PIECE_BYTES // (blocks * fmt.block_bytes))
        along = np.arange(blocks)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            first = self._rng.integers(0, len(pool), size=(count, 1))
            yield pool[(first + along) % len(pool)]

    def _pool(self, fmt: Format, columns: int, spread: float) -> U8:
        key = fmt.name, columns, spread
        if key not in self._pools:
            # A prime number of blocks: rows that start at different blocks never line up again.
            count = _prime_below(max(POOL_ELEMENTS // fmt.block_size, 2 * columns))
            values = self.normal(count * fmt.block_size, spread)
            packed = fmt.quantize(values.reshape(count, fmt.block_size))
            self._pools[key] = packed.reshape(count, fmt.block_bytes)
        return self._pools[key]


def _prime_below(limit: int) -> int:
    for n in range(limit, 2, -1):
        if all(n % d for d in range(2, int(n**0.5) + 1)):
            return n
    return 2


def write_model(
    path: Path,
    config: MimoConfig,
    *,
    experts: str = "Q4_0",
    dense: str = "Q4_0",
    head: str = "Q6_K",
    seed: int = 0,
    skew: float = 0.0,
) -> int:
    """Write the model to `path` (through a temporary name) and return its size in bytes.

    `experts`, `dense`, `head` name the formats of routed experts, of every other matrix, and of
    output and embedding. `skew` is the spread of the routing biases.
    Raises MimoEdgeError subclasses; leaves nothing behind when it fails.
    """
    if config.family == "mimo" and config.num_mtp_layers:
        raise UsageError("a bare GGUF of a dense model has no place for MTP blocks", "use --mtp 0")
    shapes = _fused(expected_shapes(config), config)
    formats = {name: _format(name, len(s), experts, dense, head) for name, s in shapes.items()}
    planned = [PlannedTensor(n, formats[n].ggml_type, s) for n, s in shapes.items()]
    metadata = {
        "general.architecture": text(architecture(config)),
        "general.type": text("model"),
        "general.name": text(f"random {config.num_hidden_layers} layers"),
        "general.quantization_version": u32(2),
        **config_metadata(config),
        f"{architecture(config)}.vocab_size": u32(config.vocab_size),
        "tokenizer.ggml.model": text("none"),
    }
    layout = GgufLayout(metadata, planned)
    partial = path.with_name(path.name + ".partial")
    rows = RandomRows(seed)
    try:
        with open(partial, "wb") as file:
            file.truncate(layout.size)
            file.write(layout.header)
            for tensor in planned:
                file.seek(layout.offsets[tensor.name])
                for piece in _tensor(rows, tensor, formats[tensor.name], skew):
                    file.write(piece.data)
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return layout.size


def _fused(shapes: dict[str, tuple[int, ...]], config: MimoConfig) -> dict[str, tuple[int, ...]]:
    """V2 files fuse q, k and v of every layer: stock llama.cpp wants it for MTP blocks."""
    if config.family != "mimo_v2":
        return shapes
    fused: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, _, part = name.rpartition("attn_")
        if part in ("q.weight", "k.weight", "v.weight"):
            key = f"{prefix}attn_qkv.weight"
            fused[key] = (fused.get(key, (0,))[0] + shape[0], shape[1])
        else:
            fused[name] = shape
    return fused


def _format(name: str, dims: int, experts: str, dense: str, head: str) -> Format:
    if dims == 1 or name.endswith("ffn_gate_inp.weight"):
        return get_format("F32")
    if "_exps." in name:
        return get_format(experts)
    return get_format(head if name in ("output.weight", "token_embd.weight") else dense)


def _tensor(rows: RandomRows, tensor: PlannedTensor, fmt: Format, skew: float) -> Iterator[U8]:
    name, shape = tensor.name, tensor.shape
    if len(shape) > 1:
        # An embedding row is taken as it is, not summed over its width: unit variance.
        spread = 1.0 if name == "token_embd.weight" else shape[-1] ** -0.5
        yield from rows.pieces(fmt, int(np.prod(shape[:-1])), shape[-1], spread)
        return
    if name.endswith("exp_probs_b.bias"):
        values = rows.normal(shape[0], skew)
    elif name.endswith("attn_sinks.weight") or name.endswith(".bias"):
        values = rows.normal(shape[0], 1.0)
    else:
        values = 1 + rows.normal(shape[0], 0.1)
    yield values.view(np.uint8)
