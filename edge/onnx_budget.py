"""The memory budget of the ONNX backend, in the lines of edge/budget.

What differs from ggml: graphs own a packed copy of their weights, and the files they come from are
mapped besides until it is made; the cache is f32; attention keeps its scores.
"""

from __future__ import annotations

from collections.abc import Mapping

from mimo_edge import budget as memory
from mimo_edge.budget import Budget, Line
from mimo_edge.config import MimoConfig
from mimo_edge.errors import DeviceError
from mimo_edge.experts.reader import COALESCE_BYTES, DEFAULT_LANES
from mimo_edge.gguf_file import TensorInfo
from mimo_edge.manifest import Manifest
from mimo_edge.onnx_io import (
    CPU_VARIANT,
    DATA_NAME,
    EMBED,
    FOLDER,
    LAYERS_PER_SHARD,
    RUN_ROWS,
    mtp_name,
    shards,
)
from mimo_edge.speculative import MAX_DRAFT
from mimo_edge.units import format_bytes

# onnxruntime's library and its environment, beyond what a process with ggml holds.
_RUNTIME_BYTES = 72 << 20
# A loaded session besides its weights: the graph, kernels, Python's side.
_SESSION_BYTES = 1 << 20
CHUNKS = (512, 256, 128, 64, 32, 16)
DEFAULT_CHUNK = 512
# Scores of attention that are there at once: product, with sink, weights, without sink.
_SCORE_COPIES = 3


