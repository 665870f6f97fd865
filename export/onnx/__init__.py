"""Writing a model as ONNX graphs: `layers` builds them, `linear` decides how matrices are stored,
`package` puts them together. Names and shapes of inputs and outputs: mimo_edge.onnx_io."""
