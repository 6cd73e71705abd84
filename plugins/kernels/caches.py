"""WriteCache as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "capacity"])
def write_cache_rows(update, start, out, length, capacity, H: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
    """``out`` holds the cache. The elements of a row's head follow one another, in the update as in the cache."""
    head, row = tl.program_id(1), tl.program_id(2)
    count, room = length.to(tl.int64) * W, capacity.to(tl.int64) * W
    step = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    place = tl.load(start + row).to(tl.int64) * W + step
    lane = row.to(tl.int64) * H + head
    value = tl.load(update + lane * count + step, step < count)
    tl.store(out + lane * room + place, value, (step < count) & (place >= 0) & (place < room))
