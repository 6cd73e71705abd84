"""The serving loop: many jobs on one device, in a batch that rows join and leave between any two tokens. Token ids only.

    scheduler = Scheduler(session, SchedulerLimits(max_rows=8), publish=print)
    scheduler.start()
    scheduler.submit(TextJob([1, 2, 3], SamplingParams(max_tokens=16)))

One turn of the loop reads a piece of one prompt (the prompts take turns) and then generates one token in every row whose
prompt has been read. A prompt's last word is read by that second call, so a row joins it as if it had always been there.
Both work on one block of caches: a call sees only the rows that it needs, and pads none of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from bilevel.errors import BilevelError, DeadEnd, Overloaded, ShuttingDown
from bilevel.runtime.backend.session import Caches, Routes, Session
from bilevel.runtime.generate.drafts import DraftBudget, DraftedCall, draft_for, follow
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import RowLogits, log_probabilities
from bilevel.runtime.schedule.admission import Admission
from bilevel.runtime.schedule.jobs import (
    FairQueue,
    Observer,
    SchedulerLimits,
    TextJob,
    TokenEvent,
    TokenRoutes,
    token_routes,
)
from bilevel.runtime.schedule.pacing import PrefillPacer
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.slots import Slots

_LOG = logging.getLogger("bilevel.scheduler")
Publish = Callable[[Sequence[TokenEvent]], None]


class Scheduler:
    """Runs jobs on one session. Everything but the loop itself may be called from any thread.

    publish: given the events, in the scheduler's thread; it must return quickly. publish_seconds: least time between two calls,
    unless a text begins or ends. On a small machine passing tokens on takes cores from the model: a wake-up for each
    token of a model that makes 400 a second costs it a tenth, and nobody reads that fast. prefixes: beginnings of texts that
    outlive the process; closed with the scheduler.
    """

    def __init__(
        self,
        session: Session,
        limits: SchedulerLimits,
        publish: Publish,
        observer: Observer | None = None,
        publish_seconds: float = 0.0,
        prefixes: PrefixStore | None = None,
    ) -> None:
        bundle = session.bundle
        self.bundle, self.limits, self._publish, self._observer = bundle, limits, publish, observer
        self.row_tokens = min(limits.row_tokens or bundle.max_positions, bundle.max_positions)
        # One token more than a row may hold: an idle row's column is written behind what it has cached.
        self._caches = session.allocate(limits.max_rows, bundle.round_up(self.row_tokens + 1))
        self._caches.reserve()
        self._views: dict[tuple[int, int], Caches] = {}
        self._view(limits.max_rows - 1, 1)  # a backend that cannot cut rows out refuses now
        self._slots, self._queue = Slots(limits.max_rows), FairQueue()
        self._admission = Admission(bundle, self._slots, self._caches, self.row_tokens, prefixes)
        self._budget = DraftBudget() if limits.speculation and self._caches.gives_scores else None
        self._pacer = PrefillPacer(limits.prefill_chunk or bundle.prefill_chunk)
        self._jobs: dict[Row, TextJob] = {}
        self._entering: TextJob | None = None
        self._outbox: list[TokenEvent] = []
        self._published, self._publish_seconds = 0.0, publish_seconds
        self._turn = 0
        self._mean_seconds = 1.0  # that a job keeps a row
        self._wake, self._is_closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, name="bilevel-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, *jobs: TextJob) -> None:
        """Queue jobs, all or none. Raises RequestError for one that cannot be served, Overloaded, ShuttingDown."""
        for job in jobs:
            job.check(self.bundle.vocab_size, self.row_tokens)
        with self._wake:
            if self._is_closing:
                raise ShuttingDown("the server is shutting down; ask another one, or this one when it is back")
            waiting, free = len(self._queue), self._slots.rows.count(None)
            if waiting + len(jobs) > self.limits.max_queue + free:
                wait = math.ceil((waiting + 1) * self._mean_seconds / self.limits.max_rows)
                raise Overloaded(f"{waiting} requests are waiting already; try again in {wait} s", min(max(wait, 1), 600))
            for job in jobs:
                self._queue.push(job)
            self._wake.notify()

    def cancel(self, *jobs: TextJob) -> None:
        """End jobs before the next step; each still gets its last event."""
        with self._wake:
            for job in jobs:
                job.cancel()
            self._wake.notify()

    def close(self, timeout: float) -> bool:
        """Refuse new jobs, finish the others for at most ``timeout`` seconds, then cancel them. Whether all were finished."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if not self._thread.is_alive():
            self._admission.close()
            return True
        self._thread.join(timeout)
        is_finished = not self._thread.is_alive()
        with self._wake:
            self.cancel(*self._queue, *self._jobs.values(), *filter(None, [self._entering]))
        self._thread.join()
        self._admission.close()
        return is_finished

    @property
    def is_closing(self) -> bool:
        """Whether new jobs are refused."""
        return self._is_closing

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    @property
    def gives_routes(self) -> bool:
        """Whether jobs may want routes: the graph has them, and the backend hands them over."""
        return self._caches.routes is not None

    @property
    def num_active(self) -> int:
        """Jobs that have a row."""
        return len(self._slots.active)

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of all rows."""
        return self.bundle.state_bytes(self._caches.batch, self._caches.capacity)

    @property
    def cache_use(self) -> float:
        """Share of the caches' tokens that are held, by running rows or for those that may continue them: 0 to 1."""
        return self._slots.num_cached / (self.limits.max_rows * self.row_tokens)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._queue or self._jobs or self._is_closing):
                    self._wake.wait()
                if not (self._queue or self._jobs):
                    return
            self.step()

    def step(self) -> None:
        """One turn: drop who left, admit who waits, read a piece of a prompt, generate a token in every row that has one."""
        self._outbox += self._drop_cancelled()
        self._admit()
        active = self._slots.active
        decoding = [row for row in active if self._takes_one(row)]
        if len(decoding) < len(active):
            self._deliver()  # what is there does not wait until a piece of a prompt is read
            self._outbox += self._guarded(self._prefill, [self._next_reader()], len(decoding))
            decoding = [row for row in self._slots.active if self._takes_one(row)]
        if decoding:
            self._outbox += self._guarded(self._decode, decoding)
        is_urgent = any(event.finish_reason is not None or event.is_first for event in self._outbox)
        if is_urgent or time.perf_counter() - self._published >= self._publish_seconds:
            self._deliver()

    def _deliver(self) -> None:
        """Pass on what has happened since the last time."""
        if self._outbox:
            events, self._outbox, self._published = self._outbox, [], time.perf_counter()
            self._publish(events)

    def _drop_cancelled(self) -> list[TokenEvent]:
        with self._wake:
            gone = self._queue.remove_cancelled()
        events = [self._end(job, None, "cancelled") for job in gone]
        return events + [self._end(job, row, "cancelled") for row, job in list(self._jobs.items()) if job.is_cancelled]

    def _admit(self) -> None:
        """Give free places to those who wait."""
        while self._slots.has_room:
            with self._wake:
                job = self._queue.pop(self._admission.is_ready)
                self._entering = job
            if job is None:
                return
            self._jobs[self._admission.enter(job)] = job  # without the lock: bringing a stored prefix takes its time
            self._entering = None

    def _view(self, first: int, count: int) -> Caches:
        if (first, count) not in self._views:
            self._views[first, count] = self._caches.rows(first, count)
        return self._views[first, count]

    def _takes_one(self, row: Row) -> bool:
        """Whether the row reads one token a step: its last, or each of a prompt that is scored."""
        return row.num_pending == 1 or self._jobs[row].scores_prompt

    def _next_reader(self) -> Row:
        """The row whose prompt is read next: they take turns."""
        reading = [row for row in self._slots.active if not self._takes_one(row)]
        row = next((row for row in reading if row.index > self._turn), reading[0])
        self._turn = row.index
        return row

    def _prefill(self, rows: list[Row], num_decoding: int) -> list[TokenEvent]:
        """Read a piece of one row's prompt, all but its last token."""
        row, start = rows[0], time.perf_counter()
        past = np.array([row.num_cached], np.int32)
        is_begun = row.num_cached > self._jobs[row].num_reused
        chunk = self._pacer.chunk(num_decoding, row.num_pending - 1, is_begun=is_begun)
        tokens = np.array([row.take(chunk)], np.int64)
        self._view(row.index, 1).run(tokens, past, np.array([tokens.size], np.int32))
        seconds = time.perf_counter() - start
        self._pacer.record_chunk(tokens.size, seconds, num_decoding=num_decoding)
        if self._observer is not None:
            self._observer.prefilled(tokens.size, seconds)
        return []

    def _decode(self, rows: list[Row]) -> list[TokenEvent]:
        """A token for each of ``rows``, and as many more as its draft is right about.

        Rows between them are idle; what is written there lies behind what they have cached.
        """
        start, first = time.perf_counter(), rows[0].index
        count = rows[-1].index - first + 1
        past_len = np.array([self._slots.num_cached_at(first + line) for line in range(count)], np.int32)
        drafts = self._drafts(rows, self._caches.capacity - int(past_len.max()) - 1)
        call = DraftedCall.of({row: row.index - first for row in rows}, count, drafts)
        view = self._view(first, count)
        logits = call.logits(view, view.run(call.input_ids, past_len, call.new_len))
        events = []
        for row in rows:
            events += self._follow(row, drafts.get(row, []), logits[row], view.routes, row.index - first)
        seconds = time.perf_counter() - start
        self._pacer.record_decode(seconds)
        if self._budget is not None:
            self._budget.record(len(rows), call.num_drafted, max(len(events), len(rows)), seconds)
        if self._observer is not None:
            self._observer.decoded(rows, first, None if drafts else view.routes, seconds)
            self._observer.drafted(call.num_drafted, max(0, len(events) - len(rows)))
        return events

    def _drafts(self, rows: list[Row], room: int) -> dict[Row, list[int]]:
        """Not for a row whose routes are wanted, which are those of one token, or that is read token by token."""
        if self._budget is None or not self._budget.allows(len(rows)):
            return {}
        jobs = ((row, self._jobs[row]) for row in rows)
        return draft_for([row for row, job in jobs if job.generates and not (job.wants_routes or row.num_pending > 1)], room)

    def _follow(
        self, row: Row, draft: list[int], logits: list[RowLogits], routes: Routes | None, line: int
    ) -> list[TokenEvent]:
        """The row's next tokens, or what the next of its prompt's is worth."""
        if row.num_pending:
            event = self._score(row, logits[0])
            return [] if event is None else [event]
        chosen = token_routes(routes, row, line) if self._jobs[row].wants_routes else None

        def extend(each: RowLogits) -> tuple[TokenEvent, bool]:
            event = self._extend(row, each, chosen)
            return event, event.finish_reason is None

        return follow(row, draft, logits, extend)

    def _score(self, row: Row, logits: RowLogits) -> TokenEvent | None:
        """The log-probability of the prompt's next token; the job's end where it was the last and nothing is generated."""
        job = self._jobs[row]
        logprobs = log_probabilities(logits, job.prompt[row.num_cached], job.num_logprobs or 0)
        if not math.isfinite(logprobs.chosen):
            return self._end(job, row, "error", "the model returned logits that are not finite")
        job.prompt_logprobs.append(logprobs)
        return None if job.generates or row.num_pending > 1 else self._end(job, row, "length")

    def _extend(self, row: Row, logits: RowLogits, routes: TokenRoutes | None) -> TokenEvent:
        """Choose the row's next token from logits [vocab]."""
        job = self._jobs[row]
        if not job.generates:
            return self._end(job, row, "length")
        try:
            token = row.extend(logits)
        except DeadEnd:
            return self._end(job, row, "dead_end")
        except BilevelError as error:
            return self._end(job, row, "error", str(error))
        logprobs = None if job.num_logprobs is None else log_probabilities(logits, token, job.num_logprobs)
        now, is_first = time.perf_counter(), job.last_token is None
        if self._observer is not None:
            self._observer.token(job, now)
        job.last_token = now
        if row.finish_reason is not None:
            self._end(job, row, row.finish_reason)
        return TokenEvent(job, token, row.finish_reason, logprobs, routes, is_first=is_first)

    def _guarded(self, call: Callable[..., list[TokenEvent]], rows: list[Row], *args: int) -> list[TokenEvent]:
        """A call of the graph; where it fails, its rows end as errors and the server goes on."""
        try:
            return call(rows, *args)
        except Exception:  # noqa: BLE001 - whatever it is, the other rows go on
            _LOG.exception("a call of the graph failed")
            message = "the model failed on this request; the server's log says why"
            return [self._end(self._jobs[row], row, "error", message) for row in rows if row in self._jobs]

    def _end(self, job: TextJob, row: Row | None, reason: str, error: str | None = None) -> TokenEvent:
        """Take a job out of the batch, or note that it never came to be there."""
        if row is not None:
            del self._jobs[row]
            self._slots.leave(row, is_whole=reason != "error")
        if job.started is not None:
            self._mean_seconds += 0.1 * (time.perf_counter() - job.started - self._mean_seconds)
        if self._observer is not None:
            self._observer.ended(job, reason)
        return TokenEvent(job, None, reason, error=error)
