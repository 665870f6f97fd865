"""Weights that stay in RAM: every tensor of a model in ggml buffers, in the order that suits it.

q, k and v are stored as one matrix when their formats agree, so that a token quantises its
activations once and waits for the other threads once; where only some rows need a query (MTP
blocks, the last layer) q stays alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from mimo_edge.config import LayerSpec
from mimo_edge.errors import BundleError
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Tensor
from mimo_edge.runtimes.ggml.raw import RawTensor, RawTensors, raw_tensor, unpack
from mimo_edge.runtimes.ggml.row_counts import computed_rows
from mimo_edge.runtimes.ggml.rows import RowCheck
from mimo_edge.runtimes.ggml.weight_buffers import WeightBuffers

# No more than the reader of its rows may keep of them anyway.
SMALL_TABLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Projection:
    """One matrix holding the rows of `parts` ("q", "k", "v") below each other, and its bias."""

    parts: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class SwiGlu:
    """gate, up {M, F} and down {F, M}; of routed experts {.., E}."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class MtpWeights:
    """What an MTP block has besides a decoder layer."""

    eh_proj: Tensor
    enorm: Tensor
    hnorm: Tensor
    output_norm: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """One decoder layer or MTP block; a MoE layer without `experts` has them streamed."""

    spec: LayerSpec
    attn_norm: Tensor
    projections: tuple[Projection, ...]
    attn_output: Tensor
    sinks: Tensor | None
    ffn_norm: Tensor
    dense: SwiGlu | None
    router: Tensor | None
    router_bias: Tensor | None
    experts: SwiGlu | None
    mtp: MtpWeights | None

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What every row is multiplied by, routed experts left out."""
        dense = (self.dense.gate, self.dense.up, self.dense.down) if self.dense is not None else ()
        router = (self.router,) if self.router is not None else ()
        projections = [projection.weight for projection in self.projections]
        return (*projections, self.attn_output, *dense, *router)


@dataclass(frozen=True)
class ModelWeights:
    """The model as tensors. Rows of a large embedding table come from the file; a small `table` is
    here, and graphs look up tokens themselves."""

    layers: tuple[BlockWeights, ...]
    mtp: tuple[BlockWeights, ...]
    output_norm: Tensor
    output: Tensor
    table: Tensor | None


class ResidentWeights(WeightBuffers):
    """Loads a whole model into buffers and owns them. `model` names the tensors."""

    def __init__(
        self,
        device: Device,
        source: RawTensors,
        rows: RowCheck,
        *,
        repack: bool = True,
        streamed: Collection[int] = (),
    ) -> None:
        """`rows` tells how matrices multiply the rows of a verify. `streamed`: layers whose routed
        experts are left out.

        Raises BundleError on missing or misshapen tensors, BackendError when memory is short.
        """
        c = source.config
        blocks = c.num_hidden_layers + c.num_mtp_layers
        super().__init__(device, source, 32 * blocks + 64, repack=repack)
        self._streamed = frozenset(streamed)
        try:
            self.model = self._describe()
            self._load()
            self._keep_rows_exact(rows)
            self._choose_computed_rows()
        except BaseException:
            self.close()
            raise

    def _keep_rows_exact(self, check: RowCheck) -> None:
        """Tell the matrices a verify multiplies by how to. Experts take rows one by one as it is,
        and what MTP blocks compute is checked by the verify."""
        for w in self.model.layers:
            for weight in w.matrices:
                weight.rows = check.weight(weight)
        self.model.output.rows = check.weight(self.model.output)

    def _choose_computed_rows(self) -> None:
        """Tell reordered matrices how many rows to compute for a few, where every number gives a
        row the same bits. Of MTP blocks no bits matter: they only propose."""
        kinds: dict[tuple[int, int], list[Tensor]] = {}
        for w in (*self.model.layers, *self.model.mtp):
            for weight in w.matrices:
                buffer = ggml.TensorStruct.from_address(weight.pointer).buffer
                reordered = self._kinds[buffer] is not self._device.plain
                if reordered and weight.rows.together == VERIFY_ROWS:
                    kinds.setdefault((buffer, weight.type), []).append(weight)
        for weights in kinds.values():
            computed = computed_rows(self._device, weights)
            for weight in weights:
                weight.rows = weight.rows._replace(computed=computed)

    # --- describing ---

    def _describe(self) -> ModelWeights:
        c = self._config
        trunk, total = c.num_hidden_layers, c.num_hidden_layers + c.num_mtp_layers
        head = "token_embd.weight" if c.tie_word_embeddings else "output.weight"
        return ModelWeights(
            layers=tuple(self._block(i) for i in range(trunk)),
            mtp=tuple(self._block(i) for i in range(trunk, total)),
            output_norm=self._vector("output_norm.weight"),
            output=self._matrix(head),
            table=self._table(),
        )

    def _table(self) -> Tensor | None:
        raw = self._get("token_embd.weight")
        return self._add([raw]) if raw.nbytes <= SMALL_TABLE_BYTES else None

    def _block(self, index: int) -> BlockWeights:
        c, p = self._config, f"blk.{index}."
        spec = c.layer(index)
        is_mtp = index >= c.num_hidden_layers
        crops_queries = is_mtp or index == c.num_hidden_layers - 1
        bias = p + "exp_probs_b.bias"
        resident = spec.moe and index not in self._streamed
        return BlockWeights(
            spec=spec,
            attn_norm=self._vector(p + "attn_norm.weight"),
            projections=tuple(self._projections(p, crops_queries)),
            attn_output=self._matrix(p + "attn_output.weight"),
            sinks=self._vector(p + "attn_sinks.weight") if spec.sinks else None,
            ffn_norm=self._vector(p + "ffn_norm.weight"),
            dense=None if spec.moe else self._swiglu(p, "", False),
            router=self._add([self._as_f32(p + "ffn_gate_inp.weight")]) if spec.moe else None,
            router_bias=self._vector(bias, zeros=True) if spec.moe else None,
            experts=self._swiglu(p, "_exps", True) if resident else None,
            mtp=self._mtp(p) if is_mtp else None,
        )

    def _mtp(self, p: str) -> MtpWeights:
        return MtpWeights(
            eh_proj=self._matrix(p + "nextn.eh_proj.weight"),
            enorm=self._vector(p + "nextn.enorm.weight"),
            hnorm=self._vector(p + "nextn.hnorm.weight"),
            output_norm=self._vector(p + "layer_output_norm.weight"),
        )

    def _swiglu(self, p: str, suffix: str, routed: bool) -> SwiGlu:
        gate, up, down = (
            self._matrix(f"{p}ffn_{part}{suffix}.weight", routed=routed)
            for part in ("gate", "up", "down")
        )
        return SwiGlu(gate, up, down)

    def _projections(self, p: str, crops_queries: bool) -> Iterator[Projection]:
        parts = {part: self._get(f"{p}attn_{part}.weight") for part in "qkv"}
        groups = [("q",), ("k", "v")] if crops_queries else [("q", "k", "v")]
        for group in groups:
            same = len({parts[part].ggml_type for part in group}) == 1
            for members in [group] if same else [(part,) for part in group]:
                bias = None
                if self._config.attention_bias:
                    bias = self._add([self._as_f32(f"{p}attn_{m}.bias") for m in members])
                weight = self._add([parts[m] for m in members], matrix=True)
                yield Projection(members, weight, bias)

    def _vector(self, name: str, zeros: bool = False) -> Tensor:
        if zeros and not self._source.has(name):
            values = np.zeros(self._shapes[name], np.float32)
            return self._add([raw_tensor(name, 0, values.shape, values.view(np.uint8))])
        return self._add([self._as_f32(name)])

    def _as_f32(self, name: str) -> RawTensor:
        """Norms, sinks, biases and routers compute in f32 whatever the file stores."""
        raw = self._get(name)
        values = unpack(raw)
        if not np.isfinite(values).all():
            # A bias or sink that is not finite would misroute tokens and leave every result finite.
            bad = int(np.argmin(np.isfinite(values)))
            raise BundleError(f"{name} holds NaN or Inf at element {bad}", "export the model again")
        if raw.ggml_type == ggml.TYPE_F32:
            return raw
        return raw_tensor(name, ggml.TYPE_F32, raw.shape, values.view(np.uint8).reshape(-1))
