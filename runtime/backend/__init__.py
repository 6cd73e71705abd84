"""What runs a bundle: ONNX Runtime on the CPU or a GPU, TensorRT; and the choice among them."""
