"""A checkpoint in PyTorch that chooses its blocks by the attention they truly get: what ``bilevel quality`` compares with."""
