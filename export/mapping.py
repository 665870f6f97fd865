"""Which source tensors make up which canonical (GGUF) tensor: everything accounted for.

`plan_tensors` looks at names, dtypes and shapes only, so it takes seconds for the 73,081
entries of V2.5. Each source tensor ends used, skipped with a reason, or in an error. A plan
knows how to load itself in row groups; experts load one at a time.

Canonical choices (spec section 5): a fused qkv_proj is regrouped to [Q | K | V]; the qkv of a
V2 MTP block is always planned fused, because llama.cpp's MTP graph has no split form; the value
scale is metadata and NOT folded into any weight. MiMo-7B's `nextn.eh_proj` keeps the column
order of its input_proj, [hidden ; embedding], the reverse of V2's [embedding ; hidden].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import CheckpointError
from mimo_edge.export.checkpoint import FP8, Checkpoint
from mimo_edge.export.fp8 import U8
from mimo_edge.quant.roles import Role

F32 = NDArray[np.float32]

_PLAIN = frozenset({"BF16", "F16", "F32"})
_SHOWN = 12  # names shown in an error

# Source tensors the text model does not use, by name, with the reason.
_SKIPPED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(model\.)?(visual|vision\w*)\."), "vision tower: the text model does not use it"),
    (re.compile(r"(model\.)?audio\w*\."), "audio tower: the text model does not use it"),
    (re.compile(r"(model\.)?speech\w*\."), "speech embeddings: the text model does not use them"),
    (re.compile(r".*\.rotary_emb\.inv_freq"), "rotary frequencies are computed from the config"),
)


class Canonical(Protocol):
    """What a layout needs to know of a canonical tensor: a plan of a checkpoint's, or one that
    only a config calls for."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def layer(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start..stop-1 of a source tensor."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One canonical tensor and where its values come from.

    `shape` is [out, in], [E, out, in] for a stack of experts, or [n]. `layer` is None outside
    the layers. `sources` are the weights it is made of (one per expert for a stack), not their
    scales. `dtypes` are the source dtypes as stored; `mxfp4` says that experts can be passed
    through code for code.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    dtypes: tuple[str, ...]
    rows: tuple[Rows, ...] = field(repr=False, default=())

    @property
    def is_expert_stack(self) -> bool:
        return self.role is Role.EXPERT

    @property
    def mxfp4(self) -> bool:
        return self.is_expert_stack and self.dtypes == ("U8",)

    def load(self, checkpoint: Checkpoint) -> F32:
        """The whole tensor, f32 of `shape`. For tables that are too large use load_rows."""
        return self.load_rows(checkpoint, 0, self.shape[0])

    def load_rows(self, checkpoint: Checkpoint, start: int, stop: int) -> F32:
        """Rows start..stop-1, f32 [stop - start, ...]; peak memory is the result plus ~50 MiB.

        Raises CheckpointError on damaged data and for a stack of experts (see load_expert).
        """
        if self.is_expert_stack:
            raise CheckpointError(f"{self.name} is a stack of experts", "load them one at a time")
        if not 0 <= start <= stop <= self.shape[0]:
            raise CheckpointError(f"rows {start}..{stop} of {self.name}, which has {self.shape[0]}")
        values = np.empty((stop - start, *self.shape[1:]), dtype=np.float32)
        offset = 0  # canonical row that the part begins at
        for part in self.rows:
            size = part.stop - part.start
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                shift = part.start - offset
                target = values[first - start : last - start]
                checkpoint.read_rows(part.source, first + shift, last + shift, target)
            offset += size
        return values

    def load_expert(self, checkpoint: Checkpoint, expert: int) -> F32:
        """One expert of a stack, f32 [out, in]."""
        return checkpoint.read(self._expert_source(expert))

    def expert_mxfp4(self, checkpoint: Checkpoint, expert: int) -> tuple[U8, U8]:
        """One MXFP4 expert as stored: codes u8 [out, in/2] with the low nibble the even column,
        E8M0 scales u8 [out, in/32]. Raises CheckpointError unless `mxfp4`."""
        return checkpoint.read_mxfp4(self._expert_source(expert))

    def _expert_source(self, expert: int) -> str:
        if not self.is_expert_stack:
            raise CheckpointError(f"{self.name} holds no experts")
        if not 0 <= expert < len(self.sources):
            raise CheckpointError(f"expert {expert} of {self.name}, which has {len(self.sources)}")
        return self.sources[expert]


