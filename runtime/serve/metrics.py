"""What Prometheus reads at /metrics: how busy the server is, how fast, and whether its routers still choose."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from bilevel.runtime.backend.session import Routes
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.schedule.jobs import TextJob
from bilevel.runtime.schedule.route_stats import RouteStats
from bilevel.runtime.schedule.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_WINDOW = 10.0  # seconds over which tokens per second are counted


class Metrics:
    """An ``Observer`` of the scheduler, and the page that Prometheus fetches."""

    def __init__(self) -> None:
        disable_created_metrics()  # the library's own addition: a second line of every counter
        self.registry = registry = CollectorRegistry()
        self._routes: RouteStats | None = None
        self._prompt = Counter("bilevel_prompt_tokens", "Prompt tokens read", registry=registry)
        self._generated = Counter("bilevel_generated_tokens", "Tokens generated", registry=registry)
        self._drafted = Counter("bilevel_drafted_tokens", "Tokens computed ahead", registry=registry)
        self._taken = Counter("bilevel_draft_tokens_taken", "Of those, tokens that texts went on with", registry=registry)
        self._reused = Counter("bilevel_reused_tokens", "Prompt tokens found in the caches", registry=registry)
        self._ended = Counter("bilevel_texts", "Texts that ended, and how", ["reason"], registry=registry)
        self._http = Counter("bilevel_http_requests", "Requests answered", ["status"], registry=registry)
        first = "Seconds from a request to its first token"
        self._first = Histogram("bilevel_time_to_first_token_seconds", first, buckets=_SECONDS, registry=registry)
        self._next = Histogram("bilevel_time_per_token_seconds", "Seconds between tokens", buckets=_SECONDS, registry=registry)
        self._decode = Histogram("bilevel_decode_step_seconds", "Seconds of a decode step", buckets=_SECONDS, registry=registry)
        self._prefill = Histogram("bilevel_prefill_seconds", "Seconds of a prefill chunk", buckets=_SECONDS, registry=registry)
        self._recent: deque[float] = deque()

    def watch(self, scheduler: Scheduler) -> None:
        """Add what the scheduler itself knows, and statistics over the routes where it gives any."""
        self._gauge("bilevel_rows", "Texts being generated", lambda: scheduler.num_active)
        self._gauge("bilevel_rows_limit", "Texts that can be generated at once", lambda: scheduler.limits.max_rows)
        self._gauge("bilevel_queue", "Texts that wait", lambda: scheduler.num_waiting)
        self._gauge("bilevel_queue_limit", "Texts that may wait", lambda: scheduler.limits.max_queue)
        self._gauge("bilevel_cache_use_ratio", "Share of the caches' tokens that are held", lambda: scheduler.cache_use)
        self._gauge("bilevel_tokens_per_second", "Tokens generated per second, over 10 s", self._tokens_per_second)
        if scheduler.gives_routes:
            self._routes = RouteStats(scheduler.bundle, scheduler.row_tokens)
            self._watch_routes(self._routes)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)

    def _watch_routes(self, routes: RouteStats) -> None:
        """Gauges by layer; each reads the statistics when it is asked."""
        for name, text, layers, read in (
            ("bilevel_route_attended_ratio", "Share of earlier tokens that a word reads", routes.layers, routes.attended),
            ("bilevel_route_blocks_hit_ratio", "Share of blocks that anybody read lately", routes.layers, routes.blocks_hit),
            (
                "bilevel_route_entropy_ratio",
                "Spread of the blocks read: 0 always the same, 1 all alike",
                routes.layers,
                routes.entropy,
            ),
            ("bilevel_expert_hit_ratio", "Share of experts that anybody used lately", routes.expert_layers, routes.experts_hit),
            (
                "bilevel_expert_entropy_ratio",
                "Spread of the experts: 0 always the same, 1 all alike",
                routes.expert_layers,
                routes.expert_entropy,
            ),
        ):
            gauge = Gauge(name, text, ["layer"], registry=self.registry)
            for layer in layers:
                gauge.labels(str(layer)).set_function(partial(read, layer))

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def responded(self, status: int) -> None:
        """A request was answered."""
        self._http.labels(str(status)).inc()

    def prefilled(self, tokens: int, seconds: float) -> None:
        """See ``Observer``."""
        self._prompt.inc(tokens)
        self._prefill.observe(seconds)

    def decoded(self, rows: Sequence[Row], first: int, routes: Routes | None, seconds: float) -> None:
        """See ``Observer``."""
        self._decode.observe(seconds)
        if self._routes is not None and routes is not None:
            self._routes.sample([(row.index - first, row.num_cached - 1) for row in rows], routes)

    def drafted(self, tokens: int, taken: int) -> None:
        """See ``Observer``."""
        self._drafted.inc(tokens)
        self._taken.inc(taken)

    def token(self, job: TextJob, now: float) -> None:
        """See ``Observer``."""
        self._generated.inc()
        if job.last_token is None:
            self._first.observe(now - job.submitted)
            self._prompt.inc()  # the last one, which a decode step reads
            self._reused.inc(job.num_reused)
        else:
            self._next.observe(now - job.last_token)
        self._recent.append(now)
        while self._recent[0] < now - _WINDOW:
            self._recent.popleft()

    def ended(self, job: TextJob, reason: str) -> None:
        """See ``Observer``."""
        self._ended.labels(reason).inc()

    def _tokens_per_second(self) -> float:
        start = time.perf_counter() - _WINDOW
        return sum(moment >= start for moment in list(self._recent)) / _WINDOW
