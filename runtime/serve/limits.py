"""How many rows of how many tokens are served: what was asked for, within what the session or this machine's memory allows."""

from __future__ import annotations

import sys

from bilevel.bundle.format import Bundle
from bilevel.errors import RequestError
from bilevel.runtime.backend.session import Session, SessionLimits
from bilevel.runtime.schedule.jobs import SchedulerLimits

ROWS = 8  # where neither the user nor an engine says how many


def choose_limits(session: Session, rows: int | None, capacity: int | None, queue: int) -> SchedulerLimits:
    """The limits of a scheduler on ``session``. rows, capacity: None leaves the choice to the session, else to the memory.

    Raises RequestError where more is asked for than the model or what runs it takes.
    """
    bundle, limits = session.bundle, session.limits
    if capacity is not None and capacity < 1:
        raise RequestError(f"--capacity {capacity} must be at least 1")
    if capacity is not None and capacity > bundle.max_positions:
        raise RequestError(f"--capacity {capacity} must be at most this model's {bundle.max_positions} positions")
    rows = _rows(limits, rows)
    room = _room(bundle, limits, capacity)
    if not limits.longest_call:
        raise RequestError(f"{limits.builder} has no profile for single tokens; {limits.remedy}")
    if limits.capacity is None:
        memory = sys.maxsize if limits.cache_bytes is None else limits.cache_bytes
        room = default_capacity(bundle, rows, memory)
    return SchedulerLimits(rows, queue, room if capacity is None else capacity, min(bundle.prefill_chunk, limits.longest_call))


def _rows(limits: SessionLimits, rows: int | None) -> int:
    """Texts at once: those asked for, else ROWS or as many as there may be."""
    most = limits.most_rows
    if limits.fewest_rows > 1:
        raise RequestError(
            f"{limits.builder} runs {limits.fewest_rows} to {most} rows, and serving runs single ones too; {limits.remedy} "
            f"--batch 1-{most}"
        )
    if most is None:
        return rows or ROWS
    if rows is not None and rows > most:
        raise RequestError(
            f"--max-rows {rows} is more than {limits.builder} was built for ({most}); give at most {most}, or "
            f"{limits.remedy} --batch 1-{rows}"
        )
    return rows or min(ROWS, most)


def _room(bundle: Bundle, limits: SessionLimits, capacity: int | None) -> int:
    """Tokens that a row may have by the model and by what runs it."""
    if limits.capacity is None:
        return bundle.max_positions
    # A row's last place is the scheduler's own: what idle rows are given is written behind what they have cached.
    room = limits.capacity // bundle.block_size * bundle.block_size - 1
    if room < 1 or (capacity is not None and capacity > room):
        raise RequestError(
            f"--capacity {capacity or 1} is more than {limits.builder} was built for ({max(0, room)}); give less, or "
            f"{limits.remedy} --capacity {bundle.round_up((capacity or 1) + 1)}"
        )
    return min(room, bundle.max_positions)


def default_capacity(bundle: Bundle, rows: int, memory: int) -> int:
    """Tokens per row: the model's, or as many as let the caches of all rows lie in a quarter of ``memory``, the bytes free."""
    fitting = memory // 4 // max(1, bundle.state_bytes(rows, bundle.block_size)) * bundle.block_size
    return max(1, min(bundle.max_positions, fitting - bundle.block_size))
