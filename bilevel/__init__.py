"""Two-level-routing language models: the PyTorch reference.

Importing this package imports nothing heavy, so that ``bilevel.runtime`` starts on a board without PyTorch. Import what
you need by module, for example ``from bilevel.config import ModelConfig``.

Letters used in every docstring: B rows of a batch, L tokens in this call, R tokens per block, N blocks in the cache's
capacity, U pooled key units (one per block here), Hq query heads, Hkv key/value heads, Hr route query heads, Hk route
key heads, Hs selection heads, D head dim, K blocks kept, E experts in Gp groups, T flattened tokens.
"""

__version__ = "0.1.0"
