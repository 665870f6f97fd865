"""The memory budget: every large allocation of a ggml model, in bytes, before it is loaded.

`plan` adds up what must be there whatever happens (the process, weights, KV cache, graphs) and
gives what is left to the slots of routed experts. When even one token's experts do not fit, it
refuses with the whole table. The bound is on the process: a memory cgroup of that size never
kills it. One conversation is planned for; every further one needs its KV cache and graphs again,
which `idle_bytes` reserves.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_edge.config import MimoConfig
from mimo_edge.errors import DeviceError
from mimo_edge.experts.reader import COALESCE_BYTES, DEFAULT_LANES, part_bytes
from mimo_edge.gguf_file import TensorInfo
from mimo_edge.kv_format import (
    DEFAULT_KV_TYPE,
    KV_FORMATS,
    SMALL_KV_BYTES,
    check_kv_type,
    fitting_kv_type,
    ring_slots,
    ring_type,
)
from mimo_edge.speculative import FILL_ROWS, MAX_DRAFT
from mimo_edge.units import format_bytes, round_up

PAGE = mmap.PAGESIZE
# Python, NumPy and our own code with a tokenizer, where it is not known what they take.
PROCESS_BYTES = 96 << 20
# What the backend's libraries, the graphs' Python side and short-lived arrays add to that.
LIBRARY_BYTES = 32 << 20
# Pages of the model file that are in memory at a time: the header, and what is read ahead.
FILE_PAGES_BYTES = 12 << 20
# The part of the bound that is kept for what grows with it.
RESERVE_PART = 256
CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
DEFAULT_CHUNK = 512
# Graphs of few tokens that a cache keeps, one more while a new one replaces an old, and the bytes
# they may take together; it keeps one of many tokens, and those that start MTP blocks where their
# inputs are small (runtimes/ggml/kept_graphs.py).
_SMALL_GRAPHS, _SMALL_TOKENS, SMALL_GRAPH_BYTES = 49, 16, 24 << 20
_LARGE_INPUT_BYTES = 512 << 10
# Pairs of token and expert that one graph computes (runtimes/ggml/streamed.py), and rows of one
# expert (runtimes/ggml/expert_matrix.py).
_MAX_PAIRS, _PAIR_STEP, _MAX_ROWS = 1024, 16, 512
# A tensor's description with its place in the graph, and how many an MoE or dense block has.
_NODE_BYTES, _BLOCK_NODES = 512, 64
# The guess of a layer's route in a pass of few tokens (runtimes/ggml/look_ahead.py).
_GUESS_NODES = 16
# and how many more a row of a verify takes where ggml's router and attention do not give rows of
# several the bits of one (runtimes/ggml/passes.py)
_APART_NODES = 17
# What direct reads may have to be aligned to, where no file was asked yet.
_DIRECT_UNIT = PAGE
# The largest alignment for which FlashFile grows a bounce buffer, at both ends.
_BOUNCE_SPARE = 2 * 65536
_PARTS = ("gate", "up", "down")
IDLE = "idle sessions"


@dataclass(frozen=True)
class Line:
    """One entry of the table."""

    name: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Budget:
    """What a model takes. `streamed`: routed experts come from flash into `slots` of
    `slot_bytes` each; otherwise all weights are resident. `chunk` is the prefill chunk, `ram`
    the bound (None: none was asked for)."""

    lines: tuple[Line, ...]
    ram: int | None
    context: int
    chunk: int
    streamed: bool
    slots: int = 0
    slot_bytes: int = 0
    experts: int = 0  # routed experts of all layers
    kv_type: str = DEFAULT_KV_TYPE

    @property
    def nbytes(self) -> int:
        """Sum of the lines."""
        return sum(line.nbytes for line in self.lines)

    @property
    def conversations(self) -> int | None:
        """How many conversations of `context` tokens there is room for; None without a bound."""
        if self.ram is None:
            return None
        each = sum(line.nbytes for line in self.lines if line.name in ("KV cache", "graphs"))
        return 1 + (self.idle_bytes or 0) // max(1, each)

    @property
    def idle_bytes(self) -> int | None:
        """Bytes that caches of conversations may hold which are not being computed: what is
        reserved for them, and what is left. None without a bound, unless some are reserved."""
        reserved = sum(line.nbytes for line in self.lines if line.name == IDLE)
        if self.ram is None:
            return reserved or None
        return reserved + max(0, self.ram - self.nbytes)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, size, note) of every line and the total, for people."""
        rows = [(line.name, format_bytes(line.nbytes), line.note) for line in self.lines]
        bound = "" if self.ram is None else f"of {format_bytes(self.ram)}"
        return [*rows, ("total", format_bytes(self.nbytes), bound)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "ram": self.ram,
            "context": self.context,
            "chunk": self.chunk,
            "streamed": self.streamed,
            "slots": self.slots,
            "slot_bytes": self.slot_bytes,
            "experts": self.experts,
            "kv_type": self.kv_type,
            "lines": {line.name: line.nbytes for line in self.lines},
            "total": self.nbytes,
        }


