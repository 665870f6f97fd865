"""What a backend is: the contract between the engine and a forward pass.

Shape letters used everywhere: B batch, T new tokens, S cached tokens, H query heads,
G KV heads, D qk head dim, Dv value head dim, W window, E experts, K chosen experts,
F expert width, V vocabulary, M hidden size.

Tensors are named as in GGUF (`blk.N.attn_q.weight`); MTP block k is `blk.{layers + k}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cache_rows import CacheLayout, LayerRows
from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig

F32 = NDArray[np.float32]
TokenIds = NDArray[np.int32]

VERIFY_ROWS = 4
"""Most tokens of a verify: three drafts, and the token before them."""
RouteSink = Callable[[int, NDArray[np.integer[Any]]], None]
"""Told, layer by layer and pass by pass, which experts a MoE layer chose: index, ids [T, K]. The
ids are only lent."""


class ExpertWeights(NamedTuple):
    """One routed expert: gate and up [F, M], down [M, F], f32."""

    gate: F32
    up: F32
    down: F32


class Weights(Protocol):
    """Dequantised weights by canonical (GGUF) name, whatever file they come from.

    `tensor` always offers split `attn_q` / `attn_k` / `attn_v` (also for MTP blocks), even
    when the file stores them fused. Routed experts come one at a time through `expert`.
    """

    @property
    def config(self) -> MimoConfig: ...

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        ...

    def tensor(self, name: str) -> F32:
        """f32 in [out, in] order (1-D for norms, sinks, biases). Raises a typed error."""
        ...

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One routed expert of a MoE layer."""
        ...

    def embedding(self, token_ids: TokenIds) -> F32:
        """Rows of token_embd for token_ids [T] -> f32 [T, M], without loading the table."""
        ...

    def close(self) -> None:
        """Release files and maps; using the object afterwards is an error."""
        ...


class Cache(Protocol):
    """KV state of one sequence: the decoder layers' rows and the MTP blocks' rings."""

    @property
    def length(self) -> int:
        """Committed tokens; the next token gets this position."""
        ...

    @property
    def capacity(self) -> int:
        """Most tokens it can hold (the context)."""
        ...

    def rollback(self, n: int) -> None:
        """Undo the last n rows of the decoder layers, exactly, or raise CacheError.

        Afterwards the next token sees every row it should; so rollback(0) tells whether a pass
        that failed half-way destroyed rows that are still needed.
        """
        ...

    @property
    def layout(self) -> CacheLayout:
        """What its rows are; caches of equal layout can take each other's."""
        ...

    def begin_mtp(self, depth: int, position: int) -> None:
        """Rows of MTP block `depth`, which has a window, begin at `position`, the next one to be
        written: none before it is held or seen any more."""
        ...

    def rows(self) -> Iterable[LayerRows]:
        """Everything that is held: of every decoder layer, then of every MTP block, the rows that
        are intact. They are only lent, each until the next one is asked for."""
        ...

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        """Become what a cache of this layout and `length` tokens was when it gave `rows`.

        Raises CacheError when this one is not empty or the rows do not fit, ContextLengthError
        when it has no room for them, and whatever `rows` raises; it is useless then."""
        ...

    def nbytes(self) -> int:
        """Bytes of rows held now."""
        ...

    def held_bytes(self) -> int:
        """Bytes held in all: rows, and what is kept to compute with them."""
        ...

    def close(self) -> None:
        """Give the memory back now. Twice is harmless; using it afterwards is an error."""
        ...


@dataclass(frozen=True)
class ForwardResult:
    """`logits` f32 [n, V] of the last n rows asked for; `hidden` f32 [m, M]: H before model.norm
    of the last m rows asked for (what MTP blocks are fed)."""

    logits: F32
    hidden: F32


class Backend(Protocol):
    """A forward pass over one model. Not thread-safe: one call at a time."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> MimoConfig: ...

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> Cache:
        """A cache for `context` tokens that can undo up to verify_rows - 1 rows."""
        ...

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        """Append T tokens [T] to `cache` and return the last rows asked for.

        To the bit, rows of a pass of up to the cache's `verify_rows` tokens (at most VERIFY_ROWS)
        are what passes of one token give, and logits do not depend on `hidden_rows`: drafting
        changes no answer. Raises ContextLengthError before touching the cache when they do not fit,
        Cancelled within a layer after `cancel` was set. A pass that fails leaves `cache.length` at
        the tokens that are complete.
        """
        ...

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        """Run MTP block `depth` on rows position..position+n-1: row i takes hidden[i] = H_i [n, M]
        and token_ids[i] = x_{i+1+depth}. Writes those rows of the block's ring (overwriting
        stale ones) and returns logits f32 [V] of the last row (it predicts x_{i+2+depth}).
        """
        ...

    def close(self) -> None:
        """Release everything held."""
        ...


@runtime_checkable
class ThreadedBackend(Protocol):
    """A backend whose number of threads can change between two passes."""

    @property
    def threads(self) -> int:
        """Threads that compute."""
        ...

    def set_threads(self, count: int) -> None:
        """Compute with `count` threads from the next pass on. Raises UsageError."""
        ...


@runtime_checkable
class ChainingBackend(Protocol):
    """What a backend may have on top: several MTP blocks in one call."""

    @property
    def chains(self) -> bool:
        """Whether `mtp_chain` works with this model."""
        ...

    def mtp_chain(
        self,
        count: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> tuple[list[int], Sequence[F32]]:
        """`mtp_forward` of blocks 0..count-1 on the same rows, each with the token the block before
        it gave the largest logit. token_ids [n] are block 0's, n > 1. Returns the chosen tokens and
        logits f32 [V] of each block, only lent until the next pass."""
        ...


@runtime_checkable
class PreparingBackend(Protocol):
    """What a backend may tell on top: whether the time of a pass says what the next one takes."""

    @property
    def prepared(self) -> int:
        """How many kinds of pass were prepared so far; the first of a kind takes longer."""
        ...


@runtime_checkable
class IdlingBackend(Protocol):
    """A backend that keeps memory of ended conversations for the next ones."""

    def free_idle(self) -> int:
        """Free it; its bytes. From any thread."""
        ...
