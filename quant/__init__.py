"""Weight formats, recipes and importance matrices."""

# Defining a format registers it: importing the package makes all of them known.
import mimo_edge.quant.ggml_formats
import mimo_edge.quant.mxfp4
import mimo_edge.quant.plain
import mimo_edge.quant.q4_0
import mimo_edge.quant.q8_0  # noqa: F401
