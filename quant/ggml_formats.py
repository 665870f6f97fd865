"""K-quants and IQ formats: ggml's own quantiser and dequantiser, behind our checks.

Production uses `ggml_quantize_chunk` of libggml-base; there is no NumPy form of these. The
independent oracle of the dequantiser is gguf-py (tests).
"""

from __future__ import annotations

import numpy as np

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import F32, U8, Format
from mimo_edge.runtimes.ggml import library

# The fits square weights and sums; above the range of f16 they can overflow, and a NaN there
# makes ggml abort. No weight of a model is near it.
MAX_ABS = 65504.0


class GgmlFormat(Format):
    """A format packed and unpacked by libggml."""

    uses_importance = True

    def _pack(self, x: F32, importance: F32 | None, out: U8) -> None:
        largest = np.abs(x).max(initial=0.0)
        if largest > MAX_ABS:
            raise QuantError(
                f"a weight of magnitude {largest:g} cannot be quantised to {self.name}",
                f"the largest accepted is {MAX_ABS:g}",
            )
        library.load().quantize(self.ggml_type, x, out, importance)

    def _unpack(self, raw: U8, out: F32) -> None:
        library.load().dequantize(self.ggml_type, raw, out)


class Q2_K(GgmlFormat):
    """16 blocks of 16 with 4-bit scales and minima under two f16 scales."""

    name = "Q2_K"
    ggml_type = 10
    block_size = 256
    block_bytes = 84
    scale_offsets = (80, 82)


class Q3_K(GgmlFormat):
    """16 blocks of 16 with 6-bit scales under one f16 scale."""

    name = "Q3_K"
    ggml_type = 11
    block_size = 256
    block_bytes = 110
    scale_offsets = (108,)


class Q4_K(GgmlFormat):
    """8 blocks of 32 with 6-bit scales and minima under two f16 scales."""

    name = "Q4_K"
    ggml_type = 12
    block_size = 256
    block_bytes = 144
    scale_offsets = (0, 2)


class Q5_K(GgmlFormat):
    """Q4_K with a fifth bit."""

    name = "Q5_K"
    ggml_type = 13
    block_size = 256
    block_bytes = 176
    scale_offsets = (0, 2)


class Q6_K(GgmlFormat):
    """16 blocks of 16 with 8-bit scales under one f16 scale."""

    name = "Q6_K"
    ggml_type = 14
    block_size = 256
    block_bytes = 210
    scale_offsets = (208,)


class IQ2_XXS(GgmlFormat):
    """Groups of 8 from a codebook; needs an importance matrix."""

    name = "IQ2_XXS"
    ggml_type = 16
    block_size = 256
    block_bytes = 66
    scale_offsets = (0,)
    requires_importance = True


class IQ3_XXS(GgmlFormat):
    """Groups of 4 from a codebook."""

    name = "IQ3_XXS"
    ggml_type = 18
    block_size = 256
    block_bytes = 98
    scale_offsets = (0,)


class IQ4_NL(GgmlFormat):
    """Q4_0's layout with 16 unevenly spaced levels."""

    name = "IQ4_NL"
    ggml_type = 20
    block_size = 32
    block_bytes = 18
    scale_offsets = (0,)


class IQ4_XS(GgmlFormat):
    """IQ4_NL's levels with 6-bit scales under one f16 scale."""

    name = "IQ4_XS"
    ggml_type = 23
    block_size = 256
    block_bytes = 136
    scale_offsets = (0,)