@dataclass(frozen=True)
class TensorMapping:
    """Every canonical tensor in writing order, and what was left out and why."""

    tensors: list[TensorPlan]
    skipped: dict[str, str]  # source tensor -> reason

    def skipped_by_reason(self) -> dict[str, int]:
        """How many source tensors each reason left out, in the order they come."""
        return dict(Counter(self.skipped.values()))

    def __getitem__(self, name: str) -> TensorPlan:
        try:
            return self._by_name[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name!r} in this model") from None

    @cached_property
    def _by_name(self) -> dict[str, TensorPlan]:
        return {plan.name: plan for plan in self.tensors}


def plan_tensors(checkpoint: Checkpoint) -> TensorMapping:
    """Account for every tensor of a checkpoint.

    Order: embedding, then layer by layer with the MTP blocks last, then final norm and head.
    Raises CheckpointError listing tensors that are missing or unknown, or naming one of a wrong
    shape or dtype with both.
    """
    c = checkpoint.config
    experts = 3 * c.n_routed_experts * sum(c.moe_layer_freq)
    if experts > 4 * len(checkpoint.tensors) + 10_000:  # before listing millions of names
        raise CheckpointError(
            f"config.json calls for {experts} expert tensors, the checkpoint has "
            f"{len(checkpoint.tensors)} tensors in all"
        )
    wanted = list(_wanted(c))
    missing = [s for w in wanted for s in w.sources if s not in checkpoint.tensors]
    used = {s for w in wanted for s in w.sources}
    skipped: dict[str, str] = {}
    unknown = []
    for name in checkpoint.tensors:
        if name in used or _weight_of(name) in used:
            continue
        reason = _skip_reason(name, c)
        if reason is None:
            unknown.append(name)
        else:
            skipped[name] = reason
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing: {_list(missing)}"
            + (f"; {len(unknown)} are unknown: {_list(unknown)}" if unknown else ""),
            "the checkpoint is incomplete or its config.json belongs to another model",
        )
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors are neither used nor known to be skippable: {_list(unknown)}",
            "this model needs a newer mimo-edge",
        )
    plans = [_plan(want, checkpoint) for want in wanted]
    scales = {s.name for w in wanted for n in w.sources if (s := checkpoint.scale_of(n))}
    known = used | scales | skipped.keys()
    if stray := [name for name in checkpoint.tensors if name not in known]:
        raise CheckpointError(f"{len(stray)} scales belong to no scaled weight: {_list(stray)}")
    return TensorMapping(plans, skipped)


def canonical_tensors(config: MimoConfig) -> list[Canonical]:
    """Every tensor an export of such a model writes, in writing order, from the config alone."""
    return list(_wanted(config))


@dataclass(frozen=True, slots=True)
class _Want:
    """A canonical tensor that the config calls for. `parts` are rows of each source."""

    name: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    parts: tuple[int, ...]

    @property
    def width(self) -> tuple[int, ...]:
        return self.shape[-1:] if len(self.shape) > 1 else ()


def _wanted(c: MimoConfig) -> Iterator[_Want]:
    def top(name: str, role: Role, source: str, *shape: int) -> _Want:
        return _Want(name, role, shape, None, (source,), shape[:1])

    embedding = "model.embed_tokens.weight"
    yield top("token_embd.weight", Role.EMBEDDING, embedding, c.vocab_size, c.hidden_size)
    for index in range(c.num_hidden_layers + c.num_mtp_layers):
        yield from _wanted_of_layer(c, c.layer(index))
    yield top("output_norm.weight", Role.NORM, "model.norm.weight", c.hidden_size)
    head = embedding if c.tie_word_embeddings else "lm_head.weight"
    yield top("output.weight", Role.HEAD, head, c.vocab_size, c.hidden_size)


