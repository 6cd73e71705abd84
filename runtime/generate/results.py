"""What a generation gives: events as it goes on, completions, times."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One step of one row.

    token: the id generated, None where the row ended without one. text: what became certain with it (may be empty: part of a
    character or of a possible stop text is held back). finish_reason: None while the row goes on, then "eos", "stop" (a stop
    text), "complete" (its constraint allows nothing more), "length" (max_tokens, or no room left) or "cancelled".
    """

    row: int
    token: int | None
    text: str
    finish_reason: str | None


@dataclass
class Completion:
    """What one row has generated so far. token_ids holds the end-of-text token and a stop text's tokens; text does not."""

    num_prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Stats:
    """Times and counts of one generation, all rows together.

    Calls that still read some row's prompt count as prefill, the others as decode; what the consumer of the events does
    between two calls counts as neither. first_token_seconds: from the request to the first token of any row.
    num_drafted_tokens, num_draft_tokens_taken: what was computed ahead (``drafts``), and of it what the text went on with.
    """

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_decode_tokens: int = 0
    num_drafted_tokens: int = 0
    num_draft_tokens_taken: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float | None = None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens read per second; None before the first call."""
        return self.num_prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens generated per second once every prompt was read; None where there were none."""
        return self.num_decode_tokens / self.decode_seconds if self.num_decode_tokens else None