def plan(
    config: MimoConfig,
    manifest: Manifest,
    tensors: Mapping[str, TensorInfo],
    context: int,
    ram: int | None,
    *,
    process_bytes: int | None = None,
    lanes: int = DEFAULT_LANES,
    idle_bytes: int = 0,
) -> Budget:
    """The budget of a bundle's ONNX form for conversations of `context` tokens; `tensors` are those
    of its GGUF files, `idle_bytes` are reserved for conversations that wait. Raises DeviceError
    with the table when `ram` is too small."""
    context = min(context, config.max_position_embeddings)
    base = memory.PROCESS_BYTES if process_bytes is None else process_bytes
    layers, mtp, largest, sessions = _graph_bytes(config, manifest)
    fixed = [
        Line("process", base + memory.LIBRARY_BYTES + _RUNTIME_BYTES, "Python, libraries"),
        Line("file pages", memory.FILE_PAGES_BYTES, "header, embedding rows"),
        Line("weights", layers + sessions * _SESSION_BYTES, f"{sessions} graphs, packed"),
        *([Line("MTP", mtp, f"{config.num_mtp_layers} blocks")] if mtp else []),
        *memory.idle_lines(idle_bytes),
        Line("KV cache", kv_bytes(config, context), f"{context} tokens, f32"),
    ]
    slot_bytes, total = 0, 0
    if any(config.moe_layer_freq):
        slot_bytes, bounce = memory.slot_sizes(config, tensors)
        total = config.n_routed_experts * sum(config.moe_layer_freq)
        fixed.append(Line("read lanes", lanes * (bounce + COALESCE_BYTES), f"{lanes} lanes"))
    if ram is not None:
        fixed.append(Line("reserve", (8 << 20) + ram // 64, "page tables, fragmentation"))
    chunk = DEFAULT_CHUNK
    if ram is not None:
        room = ram - sum(line.nbytes for line in fixed)
        chunk = next((n for n in CHUNKS if pass_bytes(config, context, n) <= room // 4), CHUNKS[-1])
    graphs = pass_bytes(config, context, chunk)
    lines = [*fixed, Line("graphs", graphs, f"chunks of {chunk} tokens")]
    slots = total
    if total:
        if ram is not None:
            room = ram - sum(line.nbytes for line in lines)
            slots = min(total, max(0, room) // slot_bytes)
        held = max(slots, config.num_experts_per_tok)
        note = f"{held} of {total} experts, {format_bytes(slot_bytes)} each"
        lines.append(Line("expert slots", held * slot_bytes, note))
    # The largest graph is there as a file and packed while it is loaded; cache, passes and experts
    # come into being after that. Experts that all stay are read a layer's matrices at a time and
    # reordered, before cache and passes.
    before = graphs + kv_bytes(config, context)
    loading = max(0, largest - before - slots * slot_bytes)
    stack = max((t.nbytes for name, t in tensors.items() if "_exps." in name), default=0)
    whole = max(loading, stack - before)
    used = sum(line.nbytes for line in lines)
    streamed = slots < total or (ram is not None and total > 0 and used + whole > ram)
    lines.append(
        Line("loading", loading, "the largest graph, mapped besides")
        if streamed
        else Line("loading", whole, "the largest graph or layer's experts, besides")
    )
    made = Budget(tuple(lines), ram, context, chunk, streamed, slots, slot_bytes, total, "f32")
    if ram is not None and (slots < min(total, config.num_experts_per_tok) or made.nbytes > ram):
        table = ", ".join(f"{name} {size}" for name, size, _ in made.rows()[:-1])
        raise DeviceError(
            f"the ONNX backend needs {format_bytes(made.nbytes)} ({made.nbytes} bytes), --ram "
            f"allows {format_bytes(ram)} ({table})",
            f"allow {format_bytes(made.nbytes)}, use a smaller --context, or --backend ggml",
        )
    return made


def _graph_bytes(config: MimoConfig, manifest: Manifest) -> tuple[int, int, int, int]:
    """(weights of layers and head, of MTP blocks, largest file, sessions)."""
    assert manifest.onnx is not None
    mtp_names = {mtp_name(depth) for depth in range(config.num_mtp_layers)}
    layers = mtp = largest = sessions = 0
    for name, component in manifest.onnx.components.items():
        if CPU_VARIANT not in component.variants:
            continue
        if name.startswith("mtp_") and name not in mtp_names:
            continue  # blocks that are not loaded
        sessions += 1
        if name == EMBED:
            continue  # rows are read from the mapped file
        size = manifest.files[f"{FOLDER}/{name}/{CPU_VARIANT}/{DATA_NAME}"].size
        largest = max(largest, size)
        if name in mtp_names:
            mtp += size
        else:
            layers += size
    return layers, mtp, largest, sessions


def kv_bytes(config: MimoConfig, context: int) -> int:
    """Bytes of a full cache: global rows, rings, all f32; and a global layer once more, which is
    copied when it grows."""
    total = largest = 0
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec = config.layer(index)
        row = 4 * spec.num_key_value_heads * (config.head_dim + config.v_head_dim)
        if spec.window is None:
            total += row * context
            largest = max(largest, row * context)
        else:
            spare = MAX_DRAFT if index < config.num_hidden_layers else 0
            total += row * min(context, spec.window + spare)
    return total + largest


def most_sliding(config: MimoConfig) -> int:
    """Most sliding layers of one graph."""
    found = shards(config, LAYERS_PER_SHARD)
    return max(sum(config.layer(n).sliding for n in shard.layers) for shard in found)


def pass_bytes(config: MimoConfig, context: int, chunk: int) -> int:
    """An upper bound on what passes of up to `chunk` tokens take: arrays bound to graphs, what a
    graph holds while it runs, routed experts between them."""
    c, t = config, min(chunk, context)
    run = min(t, RUN_ROWS)
    ring = c.sliding_window + MAX_DRAFT + t if any(c.hybrid_layer_pattern) else 0
    full = context if not all(c.hybrid_layer_pattern) else 0
    groups = max(c.num_key_value_heads, c.swa_num_key_value_heads or 0)
    heads, width = c.num_attention_heads, c.hidden_size
    masks = 4 * t * (ring + full)
    row = 4 * groups * (c.head_dim + c.v_head_dim)
    # columns of a long pass, and of every sliding layer the rows its ring will get
    shared = most_sliding(config)
    gathered = row * ring * shared + row * min(ring, t) * sum(c.hybrid_layer_pattern)
    scores = _SCORE_COPIES * 4 * heads * run * (max(ring, full) + 1)
    qkv = heads * c.head_dim + groups * (c.head_dim + c.v_head_dim)
    attention = scores + 4 * run * (3 * qkv + 4 * width + 2 * heads * c.v_head_dim) + row * ring
    feed = 4 * run * (4 * width + 4 * c.intermediate_size)
    total = masks + gathered + 6 * 4 * width * t + max(attention, feed)
    total += 4 * (c.vocab_size + 2 * width) * (MAX_DRAFT + 1)
    if c.n_routed_experts:
        pairs = t * c.num_experts_per_tok
        total += 4 * width * (pairs + 16 + 3 * t)
        total += 6 * (3 * width + 3 * c.moe_intermediate_size) * min(1024, pairs)
    return total + (4 << 20)
