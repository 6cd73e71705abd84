"""Prompts to tokens: chunked prefill, decode, and a stream of events, for a batch of rows of different lengths.

generator = Generator.open("my-bundle")  # by the best of its backends that runs here: generator.backend_reason
print(generator.texts(["def add(a, b):"])[0])

for event in generator.generate(["def add(a, b):"], SamplingParams(temperature=0.8, seed=1)):
    print(event.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bilevel.errors import ContextTooLong, RequestError
from bilevel.runtime.backend.select import AUTO, open_session
from bilevel.runtime.backend.session import Caches, Logits, Session
from bilevel.runtime.generate.drafts import DraftBudget, DraftedCall, draft_for, follow
from bilevel.runtime.generate.results import Completion, Event, Stats
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import RowLogits, Sampler, SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer, NoTokenizer, TextAssembler, Tokenizer, decode_utf8

Prompt = str | bytes | Sequence[int]
Progress = Callable[[int, int], None]


class Flag(Protocol):
    """Anything like ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether the flag is up."""


class Generator:
    """Generates text from an opened bundle; one generator serves any number of requests.

    tokenizer: None is enough for prompts of token ids; the events then carry no text. ``session.backend`` and
    ``session.device`` say what runs the bundle and where; backend_reason says why that, and not another. speculation: whether
    several tokens may be computed in one call where the text repeats what stood before (``drafts``); it is the same text.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, backend_reason: str = "", *, speculation: bool = True
    ) -> None:
        self.session, self.backend_reason, self.speculation = session, backend_reason, speculation
        self.tokenizer: Tokenizer = NoTokenizer() if tokenizer is None else tokenizer

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = AUTO,
        *,
        library: str | Path | None = None,
        verify: bool = True,
        threads: int = 0,
        speculation: bool = True,
    ) -> Generator:
        """Open the bundle at ``path``, as ``bilevel run`` does; other arguments and errors are those of ``open_session``."""
        kernels = None if library is None else Path(library)
        session, reason = open_session(path, backend, verify=verify, threads=threads, library=kernels)
        return cls(session, BundleTokenizer(session.bundle.tokenizer_path), reason, speculation=speculation)

    def texts(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[str]:
        """The generated texts, one per prompt."""
        return [completion.text for completion in self.generate(prompts, params).finish()]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        capacity: int | None = None,
        prefill_chunk: int | None = None,
        on_progress: Progress | None = None,
        cancel: Flag | None = None,
    ) -> Generation:
        """Start a generation; iterating over it does the work and gives its events.

        prompts: texts, UTF-8 bytes or token ids, one row each. params: one for all rows (row i then draws from stream i of
        the seed), or one per row (each row is what it would be alone). capacity: tokens that a row's caches hold, rounded up
        to whole blocks (None: as many as the prompts and max_tokens need). prefill_chunk: most prompt tokens of one call
        (None: the bundle's limit). on_progress(read, all): called with prompt tokens after each call of the prefill.
        cancel: looked at before each call; once set, the rows end as "cancelled" and keep their text.
        Raises RequestError when a prompt is empty, too long or not text, or an argument is out of range.
        """
        start = time.perf_counter()
        settings = self._settings(prompts, params)
        chunk = self._chunk(prefill_chunk)
        ids = [self._encode(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
        limit = self._limit(capacity, ids, settings)
        is_shared = params is None or isinstance(params, SamplingParams)
        bundle = self.session.bundle
        rows = [
            Row(
                index,
                tokens,
                Sampler(setting, bundle.vocab_size, tokens, stream=index if is_shared else 0),
                () if setting.ignore_eos else bundle.eos,
                limit,
            )
            for index, (tokens, setting) in enumerate(zip(ids, settings, strict=True))
        ]
        texts = [TextAssembler(self.tokenizer, setting.stop, tokens) for setting, tokens in zip(settings, ids, strict=True)]
        caches = self.session.allocate(len(rows), bundle.round_up(limit))
        budget = DraftBudget() if self.speculation and caches.gives_scores else None
        return Generation(rows, texts, caches, chunk, start, on_progress, cancel, budget)

    def _settings(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        """One SamplingParams per prompt."""
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)) or not prompts:
            raise RequestError(f"prompts={prompts!r} must be a list that holds at least one prompt")
        if params is None or isinstance(params, SamplingParams):
            settings = [params or SamplingParams()] * len(prompts)
        else:
            settings = list(params)
        if len(settings) != len(prompts):
            raise RequestError(
                f"{len(settings)} sampling settings were given for {len(prompts)} prompts; give one, or one each"
            )
        if isinstance(self.tokenizer, NoTokenizer) and any(setting.stop for setting in settings):
            raise RequestError("stop texts need a tokenizer; give one to Generator")
        return settings

    def _chunk(self, prefill_chunk: int | None) -> int:
        most = self.session.bundle.prefill_chunk
        chunk = most if prefill_chunk is None else prefill_chunk
        if not _is_whole(chunk) or not 1 <= chunk <= most:
            raise RequestError(f"prefill_chunk={chunk!r} must lie between 1 and this bundle's limit of {most}")
        return chunk

    def _encode(self, prompt: Prompt, name: str) -> list[int]:
        """Token ids of a prompt, checked."""
        if isinstance(prompt, str):
            # A str may hold lone surrogates, which are no text; encoded like this, decode_utf8 refuses them.
            prompt = prompt.encode("utf-8", "surrogatepass")
        if not isinstance(prompt, (bytes, Iterable)):
            raise RequestError(f"{name} is {prompt!r}; give a text, UTF-8 bytes or token ids")
        ids: list[Any] = (
            self.tokenizer.encode(decode_utf8(prompt, name)) if isinstance(prompt, bytes) and prompt else list(prompt)
        )
        if not ids:
            raise RequestError(f"{name} is empty; give at least one character")
        vocab_size = self.session.bundle.vocab_size
        for token in ids:
            if not _is_whole(token) or not 0 <= token < vocab_size:
                raise RequestError(f"{name} holds the token {token!r}; this model's tokens are 0 to {vocab_size - 1}")
        return [int(token) for token in ids]

    def _limit(self, capacity: int | None, ids: list[list[int]], settings: list[SamplingParams]) -> int:
        """Tokens that each row's caches may hold."""
        bundle = self.session.bundle
        if capacity is None:
            limit = max(len(tokens) + setting.max_tokens for tokens, setting in zip(ids, settings, strict=True))
        elif _is_whole(capacity) and 1 <= capacity <= bundle.round_up(bundle.max_positions):
            limit = bundle.round_up(capacity)
        else:
            raise RequestError(f"capacity={capacity!r} must lie between 1 and this model's {bundle.max_positions} positions")
        limit = min(limit, bundle.max_positions)
        for index, tokens in enumerate(ids):
            if len(tokens) > limit:
                raise ContextTooLong(
                    f"prompt {index} has {len(tokens)} tokens, but a row holds {limit}; shorten it"
                    + (f" or raise the capacity (at most {bundle.max_positions})" if limit < bundle.max_positions else "")
                )
        return limit


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


class Generation(Iterator[Event]):
    """A generation under way: an iterator of events. It may be left and taken up again.

    rows, texts: row i's tokens and its text; row i is also row i of the caches. stats and completions cover every call so far,
    events not yet fetched included. budget: None where there are no drafts.
    """

    def __init__(
        self,
        rows: list[Row],
        texts: list[TextAssembler],
        caches: Caches,
        chunk: int,
        start: float,
        on_progress: Progress | None = None,
        cancel: Flag | None = None,
        budget: DraftBudget | None = None,
    ) -> None:
        self.stats = Stats(num_prompt_tokens=sum(row.num_prompt_tokens for row in rows))
        self._rows, self._texts, self._caches, self._chunk, self._start = rows, texts, caches, chunk, start
        self._on_progress, self._cancel, self._budget = on_progress, cancel, budget
        self._events: deque[Event] = deque()

    @property
    def completions(self) -> list[Completion]:
        """What each row has generated so far."""
        return [
            Completion(row.num_prompt_tokens, text.text, row.generated_ids, row.finish_reason)
            for row, text in zip(self._rows, self._texts, strict=True)
        ]

    def finish(self) -> list[Completion]:
        """Generate to the end."""
        deque(self, maxlen=0)
        return self.completions

    def __next__(self) -> Event:
        while not self._events:
            active = [row for row in self._rows if row.is_active]
            if not active:
                raise StopIteration
            if self._cancel is not None and self._cancel.is_set():
                self._events.extend(map(self._end, active))
            else:
                self._step(active)
        return self._events.popleft()

    def _step(self, active: list[Row]) -> None:
        """One call of the graph. A row with a short prompt generates while a longer one is still being read."""
        if any(row.is_reading for row in active):
            self._read(active)
        else:
            self._decode(active)

    def _read(self, active: list[Row]) -> None:
        start = time.perf_counter()
        logits = self._run(active)
        events = [self._extend(row, logits[row.index])[0] for row in active if not row.num_pending]
        self.stats.prefill_seconds += self._count(events, start)
        if self._on_progress is not None:
            self._on_progress(sum(row.num_prompt_read for row in self._rows), self.stats.num_prompt_tokens)

    def _decode(self, active: list[Row]) -> None:
        """A token for each row, or as many as its draft is right about and the one behind them."""
        start = time.perf_counter()
        past_len = np.zeros(self._caches.batch, np.int32)
        for row in active:
            past_len[row.index] = row.num_cached
        room = self._caches.capacity - int(past_len.max()) - 1
        drafts = draft_for(active, room) if self._budget is not None and self._budget.allows(len(active)) else {}
        call = DraftedCall.of({row: row.index for row in active}, self._caches.batch, drafts)
        logits = call.logits(self._caches, self._caches.run(call.input_ids, past_len, call.new_len))
        events = []
        for row in active:
            events += follow(row, drafts.get(row, ()), logits[row], partial(self._extend, row))
        seconds = self._count(events, start)
        self.stats.decode_seconds += seconds
        self.stats.num_decode_tokens += len(events)
        self.stats.num_drafted_tokens += call.num_drafted
        self.stats.num_draft_tokens_taken += len(events) - len(active)
        if self._budget is not None:
            self._budget.record(len(active), call.num_drafted, len(events), seconds)

    def _count(self, events: list[Event], start: float) -> float:
        """Pass on the events of a call; the seconds that it took."""
        now, stats = time.perf_counter(), self.stats
        stats.num_new_tokens += len(events)
        if events and stats.first_token_seconds is None:
            stats.first_token_seconds = now - self._start
        self._events.extend(events)
        return now - start

    def _extend(self, row: Row, logits: RowLogits) -> tuple[Event, bool]:
        """The row's next token and what it adds to the text; whether the row goes on."""
        text = self._texts[row.index]
        token = row.extend(logits)
        piece = text.push(token, row.finish_reason)
        row.finish_reason = text.finish_reason
        return Event(row.index, token, piece, row.finish_reason), row.is_active

    def _end(self, row: Row) -> Event:
        """End a row that was cancelled."""
        row.finish_reason = "cancelled"
        return Event(row.index, None, self._texts[row.index].end("cancelled"), "cancelled")

    def _run(self, active: list[Row]) -> Logits:
        """Feed every active row its next tokens; logits [B, vocab]. Finished rows are idle, at past_len 0."""
        # The graph writes all L columns of every row. They fit: the row with most to read has been given L tokens in every
        # call so far, so no row has more cached than it has.
        length = min(self._chunk, max(row.num_pending for row in active))
        input_ids = np.zeros((self._caches.batch, length), np.int64)
        past_len, new_len = np.zeros((2, self._caches.batch), np.int32)
        for row in active:
            past_len[row.index] = row.num_cached
            tokens = row.take(length)
            new_len[row.index] = len(tokens)
            input_ids[row.index, : len(tokens)] = tokens
        return self._caches.run(input_ids, past_len, new_len)
