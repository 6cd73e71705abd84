"""Answers in the words of OpenAI's API: choices, chunks, log-probabilities, usage, and this server's routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.runtime.generate.sampling import TokenLogprobs
from bilevel.runtime.generate.text import BundleTokenizer, Detokenizer
from bilevel.runtime.schedule.jobs import TokenRoutes
from bilevel.runtime.serve.answers import AnswerChoice, Piece
from bilevel.runtime.serve.tools.parser import CallDelta, CallParser, Delta

_REASONS = {"eos": "stop", "stop": "stop", "complete": "stop", "length": "length", "dead_end": "dead_end", None: None}


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


def prompt_blocks(tokenizer: BundleTokenizer, prompt: Sequence[int], size: int) -> list[str]:
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

    def __init__(self, tokenizer: BundleTokenizer, header: dict[str, Any]) -> None:
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


@dataclass(frozen=True)
class _Scored:
    """One token with what it is worth (None: the first of a prompt) and its text."""

    token: int
    text: str
    logprobs: TokenLogprobs | None


class CompletionFormat(Format):
    """/v1/completions. echo: answers begin with the prompt."""

    def __init__(self, tokenizer: BundleTokenizer, header: dict[str, Any], echo: bool = False) -> None:
        super().__init__(tokenizer, header)
        self._echo = echo
        self._lengths: dict[AnswerChoice, int] = {}  # characters of each choice that were streamed

    def chunk(self, piece: Piece) -> dict[str, Any]:
        is_first = piece.choice not in self._lengths
        prompt = self._prompt(piece.choice) if is_first else []
        text = "".join(each.text for each in prompt) + piece.text
        # Several pieces may have come at once, so the choice's own text may be further on.
        offset = self._lengths.get(piece.choice, 0)
        self._lengths[piece.choice] = offset + len(text)
        choice: dict[str, Any] = {
            "index": piece.choice.index,
            "text": text,
            "logprobs": self._logprobs(piece.choice, prompt, [piece], offset),
            "finish_reason": _REASONS[piece.finish_reason],
        }
        return choice if piece.routes is None else {**choice, "routes": routes_of(piece.routes)}

    def choice(self, choice: AnswerChoice, pieces: list[Piece], with_routes: bool) -> dict[str, Any]:
        prompt = self._prompt(choice)
        content: dict[str, Any] = {
            "index": choice.index,
            "text": "".join(each.text for each in prompt) + choice.text,
            "logprobs": self._logprobs(choice, prompt, pieces, 0),
            "finish_reason": _REASONS[choice.finish_reason],
        }
        return (
            {**content, "routes": [routes_of(piece.routes) for piece in pieces if piece.token is not None]}
            if with_routes
            else content
        )

    def _prompt(self, choice: AnswerChoice) -> list[_Scored]:
        """The prompt's tokens, where they are to be shown."""
        if not self._echo:
            return []
        stream, prompt = Detokenizer(self.tokenizer), choice.job.prompt
        texts = [stream.push(token) for token in prompt]
        texts[-1] += stream.flush()
        logprobs = [None, *choice.job.prompt_logprobs] if choice.job.scores_prompt else [None] * len(prompt)
        return list(map(_Scored, prompt, texts, logprobs))

    def _logprobs(self, choice: AnswerChoice, prompt: list[_Scored], pieces: list[Piece], offset: int) -> dict[str, Any] | None:
        if choice.job.num_logprobs is None:
            return None
        scored = prompt + [_Scored(each.token, each.text, each.logprobs) for each in pieces if each.token is not None]
        offsets = []
        for each in scored:
            offsets.append(offset)
            offset += len(each.text)
        return {
            "tokens": [self._word(each.token) for each in scored],
            "token_logprobs": [each.logprobs and each.logprobs.chosen for each in scored],
            "top_logprobs": [each.logprobs and self._top(each.logprobs) for each in scored],
            "text_offset": offsets,
        }

    def _word(self, token: int) -> str:
        """One token's text by itself; its bytes, written as OpenAI's endpoint did, where they are no characters."""
        data = self.tokenizer.bytes_of(token)
        try:
            return data.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The best tokens, best first; of two that look alike the second is named by its id, so that none is missing."""
        named: dict[str, float] = {}
        for token, value in logprobs.top:
            word = self._word(token)
            named[f"token_id:{token}" if word in named else word] = value
        return named


def _streamed(call: CallDelta) -> dict[str, Any]:
    """A piece of a call as chunks carry it: who it is, with the first one only."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


class ChatFormat(Format):
    """/v1/chat/completions. open_parser: gives what reads the calls out of one answer; None where there are none to read."""

    def __init__(
        self, tokenizer: BundleTokenizer, header: dict[str, Any], open_parser: Callable[[], CallParser] | None = None
    ) -> None:
        super().__init__(tokenizer, header)
        self._open_parser = open_parser
        self._parsers: dict[AnswerChoice, CallParser] = {}

    def opening(self, choice: AnswerChoice) -> dict[str, Any] | None:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        read = self._read(piece)
        delta: dict[str, Any] = {"content": read.content} if read.content else {}
        if read.calls:
            delta["tool_calls"] = [_streamed(call) for call in read.calls]
        choice: dict[str, Any] = {
            "index": piece.choice.index,
            "delta": delta,
            "logprobs": self._logprobs([piece]),
            "finish_reason": self._reason(piece.choice, piece.finish_reason),
        }
        return choice if piece.routes is None else {**choice, "routes": routes_of(piece.routes)}

    def choice(self, choice: AnswerChoice, pieces: list[Piece], with_routes: bool) -> dict[str, Any]:
        read = [self._read(piece) for piece in pieces]
        calls: dict[int, dict[str, Any]] = {}
        for delta in (call for each in read for call in each.calls):
            call = calls.setdefault(delta.index, {"id": delta.id, "type": "function"})
            function = call.setdefault("function", {"name": delta.name, "arguments": ""})
            function["arguments"] += delta.arguments
        text = "".join(each.content for each in read)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = list(calls.values())
        content: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(pieces),
            "finish_reason": self._reason(choice, choice.finish_reason),
        }
        return (
            {**content, "routes": [routes_of(piece.routes) for piece in pieces if piece.token is not None]}
            if with_routes
            else content
        )

    def _read(self, piece: Piece) -> Delta:
        """What a piece adds: text, calls."""
        if self._open_parser is None:
            return Delta(piece.text)
        if piece.choice not in self._parsers:
            self._parsers[piece.choice] = self._open_parser()
        parser = self._parsers[piece.choice]
        delta = parser.push(piece.text, None if piece.token is None else self.tokenizer.special.get(piece.token))
        if piece.finish_reason is not None:
            delta.content += parser.finish().content
        return delta

    def _reason(self, choice: AnswerChoice, reason: str | None) -> str | None:
        said = _REASONS[reason]
        return "tool_calls" if said == "stop" and choice in self._parsers and self._parsers[choice].is_whole else said

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if not pieces or pieces[0].logprobs is None:
            return None
        return {
            "content": [self._entry(each.token, each.logprobs) for each in pieces if each.token is not None and each.logprobs],
            "refusal": None,
        }

    def _entry(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(each, value) for each, value in logprobs.top]
        return {**self._named(token, logprobs.chosen), "top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        data = self.tokenizer.bytes_of(token)
        return {
            "token": data.decode("utf-8", "replace") or f"token_id:{token}",
            "logprob": value,
            "bytes": list(data) or None,
        }