@dataclass(frozen=True)
class Shortfall:
    """A model that does not fit its bound: `budget` is its table, `need_bytes` would do."""

    budget: Budget
    need_bytes: int
    why: str


def plan(
    config: MimoConfig,
    tensors: Mapping[str, TensorInfo],
    context: int,
    ram: int | None = None,
    *,
    lanes: int = DEFAULT_LANES,
    process_bytes: int | None = None,
    kv_type: str = DEFAULT_KV_TYPE,
    idle_bytes: int = 0,
) -> Budget:
    """The budget of a model, as `fit`. Raises DeviceError with the table when `ram` is too small,
    UsageError when the format does not fit the model."""
    found = fit(
        config,
        tensors,
        context,
        ram,
        lanes=lanes,
        process_bytes=process_bytes,
        kv_type=kv_type,
        idle_bytes=idle_bytes,
    )
    if isinstance(found, Shortfall):
        raise _too_small(found)
    return found


def fit(
    config: MimoConfig,
    tensors: Mapping[str, TensorInfo],
    context: int,
    ram: int | None = None,
    *,
    lanes: int = DEFAULT_LANES,
    process_bytes: int | None = None,
    kv_type: str = DEFAULT_KV_TYPE,
    idle_bytes: int = 0,
) -> Budget | Shortfall:
    """The budget of a model with `tensors` for conversations of `context` tokens in a KV cache of
    format `kv_type`, or what it lacks.

    Without `ram`, or when everything fits, all weights are resident. `process_bytes`: what this
    process holds already, `idle_bytes`: reserved for caches of conversations that wait. Raises
    UsageError when the format does not fit the model.
    """
    check_kv_type(kv_type, config)
    context = min(context, config.max_position_embeddings)
    base = (PROCESS_BYTES if process_bytes is None else process_bytes) + LIBRARY_BYTES
    routed = {name for name in tensors if _is_routed(name)}
    fixed = [
        Line("process", base, "Python, libraries, tokenizer"),
        Line("file pages", FILE_PAGES_BYTES, "header, embedding rows"),
        *_weight_lines(config, tensors),
        *idle_lines(idle_bytes),
        Line("KV cache", kv_bytes(config, context, kv_type), f"{context} tokens, {kv_type}"),
    ]
    experts = sum(tensors[name].nbytes for name in routed)
    graphs = graph_bytes(config, context, DEFAULT_CHUNK, False, kv_type)
    # The largest tensor is read in one piece; cache and graphs come into being after that.
    loading = _loading_bytes(tensors, routed=True) - fixed[-1].nbytes - graphs
    whole = [
        *fixed,
        *([Line("experts", experts, "all of them")] if experts else []),
        Line("graphs", graphs, _chunk(DEFAULT_CHUNK)),
        Line("loading", max(0, loading), "the largest tensor, beyond cache and graphs"),
    ]
    resident = Budget(tuple(whole), ram, context, DEFAULT_CHUNK, False, kv_type=kv_type)
    if ram is None or resident.nbytes <= ram:
        return resident
    if not routed:
        return Shortfall(resident, resident.nbytes, "it has no experts to leave on flash")
    return _streamed(config, tensors, fixed, context, ram, lanes, kv_type)


