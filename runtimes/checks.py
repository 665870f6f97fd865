"""What every backend checks of a call, in one wording."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mimo_edge.config import MimoConfig
from mimo_edge.errors import CacheError, GenerationError, UsageError
from mimo_edge.runtimes.base import F32, TokenIds

# So many numbers are looked at in one product, in half of the time that a mask of them takes; for
# more BLAS would start threads, which spin where ours compute.
_FEW_NUMBERS = 8192


def check_ids(token_ids: ArrayLike, config: MimoConfig) -> TokenIds:
    """Token ids [T], at least one, all in the vocabulary. Raises UsageError."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UsageError(
            f"token ids of shape {ids.shape}, type {ids.dtype}", "give one or more integers"
        )
    found: list[int] = ids.tolist()  # of few ids Python finds these sooner than NumPy
    low, high = min(found), max(found)
    if low < 0 or high >= config.vocab_size:
        raise UsageError(
            f"token id {low if low < 0 else high} is outside 0..{config.vocab_size - 1}"
        )
    return ids.astype(np.int32, copy=False)


def check_wanted(total: int, logits_rows: int, hidden_rows: int) -> None:
    """Raise UsageError unless a pass of `total` tokens has that many rows to give."""
    for label, rows in (("logits_rows", logits_rows), ("hidden_rows", hidden_rows)):
        if not 0 <= rows <= total:
            raise UsageError(f"{label} = {rows} of {total} new tokens")


def check_mtp_rows(
    config: MimoConfig, depth: int, count: int, hidden: ArrayLike, position: int, length: int
) -> F32:
    """hidden f32 [n, M] of a call to MTP block `depth` for `count` tokens from `position` on, when
    the target has processed `length`. Raises UsageError (block, shape), CacheError (position)."""
    rows = np.asarray(hidden, np.float32)
    if not 0 <= depth < config.num_mtp_layers:
        raise UsageError(f"MTP block {depth} of a model with {config.num_mtp_layers}")
    if rows.shape != (count, config.hidden_size):
        raise UsageError(
            f"hidden states of shape {rows.shape} for {count} tokens of width {config.hidden_size}"
        )
    if not 0 <= position <= length - count:
        raise CacheError(
            f"MTP rows {position}..{position + count - 1}, but the target has processed "
            f"{length} tokens",
            "a row needs the target's hidden state of its position",
        )
    return rows


def check_finite(rows: F32, where: str, first: int) -> None:
    """Raise GenerationError naming the position of the first of rows [n, ...], the first of which
    is at `first`, that holds NaN or Inf."""
    if rows.size <= _FEW_NUMBERS:
        flat = rows.reshape(-1)
        # A sum of squares is finite only where every number is; the reverse the next lines find.
        if math.isfinite(np.dot(flat, flat)):
            return
    finite = np.isfinite(rows)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=-1)))
        raise GenerationError(
            f"{where} gave NaN or Inf at position {first + row}",
            "the weights, or the input, are damaged",
        )
