"""A kernel that writes where it must not: ``make gpu-test`` shows by it that its memory checker notices."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_one(out, at):
    tl.store(out + at, 1.0)
