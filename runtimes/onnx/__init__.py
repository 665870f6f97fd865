"""The ONNX Runtime backend: imported only when chosen. The entry point is `backend`."""
