"""The operators in standard ONNX operators: the portable execution of a graph."""
