"""The CPU library's kernels on PyTorch's tensors: the one place that decides whether training uses them.

The library is built when bilevel is installed where there is a C++ compiler (``plugins/csrc/ort``). BILEVEL_CPU_LIBRARY=none
switches it off, and PyTorch's own operations run instead, several times slower. Only calls that want gradients come here:
inference in PyTorch is what ``bilevel check`` holds the same library against, so it must not be the library itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math

import torch
from torch import Tensor

from bilevel.operators.routed_tiles import Call

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST, _UNITS = 512, 16  # positions of a unit of work at least; units at most, so that partial gradients stay few


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    path = importlib.import_module("bilevel.plugins.library.cpu").find_cpu_library()
    library = ctypes.CDLL(str(path)) if path else None
    if library is None or not hasattr(library, "bilevel_train_attention"):
        return None
    library.bilevel_train_attention.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
    library.bilevel_train_attention.restype = ctypes.c_int
    return library


def covers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the library computes attention over these: on a CPU, in a type that it accumulates in fp32."""
    return all(x.device.type == "cpu" and x.dtype in _TYPES for x in (q, k, v)) and _load() is not None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, gradients: tuple[Tensor, ...], pieces: int
) -> None:
    """Forward into out and lse, or, where there are gradients (of out; for q, k, v), backward. All fp32."""
    library = _load()
    assert library is not None
    tensors = [q, k, v, *(x.int() for x in (call.routes, call.past_len, call.new_len)), out, lse, *gradients]
    tensors = [x.contiguous() for x in tensors]
    addresses = (ctypes.c_void_p * 12)(*(x.data_ptr() for x in tensors))
    sizes = (*q.shape, *k.shape[1:3], call.routes.shape[1], call.routes.shape[3], v.shape[3], call.block_size)
    numbers = (ctypes.c_int64 * 12)(*sizes, call.causal, pieces)
    if library.bilevel_train_attention(addresses, numbers, call.scale, torch.get_num_threads()):
        raise MemoryError("routed attention: the CPU library got no memory for its work; use shorter rows or fewer of them")


def attention_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """As ``bilevel.operators.routed_tiles.forward``: (out [B, Hq, L, E], log-sum-exp [B, Hq, L], fp32)."""
    out = torch.empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3])
    pieces = max(1, min(-(-q.shape[2] // _LEAST), _UNITS // max(1, q.shape[0] * call.groups)))
    _attention(q.float(), k.float(), v.float(), call, out, lse, (), pieces)
    return out.to(q.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``bilevel.operators.routed_tiles.backward``."""
    batch, kv_heads = k.shape[:2]
    pieces = max(1, min(-(-q.shape[2] // _LEAST), math.ceil(_UNITS / 2 / max(1, batch * kv_heads))))
    gradients = (torch.empty(q.shape), *(torch.zeros(pieces, *x.shape) for x in (k, v)))
    _attention(q.float(), k.float(), v.float(), call, out.float(), lse, (grad.float().contiguous(), *gradients), pieces)
    sums = (x[0] if pieces == 1 else x.sum(0) for x in gradients[1:])
    return gradients[0].to(q.dtype), *(x.to(k.dtype) for x in sums)  # type: ignore[return-value]
