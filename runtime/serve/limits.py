"""How many rows of how many tokens are served: what was asked for, within what an engine or this machine's memory allows."""

from __future__ import annotations

import sys

from bilevel.bundle.engines import Engine
from bilevel.bundle.format import Bundle
from bilevel.errors import RequestError
from bilevel.machine import available_memory
from bilevel.runtime.backend.engine import EngineSession
from bilevel.runtime.backend.onnx_cuda import CudaSession
from bilevel.runtime.backend.session import Session
from bilevel.runtime.schedule.jobs import SchedulerLimits

ROWS = 8  # where nobody says how many


def choose_limits(session: Session, rows: int | None, capacity: int | None, queue: int) -> SchedulerLimits:
    """The limits of a scheduler on ``session``. rows, capacity: None leaves the choice to the engine, else to the memory.

    Raises RequestError where more is asked for than the model or its engine takes.
    """
    bundle = session.bundle
    if capacity is not None and capacity > bundle.max_positions:
        raise RequestError(f"--capacity {capacity} must be at most this model's {bundle.max_positions} positions")
    if isinstance(session, EngineSession):
        return _engine_limits(bundle, session.engine, rows, capacity, queue)
    rows = rows or ROWS
    memory = session.device.free_bytes() if isinstance(session, CudaSession) else available_memory() or sys.maxsize
    return SchedulerLimits(rows, queue, capacity or default_capacity(bundle, rows, memory), bundle.prefill_chunk)


def _engine_limits(bundle: Bundle, engine: Engine, rows: int | None, capacity: int | None, queue: int) -> SchedulerLimits:
    """What an engine was built for is the most that can be had of it."""
    fewest, most = engine.batch
    if fewest > 1:
        raise RequestError(
            f"the engine {engine.name} runs {fewest} to {most} rows, and serving runs single ones too; {engine.remedy} "
            f"--batch 1-{most}"
        )
    if rows is not None and rows > most:
        raise RequestError(
            f"--max-rows {rows} is more than the engine {engine.name} was built for ({most}); give at most {most}, or "
            f"{engine.remedy} --batch 1-{rows}"
        )
    # A row's last place is the scheduler's own: what idle rows are given is written behind what they have cached.
    room = engine.capacity // bundle.block_size * bundle.block_size - 1
    if room < 1 or (capacity is not None and capacity > room):
        raise RequestError(
            f"--capacity {capacity or 1} is more than the engine {engine.name} was built for ({max(0, room)}); give less, or "
            f"{engine.remedy} --capacity {bundle.round_up((capacity or 1) + 1)}"
        )
    return SchedulerLimits(
        rows or min(ROWS, most),
        queue,
        capacity or min(room, bundle.max_positions),
        min(bundle.prefill_chunk, longest_call(engine)),
    )


def longest_call(engine: Engine) -> int:
    """Tokens of a row in one call, such that every shorter call has a profile too. Raises RequestError where there is none."""
    reach = 0
    for fewest, most in sorted(engine.new_tokens):
        if fewest <= reach + 1:
            reach = max(reach, most)
    if not reach:
        raise RequestError(f"the engine {engine.name} has no profile for single tokens; {engine.remedy}")
    return reach


def default_capacity(bundle: Bundle, rows: int, memory: int) -> int:
    """Tokens per row: the model's, or as many as let the caches of all rows lie in a quarter of the ``memory`` that can be had."""
    fitting = memory // 4 // max(1, bundle.state_bytes(rows, bundle.block_size)) * bundle.block_size
    return max(1, min(bundle.max_positions, fitting - bundle.block_size))
