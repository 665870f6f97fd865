"""MXFP4 experts as MiMo-V2.6 checkpoints store them.

`.weight` u8 [rows, cols/2] holds two e2m1 codes a byte, low nibble = even column;
`.weight_scale` u8 [rows, cols/32] holds one E8M0 exponent per 32 columns:
value = e2m1 * 2^(E - 127). ggml keeps the same codes in another order (quant/ repacks them).

Source: spec section 4.2; OCP Microscaling formats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import CheckpointError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

BLOCK = 32
E2M1: F32 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
"""Value of every code, f32 [16]."""

# 6 * 2^(252 - 127) is the largest block that fits f32; 255 is E8M0's NaN.
LARGEST_EXPONENT = 252


def check_scales(scales: U8, name: str, first_row: int = 0) -> None:
    """Raise CheckpointError naming the first scale that is NaN or overflows f32."""
    bad = scales > LARGEST_EXPONENT
    if bool(np.any(bad)):
        row, block = (int(x) for x in np.argwhere(bad)[0])
        code = int(scales[row, block])
        what = "NaN" if code == 255 else f"2^{code - 127}, beyond f32"
        raise CheckpointError(
            f"{name}: scale of block [{first_row + row}, {block}] is {what}",
            "the tensor is damaged; download the file again",
        )


def decode(codes: U8, scales: U8) -> F32:
    """codes u8 [rows, cols/2], scales u8 [rows, cols/32] -> f32 [rows, cols]."""
    rows, pairs = codes.shape
    values = np.empty((rows, pairs, 2), dtype=np.float32)
    values[:, :, 0] = E2M1[codes & 15]
    values[:, :, 1] = E2M1[codes >> 4]
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    blocks = values.reshape(rows, -1, BLOCK)
    blocks *= factors[:, :, None]
    return blocks.reshape(rows, pairs * 2)
