"""Rewriting without tolerance: an addend of 1e-20 is no 0, and a factor of 1.000001 is no 1.

onnxscript compares the constants of its rules (``x + 0``, ``x * 1``, ...) by ``math.isclose``, to 1e-8 absolutely and 1e-5 of
the value (0.7.2). An epsilon that keeps a sum from being 0 is within them, and was rewritten away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxscript.rewriter._matcher import SimplePatternMatcher
from onnxscript.rewriter._pattern_ir import Constant

_MATCH = "_match_constant"
_match_closely = SimplePatternMatcher._match_constant


def _match_exactly(matcher: SimplePatternMatcher, pattern: Constant, value: Any) -> bool:
    return _match_closely(matcher, Constant(pattern.value, rel_tol=0.0, abs_tol=0.0), value)


@contextmanager
def exact_rules() -> Iterator[None]:
    """While this lasts, a rule of onnxscript takes a constant for the one that it names only where the two are equal."""
    before = vars(SimplePatternMatcher)[_MATCH]
    setattr(SimplePatternMatcher, _MATCH, _match_exactly)
    try:
        yield
    finally:
        setattr(SimplePatternMatcher, _MATCH, before)