def _streamed(
    config: MimoConfig,
    tensors: Mapping[str, TensorInfo],
    fixed: list[Line],
    context: int,
    ram: int,
    lanes: int,
    kv_type: str,
) -> Budget | Shortfall:
    layers = [spec.index for spec in config.layers if spec.moe]
    slot_bytes, bounce = slot_sizes(config, tensors)
    fixed = [
        *fixed,
        Line("read lanes", lanes * (bounce + COALESCE_BYTES), f"{lanes} lanes"),
        # The pool's regions end on huge pages; the kernel's page tables come on top: 8 bytes for
        # 4096 in small pages, which is half of the share.
        Line("reserve", (8 << 20) + ram // RESERVE_PART, "page tables, fragmentation"),
    ]
    room = ram - sum(line.nbytes for line in fixed)
    total = config.n_routed_experts * len(layers)
    chosen = config.num_experts_per_tok
    # A chunk costs one pass over the experts, so it is as large as a quarter of the room allows.
    graphs = {size: graph_bytes(config, context, size, True, kv_type) for size in CHUNKS}
    chunk = next((size for size in CHUNKS if graphs[size] <= room // 4), CHUNKS[-1])
    slots = min(total, max(0, room - graphs[chunk]) // slot_bytes)
    lines = [
        *fixed,
        Line("graphs", graphs[chunk], _chunk(chunk)),
        Line(
            "expert slots",
            max(slots, chosen) * slot_bytes,
            f"{max(slots, chosen)} of {total} experts, {format_bytes(slot_bytes)} each",
        ),
    ]
    budget = Budget(tuple(lines), ram, context, chunk, True, slots, slot_bytes, total, kv_type)
    if slots < chosen:
        return Shortfall(
            budget, budget.nbytes, f"a token needs {chosen} experts of a layer at once"
        )
    # Slots, cache and graphs take memory only once the weights are there.
    held = {"process", "file pages", "weights", "MTP"}
    loading = _loading_bytes(tensors, routed=False)
    need = sum(line.nbytes for line in lines if line.name in held) + loading
    if need > ram:
        why = f"loading takes {format_bytes(loading)} for the largest tensor besides"
        return Shortfall(budget, need, why)
    return budget


def slot_sizes(config: MimoConfig, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(bytes of a slot for any routed expert, bytes of the buffer a read lane needs)."""
    layers = [spec.index for spec in config.layers if spec.moe]
    slot_bytes, bounce = 0, 0
    for part in _PARTS:
        infos = [tensors[f"blk.{i}.ffn_{part}_exps.weight"] for i in layers]
        sizes = [info.nbytes // config.n_routed_experts for info in infos]
        slot_bytes += round_up(max(sizes), PAGE)
        if any(
            t.offset % _DIRECT_UNIT or n % _DIRECT_UNIT for t, n in zip(infos, sizes, strict=True)
        ):
            parts = (part_bytes(size) for size in sizes)
            bounce = max(bounce, max(*parts, COALESCE_BYTES) + _BOUNCE_SPARE)
    return slot_bytes, bounce


def idle_lines(idle_bytes: int) -> list[Line]:
    """The line of what is reserved for conversations that wait, if anything is."""
    return [Line(IDLE, idle_bytes, "caches of conversations that wait")] if idle_bytes else []


def _too_small(found: Shortfall) -> DeviceError:
    budget, need = found.budget, found.need_bytes
    assert budget.ram is not None
    table = ", ".join(f"{name} {size}" for name, size, _ in budget.rows()[:-1])
    return DeviceError(
        f"the ggml backend needs {format_bytes(need)} ({need} bytes), --ram allows "
        f"{format_bytes(budget.ram)} ({table}; {found.why})",
        f"allow {format_bytes(need)}, or use a smaller --context or recipe",
    )


# --- the lines ---------------------------------------------------------------------------------

_TABLE = "token_embd.weight"
# A table up to this size is resident (runtimes/ggml/resident.py).
_SMALL_TABLE_BYTES = 4 << 20


def _is_routed(name: str) -> bool:
    return name.endswith(tuple(f".ffn_{part}_exps.weight" for part in _PARTS))


def _weight_lines(config: MimoConfig, tensors: Mapping[str, TensorInfo]) -> list[Line]:
    """What is resident besides routed experts: of vectors and routers the f32 form."""
    trunk = mtp = 0
    for name, info in tensors.items():
        if name == _TABLE and info.nbytes <= _SMALL_TABLE_BYTES:
            trunk += round_up(info.nbytes, 64)
        if _is_routed(name) or (name == _TABLE and not config.tie_word_embeddings):
            continue
        if block_index(name) >= config.num_hidden_layers + config.num_mtp_layers:
            continue  # MTP blocks that stay in the file
        nbytes = info.nbytes
        if len(info.shape) == 1 or name.endswith("ffn_gate_inp.weight"):
            elements = 1
            for extent in info.shape:
                elements *= extent
            # the f32 form in its buffer, and another copy while loading when it is converted
            nbytes = 4 * elements * (1 if info.ggml_type == 0 else 2)
        nbytes = round_up(nbytes, 64)
        if block_index(name) >= config.num_hidden_layers:
            mtp += nbytes
        else:
            trunk += nbytes
    # a layer without router bias in the file gets zeros
    trunk += 4 * config.n_routed_experts * config.num_hidden_layers
    lines = [Line("weights", trunk, "resident, without routed experts")]
    if mtp:
        blocks = config.num_mtp_layers
        lines.append(Line("MTP", mtp, "1 block" if blocks == 1 else f"{blocks} blocks"))
    return lines


def _loading_bytes(tensors: Mapping[str, TensorInfo], routed: bool) -> int:
    """Most memory that loading one tensor takes on top: its pages of the file, and q, k and v of
    a layer once more, because they are joined."""
    largest = 0
    joined: dict[int, int] = {}
    for name, info in tensors.items():
        if routed or not (_is_routed(name) or name == _TABLE):
            largest = max(largest, info.nbytes)
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_qkv.weight")):
            joined[block_index(name)] = joined.get(block_index(name), 0) + 2 * info.nbytes
    return max(largest, max(joined.values(), default=0))


def block_index(name: str) -> int:
    """The layer or MTP block a tensor belongs to, -1 when to none."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def kv_bytes(config: MimoConfig, context: int, kv_type: str = DEFAULT_KV_TYPE) -> int:
    """Bytes of the ggml backend's cache for `context` tokens, all rows written."""
    total = 0
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec = config.layer(index)
        if spec.window is None:
            kind, rows = KV_FORMATS[kv_type], round_up(context, 256)
        else:
            kind = KV_FORMATS[ring_type(kv_type)]
            mtp = index >= config.num_hidden_layers
            rows = spec.window if mtp else spec.window + MAX_DRAFT
            rows = min(context, ring_slots(rows, kv_type, mtp=mtp))
        for dim in (config.head_dim, config.v_head_dim):
            total += round_up(kind.row_bytes(spec.num_key_value_heads, dim) * rows, PAGE)
    return total


def usual_kv_type(wanted: str, config: MimoConfig, context: int) -> str:
    """Format of a cache for `context` tokens where nobody chose one: `wanted` if the model allows
    it, but f32 for f16 where that is small. Attention of narrow heads is up to four times as fast
    then: of fewer than 128 numbers per head ggml has no vector code for f16 on some processors.

    Raises UsageError on an unknown format."""
    kind = fitting_kv_type(wanted, config)
    context = min(context, config.max_position_embeddings)
    small = kv_bytes(config, context, "f32") <= SMALL_KV_BYTES
    return "f32" if kind == DEFAULT_KV_TYPE and small else kind


def graph_bytes(
    config: MimoConfig,
    context: int,
    chunk: int,
    streamed: bool,
    kv_type: str = DEFAULT_KV_TYPE,
) -> int:
    """An upper bound on the memory of passes of up to `chunk` tokens: shared scratch, the inputs
    and descriptions of every graph a cache keeps, and results on the host."""
    chunk = min(chunk, context)
    small = max(
        _pass_bytes(config, context, min(chunk, _SMALL_TOKENS), streamed),
        _pass_bytes(config, context, MAX_DRAFT + 1, streamed, _APART_NODES * (MAX_DRAFT + 1)),
        _mtp_fill_bytes(config),
    )
    kept = min(_SMALL_GRAPHS * small, SMALL_GRAPH_BYTES + 2 * small)
    if chunk > _SMALL_TOKENS:
        kept += _pass_bytes(config, context, chunk, streamed)
    host = 4 * (config.vocab_size * (MAX_DRAFT + 1) + 3 * config.hidden_size * chunk)
    return kept + host + _scratch_bytes(config, context, chunk, streamed, kv_type)


def _most_slots(rows: int) -> int:
    """Slots of a ring for `rows` rows, in the format that takes most."""
    return ring_slots(rows, "f32")


def _mtp_fill_bytes(config: MimoConfig) -> int:
    """A pass that starts all MTP blocks, where it counts as small."""
    rows = min(FILL_ROWS, config.sliding_window)
    inputs = 8 * config.hidden_size * rows
    if not config.num_mtp_layers or inputs > _LARGE_INPUT_BYTES:
        return 0
    nodes = 2 * config.num_mtp_layers * _BLOCK_NODES
    return inputs + 32 * rows + 2 * _most_slots(config.sliding_window) + _NODE_BYTES * nodes


def _pass_bytes(
    config: MimoConfig, context: int, tokens: int, streamed: bool, apart: int = 0
) -> int:
    """Inputs and descriptions of one pass (the carry of one that is cut at routers included), with
    `apart` more tensors in a block for rows computed apart."""
    width, chosen = config.hidden_size, config.num_experts_per_tok
    slots = _most_slots(config.sliding_window + MAX_DRAFT)
    ring = slots + tokens if any(config.hybrid_layer_pattern) else 0
    carried = bool(config.n_routed_experts) and (streamed or tokens > _SMALL_TOKENS)
    # embedding, and a hidden row for an MTP pass, which has no carry
    total = (4 if carried else 8) * width * tokens
    total += 2 * (round_up(context, 256) + ring) * tokens + 32 * tokens
    nodes = _BLOCK_NODES + 3 * chosen + apart
    # one for the head, one because the last block may compute two groups of rows
    total += _NODE_BYTES * nodes * (config.num_hidden_layers + 2)
    if carried:
        total += 8 * width * tokens + 4 * chosen * tokens
        total += 4 * width * (chosen * tokens + _PAIR_STEP)
        # graphs of pairs or rows: small ones, by their number
        graphs = min(160, _PAIR_STEP + tokens)
        if tokens <= _SMALL_TOKENS:
            graphs = _PAIR_STEP + -(-tokens * chosen // _PAIR_STEP)
            total += _NODE_BYTES * _GUESS_NODES * config.num_hidden_layers
        total += _NODE_BYTES * 48 * graphs
    return total


def _scratch_bytes(
    config: MimoConfig, context: int, tokens: int, streamed: bool, kv_type: str
) -> int:
    """Intermediate results of the largest graph, and ggml's work buffer."""
    c, t = config, tokens
    groups = max(c.num_key_value_heads, c.swa_num_key_value_heads or 0)
    heads, width = c.num_attention_heads, c.hidden_size
    # Values alive at once, per token: the residual stream, its norm, and what a step makes.
    qkv = heads * c.head_dim + groups * (c.head_dim + c.v_head_dim)
    attention = 3 * width + 2 * qkv + heads * c.v_head_dim
    feed = 4 * width + 3 * c.intermediate_size
    ring = _most_slots(c.sliding_window + MAX_DRAFT) + t if any(c.hybrid_layer_pattern) else 0
    # cast, and concatenated with the ring
    row = KV_FORMATS[ring_type(kv_type)].row_bytes(groups, c.head_dim + c.v_head_dim)
    rows = 0
    if c.n_routed_experts:
        per_row = 3 * width + 3 * c.moe_intermediate_size
        feed = max(feed, 3 * width + 6 * c.n_routed_experts)
        count = min(_MAX_PAIRS, round_up(t * c.num_experts_per_tok, _PAIR_STEP))
        rows = 4 * per_row * max(count, min(_MAX_ROWS, t))
        if not streamed:
            # inside the graph: small experts in a pass of any length
            feed = max(feed, 3 * width + per_row * c.num_experts_per_tok)
    logits = 4 * (c.vocab_size + width) * (MAX_DRAFT + 1)
    # ggml's work buffer: activations of one product as the weight's kernel wants them, 2 bytes each
    # at most, for f32 weights none
    widest = max(c.hidden_size, heads * c.v_head_dim, c.intermediate_size, 2 * c.hidden_size)
    work = 2 * widest * t
    if c.n_routed_experts:
        pairs = min(_MAX_PAIRS, t * c.num_experts_per_tok)
        work = max(work, 2 * max(c.hidden_size, c.moe_intermediate_size) * pairs)
        work += 16 * c.n_routed_experts * (t + 1)
    weights = 0
    if kv_type == "f32":
        # of a few queries for all rows they read, before and after softmax
        few = min(t, _SMALL_TOKENS)
        weights = 8 * few * heads * max(round_up(context, 256), ring)
    largest = max(4 * t * attention + 2 * row * ring + weights, 4 * t * feed, rows)
    return largest + logits + work + (1 << 20)


def _chunk(chunk: int) -> str:
    return f"chunks of {chunk} tokens"


def resident_bytes() -> int | None:
    """Memory this process has in RAM now; None where the system does not tell."""
    try:
        fields = Path("/proc/self/statm").read_text("ascii").split()
        return int(fields[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return None
