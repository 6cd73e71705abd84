"""The server process: scheduler and web server together, from start to a shutdown that lets running answers finish."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import uvicorn

from bilevel.errors import RequestError
from bilevel.runtime.backend.select import open_session
from bilevel.runtime.backend.session import Session
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar.compiler import Compiler
from bilevel.runtime.schedule.jobs import SchedulerLimits
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.serve.access import Access, Keys
from bilevel.runtime.serve.answers import publish_on
from bilevel.runtime.serve.app import create_app
from bilevel.runtime.serve.connections import PatientProtocol, raise_file_limit
from bilevel.runtime.serve.encoder import PromptEncoder
from bilevel.runtime.serve.limits import choose_limits
from bilevel.runtime.serve.metrics import Metrics
from bilevel.runtime.serve.service import Grammars, HttpLimits, Service

PUBLISH_SECONDS = 1 / 60  # a screen shows no more changes
# That the model waits for Python's lock while an answer is written; Python's own 0.005 is a small model's step.
SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """uvicorn's server, which on the first signal refuses new work and waits for the answers under way."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float) -> None:
        super().__init__(config)
        self._scheduler, self._grace, self._draining = scheduler, grace, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then exit. Second: exit at once, whatever a thread waits for."""
        if self._draining:
            os._exit(128 + sig)
        self._draining = True
        loop = asyncio.get_running_loop() if _in_loop() else self._loop
        loop.call_soon_threadsafe(lambda: loop.create_task(self.drain()))

    async def drain(self) -> None:
        """Finish what runs, for at most the grace time, then let go of the connections."""
        self._draining = True
        try:
            await asyncio.to_thread(self._scheduler.close, self._grace)
            await asyncio.sleep(0.1)  # the last events are on their way to the clients
        finally:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def build(
    session: Session,
    name: str,
    limits: SchedulerLimits,
    http: HttpLimits,
    access: Access,
    loop: asyncio.AbstractEventLoop,
    prefixes: PrefixStore | None = None,
) -> tuple[Service, Metrics]:
    """The service on ``session``, its scheduler started, delivering to ``loop``."""
    bundle = session.bundle
    metrics = Metrics()
    scheduler = Scheduler(session, limits, publish_on(loop), metrics, PUBLISH_SECONDS, prefixes)
    metrics.watch(scheduler)
    tokenizer = BundleTokenizer(bundle.tokenizer_path)
    grammars = Grammars(Compiler(tokenizer, bundle.vocab_size, bundle.eos))
    encoder = PromptEncoder(bundle, scheduler.row_tokens)
    service = Service(name, scheduler, tokenizer, encoder, session.backend, grammars, access, http)
    scheduler.start()
    return service, metrics


def serve(args: argparse.Namespace) -> int:
    """Open the bundle and serve it; the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    keys = None if args.api_key_file is None else Keys(args.api_key_file)
    access = Access(keys, [args.host, *args.allow_host], args.allow_origin)
    session, why = open_session(
        args.bundle, args.backend, verify=not args.no_verify, threads=args.threads, library=args.library
    )
    limits = choose_limits(session, args.max_rows, args.capacity, args.max_queue)
    limits = replace(limits, speculation=not args.no_speculation)
    name = args.model_name or args.bundle.resolve().name
    listener = listen(args.host, args.port)
    http = HttpLimits(max_body=args.max_body)
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what lives as long as the server is not looked through again, which would stop all texts for a while
    prefixes = None if args.prefix_cache is None else PrefixStore(args.prefix_cache, session, args.prefix_cache_bytes)
    asyncio.run(run_server(session, name, limits, http, access, listener, args.grace, why=why, prefixes=prefixes))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is an error before anything is said."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --host or --port"
        ) from None
    return listener


def _greeting(name: str, listener: socket.socket, scheduler: Scheduler, why: str) -> str:
    """What the terminal shows when the server is ready."""
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    size = (
        f"{scheduler.limits.max_rows} rows of {scheduler.row_tokens} tokens, {scheduler.cache_bytes / 2**20:.0f} MiB of caches"
    )
    return " · ".join(filter(None, (f"serving {name} at {where}", size, why)))


async def run_server(
    session: Session,
    name: str,
    limits: SchedulerLimits,
    http: HttpLimits,
    access: Access,
    listener: socket.socket,
    grace: float,
    on_start: Callable[[Server], None] = lambda server: None,
    why: str = "",
    prefixes: PrefixStore | None = None,
) -> None:
    """Serve on ``listener`` until the server is told to exit; on_start is given the server before it begins.

    why: a line on what runs the model, for the greeting.
    """
    service, metrics = build(session, name, limits, http, access, asyncio.get_running_loop(), prefixes)
    config = uvicorn.Config(
        create_app(service, metrics),
        http=type("Protocol", (PatientProtocol,), {"stall_seconds": http.stall_seconds, "most": raise_file_limit()}),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config, service.scheduler, grace)
    on_start(server)
    scheduler = service.scheduler
    print(_greeting(name, listener, scheduler, why), file=sys.stderr, flush=True)
    try:
        await server.serve(sockets=[listener])
    finally:
        await asyncio.to_thread(scheduler.close, 0.0)
        service.encoder.close()
        await asyncio.to_thread(service.grammars.close)
