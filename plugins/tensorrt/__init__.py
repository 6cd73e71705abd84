"""The operators as TensorRT plugins: what a plugin carries, the headers that C++ ones need, and the Python ones."""
