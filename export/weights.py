"""A checkpoint as `Weights`: what the reference backend runs on without any export."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import CheckpointError, UsageError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.mapping import TensorPlan, plan_tensors
from mimo_edge.runtimes.base import ExpertWeights, TokenIds

F32 = NDArray[np.float32]


class CheckpointWeights:
    """Reads every tensor from the checkpoint when asked and keeps none.

    Closing it closes the checkpoint. Raises CheckpointError when the checkpoint cannot be
    accounted for or its data is damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._plans: dict[str, tuple[TensorPlan, int, int]] = {}  # name -> plan, rows
        self._experts: dict[str, TensorPlan] = {}
        config = checkpoint.config
        for plan in plan_tensors(checkpoint).tensors:
            if plan.is_expert_stack:
                self._experts[plan.name] = plan
            elif plan.name.endswith(".attn_qkv.weight") and plan.layer is not None:
                heads = config.layer(plan.layer).num_key_value_heads
                sizes = {
                    "q": config.num_attention_heads * config.head_dim,
                    "k": heads * config.head_dim,
                    "v": heads * config.v_head_dim,
                }
                start = 0
                for part, size in sizes.items():
                    name = f"blk.{plan.layer}.attn_{part}.weight"
                    self._plans[name] = (plan, start, start + size)
                    start += size
            else:
                self._plans[plan.name] = (plan, 0, plan.shape[0])

    @property
    def config(self) -> MimoConfig:
        return self._checkpoint.config

    def has(self, name: str) -> bool:
        return name in self._plans or name in self._experts

    def tensor(self, name: str) -> F32:
        """f32 in [out, in] order; q, k and v always split. A stack of experts is refused."""
        if name in self._experts:
            raise CheckpointError(
                f"{name} is a stack of {self._experts[name].shape[0]} experts",
                "take them one at a time with expert()",
            )
        try:
            plan, start, stop = self._plans[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name!r} in this model") from None
        return plan.load_rows(self._checkpoint, start, stop)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start..stop of a tensor, f32 [n, in]; a vector is one row."""
        try:
            plan, first, last = self._plans[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name!r} in this model") from None
        if len(plan.shape) == 1:
            row: F32 = plan.load_rows(self._checkpoint, first, last)[None][start:stop]
            return row
        if not 0 <= start <= stop <= last - first:
            raise CheckpointError(f"rows {start}..{stop} of {name}, which has {last - first}")
        return plan.load_rows(self._checkpoint, first + start, first + stop)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        parts = []
        for part in ("gate", "up", "down"):
            plan = self._experts.get(f"blk.{layer}.ffn_{part}_exps.weight")
            if plan is None:
                raise CheckpointError(f"layer {layer} has no routed experts")
            parts.append(plan.load_expert(self._checkpoint, expert))
        return ExpertWeights(*parts)

    def embedding(self, token_ids: TokenIds) -> F32:
        """Rows of the embedding for token_ids [T] -> f32 [T, M]; neighbours are read together."""
        plan, _, _ = self._plans["token_embd.weight"]
        ids, place = np.unique(np.asarray(token_ids, dtype=np.int64), return_inverse=True)
        if ids.size and (ids[0] < 0 or ids[-1] >= plan.shape[0]):
            bad = ids[0] if ids[0] < 0 else ids[-1]
            raise UsageError(f"token id {bad} is outside the vocabulary of {plan.shape[0]}")
        rows = np.empty((ids.size, plan.shape[1]), dtype=np.float32)
        runs = np.split(np.arange(ids.size), np.flatnonzero(np.diff(ids) != 1) + 1)
        for run in runs:
            if run.size:
                first, last = int(ids[run[0]]), int(ids[run[-1]]) + 1
                rows[run[0] : run[-1] + 1] = plan.load_rows(self._checkpoint, first, last)
        result: F32 = rows[place.reshape(-1)]
        return result

    def close(self) -> None:
        self._checkpoint.close()
