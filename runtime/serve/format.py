"""Answers in the words of OpenAI's API: choices, chunks, log-probabilities, usage, and this server's routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bilevel.runtime.generate.sampling import TokenLogprobs
from bilevel.runtime.generate.text import Detokenizer, Tokenizer
from bilevel.runtime.schedule.jobs import TokenRoutes
from bilevel.runtime.serve.answers import AnswerChoice, Piece

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", None: None}


def usage(choices: Sequence[AnswerChoice], per_prompt: int) -> dict[str, Any]:
    """Counts; a prompt counts once however many choices it has."""
    read = choices[::per_prompt]
    prompt, completion = sum(len(c.job.prompt) for c in read), sum(len(c.token_ids) for c in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(c.job.num_reused for c in read)},
    }


def prompt_blocks(tokenizer: Tokenizer, prompt: Sequence[int], size: int) -> list[str]:
    """The text of each block of ``size`` tokens of a prompt; a character that two blocks share is in the second."""
    detokenizer, texts = Detokenizer(tokenizer), [""] * -(-len(prompt) // size)
    for place, token in enumerate(prompt):
        texts[place // size] += detokenizer.push(token)
    texts[-1] += detokenizer.flush()
    return texts


def routes_of(routes: TokenRoutes | None) -> dict[str, Any] | None:
    """What the last word of the context read when a token was chosen.

    blocks: for each routed layer the blocks that any head read, ascending. candidates: level 1's. experts: {layer: ids}.
    """
    if routes is None:
        return None
    blocks = [sorted({int(block) for block in layer.ravel() if block >= 0}) for layer in routes.blocks]
    experts = {str(layer): list(ids) for layer, ids in routes.experts.items()}
    return {"position": routes.position, "candidates": list(routes.candidates), "blocks": blocks, "experts": experts}


class Format:
    """One endpoint's JSON. header: what every object of one answer begins with."""

    def __init__(self, tokenizer: Tokenizer, header: dict[str, Any]) -> None:
        self.tokenizer, self.header = tokenizer, header

    def opening(self, choice: AnswerChoice) -> dict[str, Any] | None:
        """A chunk before the first token."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One token's chunk."""
        raise NotImplementedError

    def choice(self, choice: AnswerChoice, pieces: list[Piece], with_routes: bool) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def word(self, token: int) -> str:
        """One token's text by itself."""
        return self.tokenizer.decode([token]) or f"<token {token}>"


class CompletionFormat(Format):
    """/v1/completions."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.choice.index,
            "text": piece.text,
            "logprobs": self._logprobs([piece], len(piece.choice.text) - len(piece.text)),
            "finish_reason": _REASONS[piece.finish_reason],
        }
        return choice if piece.routes is None else {**choice, "routes": routes_of(piece.routes)}

    def choice(self, choice: AnswerChoice, pieces: list[Piece], with_routes: bool) -> dict[str, Any]:
        content: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(pieces, 0),
            "finish_reason": _REASONS[choice.finish_reason],
        }
        return {**content, "routes": [routes_of(piece.routes) for piece in pieces]} if with_routes else content

    def _logprobs(self, pieces: list[Piece], offset: int) -> dict[str, Any] | None:
        if not pieces or pieces[0].logprobs is None:
            return None
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self.word(piece.token) for piece in pieces],
            "token_logprobs": [each.chosen for each in logprobs],
            "top_logprobs": [{self.word(token): value for token, value in reversed(each.top)} for each in logprobs],
            "text_offset": offsets,
        }


class ChatFormat(Format):
    """/v1/chat/completions."""

    def opening(self, choice: AnswerChoice) -> dict[str, Any] | None:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.choice.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs([piece]),
            "finish_reason": _REASONS[piece.finish_reason],
        }
        return choice if piece.routes is None else {**choice, "routes": routes_of(piece.routes)}

    def choice(self, choice: AnswerChoice, pieces: list[Piece], with_routes: bool) -> dict[str, Any]:
        content: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(pieces),
            "finish_reason": _REASONS[choice.finish_reason],
        }
        return {**content, "routes": [routes_of(piece.routes) for piece in pieces]} if with_routes else content

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if not pieces or pieces[0].logprobs is None:
            return None
        return {"content": [self._entry(piece.token, piece.logprobs) for piece in pieces if piece.logprobs], "refusal": None}

    def _entry(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(each, value) for each, value in logprobs.top]
        return {**self._named(token, logprobs.chosen), "top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        word = self.word(token)
        return {"token": word, "logprob": value, "bytes": list(word.encode())}