def _wanted_of_layer(c: MimoConfig, spec: LayerSpec) -> Iterator[_Want]:
    depth = spec.index - c.num_hidden_layers
    mtp, v2 = depth >= 0, c.family == "mimo_v2"
    prefix = f"model.layers.{spec.index}."
    if mtp:
        prefix = f"model.mtp.layers.{depth}." if v2 else f"model.mtp_layers.{depth}."
    block = f"blk.{spec.index}."

    def want(name: str, role: Role, source: str, *shape: int) -> _Want:
        return _Want(block + name, role, shape, spec.index, (prefix + source,), shape[:1])

    m, width, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads
    attention, ffn = (Role.MTP, Role.MTP) if mtp else (Role.ATTENTION, Role.DENSE_FFN)
    if mtp:
        # MiMo-7B calls the embedding's norm token_layernorm and the state's hidden_layernorm.
        e, h, eh = "enorm", "hnorm", "eh_proj"
        if not v2:
            e, h, eh = "token_layernorm", "hidden_layernorm", "input_proj"
        yield want("nextn.eh_proj.weight", Role.MTP, eh + ".weight", m, 2 * m)
        yield want("nextn.enorm.weight", Role.NORM, e + ".weight", m)
        yield want("nextn.hnorm.weight", Role.NORM, h + ".weight", m)
    yield want("attn_norm.weight", Role.NORM, "input_layernorm.weight", m)

    groups = spec.num_key_value_heads
    rows = {"q": heads * c.head_dim, "k": groups * c.head_dim, "v": groups * c.v_head_dim}
    split = tuple(f"{prefix}self_attn.{p}_proj.weight" for p in rows)
    if c.fused_qkv or (mtp and v2):
        sources = (prefix + "self_attn.qkv_proj.weight",) if c.fused_qkv else split
        parts = (sum(rows.values()),) if c.fused_qkv else tuple(rows.values())
        shape = (sum(rows.values()), m)
        yield _Want(block + "attn_qkv.weight", attention, shape, spec.index, sources, parts)
    else:
        for p, size in rows.items():
            yield want(f"attn_{p}.weight", attention, f"self_attn.{p}_proj.weight", size, m)
    if c.attention_bias:
        for p, size in rows.items():
            yield want(f"attn_{p}.bias", Role.BIAS, f"self_attn.{p}_proj.bias", size)
    if spec.sinks:
        yield want("attn_sinks.weight", Role.SINKS, "self_attn.attention_sink_bias", heads)
    output = heads * c.v_head_dim
    yield want("attn_output.weight", attention, "self_attn.o_proj.weight", m, output)

    norm = "pre_mlp_layernorm" if mtp and v2 else "post_attention_layernorm"
    yield want("ffn_norm.weight", Role.NORM, norm + ".weight", m)
    if spec.moe:
        experts, inner = c.n_routed_experts, c.moe_intermediate_size
        yield want("ffn_gate_inp.weight", Role.ROUTER, "mlp.gate.weight", experts, m)
        bias = "mlp.gate.e_score_correction_bias"
        yield want("exp_probs_b.bias", Role.ROUTER_BIAS, bias, experts)
        for p, out, into in (("gate", inner, m), ("up", inner, m), ("down", m, inner)):
            sources = tuple(f"{prefix}mlp.experts.{e}.{p}_proj.weight" for e in range(experts))
            name, shape3 = f"{block}ffn_{p}_exps.weight", (experts, out, into)
            yield _Want(name, Role.EXPERT, shape3, spec.index, sources, (out,) * experts)
    else:
        for p, out, into in (("gate", width, m), ("up", width, m), ("down", m, width)):
            yield want(f"ffn_{p}.weight", ffn, f"mlp.{p}_proj.weight", out, into)
    if mtp:
        yield want("layer_output_norm.weight", Role.NORM, "final_layernorm.weight", m)


def _plan(want: _Want, checkpoint: Checkpoint) -> TensorPlan:
    """Check the sources of one tensor and say which of their rows it takes."""
    expert = want.role is Role.EXPERT
    packed = expert and checkpoint.config.quantization.expert_store == "mxfp4"
    allowed = {"U8"} if packed else _PLAIN | ({FP8} if len(want.shape) > 1 else set())
    if want.role is Role.ROUTER:
        allowed = _PLAIN  # the router is computed in f32 and never stored scaled
    rows: list[Rows] = []
    dtypes = set()
    for source, size in zip(want.sources, want.parts, strict=True):
        stored = checkpoint.stored(source)
        if stored.dtype not in allowed:
            raise CheckpointError(
                f"{source} is {stored.dtype}, expected {' or '.join(sorted(allowed))}"
            )
        expected: tuple[int, ...] = (size, *want.width)
        if packed:
            expected = (size, want.width[0] // 2)
        if stored.shape != expected:
            raise CheckpointError(
                f"{source} has shape {list(stored.shape)}, expected {list(expected)}"
            )
        checkpoint.scale_of(source)
        dtypes.add(stored.dtype)
        layout = checkpoint.qkv_layout(source)
        if layout is not None:
            rows += [Rows(source, start, stop) for start, stop in layout.regrouped()]
        elif not expert:
            rows.append(Rows(source, 0, size))
    return TensorPlan(
        name=want.name,
        role=want.role,
        shape=want.shape,
        layer=want.layer,
        sources=want.sources,
        dtypes=tuple(sorted(dtypes)),
        rows=tuple(rows),
    )


def _weight_of(name: str) -> str:
    """The weight a scale belongs to; any other name unchanged."""
    return name.removesuffix("_inv").removesuffix("_scale")


def _skip_reason(name: str, config: MimoConfig) -> str | None:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "tie_word_embeddings: the head is the embedding"
    for pattern, reason in _SKIPPED:
        if pattern.match(name):
            return reason
    return None


def _list(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
