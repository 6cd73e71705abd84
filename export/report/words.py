"""The judged text on the page: every token in its place, coloured by its routes' state and shaded by its smallest margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bilevel.export.report.judgements import RouterResult
from bilevel.export.report.model import Word
from bilevel.export.report.summary import short, visible

SHADES = (1, 5, 25)  # in tolerances; a margin below the first is shaded most
USUAL_TOLERANCE = 2.0**-20  # about 1e-6: of fp32 scores, where no router has one
STATES = {"same": "the same routes", "excused": "differs at a near-tie", "wrong": "routed wrongly"}
MOST_LISTED = 200


def shade_bounds(selection: Sequence[RouterResult]) -> list[float]:
    """The margins below which a word is shaded, the darkest first: multiples of the routers' largest median tolerance."""
    scale = max((router.tolerance.median for router in selection if router.tolerance.median), default=USUAL_TOLERANCE)
    return [factor * scale for factor in SHADES]


def word_spans(words: Sequence[Word], bounds: Sequence[float]) -> Markup:
    """Every token as a span: its class says the state and the shade, data-m holds the margin.

    Tokens that differ can be reached by keyboard and link, and their title names the routers; the others are kept short, since
    there may be thousands.
    """
    return Markup("").join(_span(index, word, bounds) for index, word in enumerate(words))


def _span(index: int, word: Word, bounds: Sequence[float]) -> Markup:
    text, state, margin = visible(word.text), word.state, short(word.margin, "")
    if state == "same":
        data = Markup(' data-m="{}"').format(margin) if margin else ""
        return Markup("<span{}{}>{}</span>").format(_shade(word.margin, bounds), data, text)
    blank = "" if text.strip() else " newline" if text.startswith("\n") else " blank"
    return Markup('<span id="w{}" class="{}{}" data-m="{}" tabindex="0" title="{}">{}</span>').format(
        index, state, blank, margin, describe(word), text
    )


def _shade(margin: float | None, bounds: Sequence[float]) -> Markup:
    if margin is None or margin >= bounds[-1]:
        return Markup("")
    return Markup(' class="m{}"').format(next(len(bounds) - level for level, bound in enumerate(bounds) if margin < bound))


def describe(word: Word) -> str:
    """How a token's routes compare, in one line."""
    parts = [f"wrong: {', '.join(word.wrong)}"] if word.wrong else []
    parts += [f"excused at a near-tie: {', '.join(word.excused)}"] if word.excused else []
    return visible("; ".join(parts)) or STATES[word.state]


def word_counts(words: Sequence[Word]) -> dict[str, int]:
    """How many tokens are in each state."""
    return {state: sum(word.state == state for word in words) for state in STATES}


def differing_words(words: Sequence[Word]) -> list[dict[str, Any]]:
    """The tokens that differ, wrong ones first, at most MOST_LISTED: index, text, state, what, margin."""
    differing = [
        {
            "index": index,
            "text": visible(word.text, newlines=False),
            "state": word.state,
            "what": describe(word),
            "margin": short(word.margin, "-"),
        }
        for index, word in enumerate(words)
        if word.state != "same"
    ]
    return sorted(differing, key=lambda item: item["state"] != "wrong")[:MOST_LISTED]
