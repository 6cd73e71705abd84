"""A bundle to an engine of TensorRT or TensorRT-RTX."""
