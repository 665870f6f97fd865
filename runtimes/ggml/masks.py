"""What a query sees, as the f16 mask that ggml's attention takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mimo_edge.runtimes.ggml.cache import Positions

SEEN, HIDDEN = np.float16(0), np.float16(-np.inf)
UNLIMITED = 1 << 40  # a window longer than any context, shorter than the way to EMPTY


def fill_causal(
    mask: NDArray[np.float16], held: Positions, queries: Positions, window: int
) -> None:
    """mask f16 [T, S]: 0 where a query sees the position a column holds, -inf elsewhere.

    Source: spec section 2 step 6, 0 <= i - j <= W - 1.
    """
    behind = queries[:, None] - held
    mask.fill(HIDDEN)
    # Seen as unsigned, what lies ahead is far behind.
    np.copyto(mask, SEEN, where=behind.view(np.uint64) < window)
