"""The operators as Triton kernels, and their launcher on PyTorch tensors."""
