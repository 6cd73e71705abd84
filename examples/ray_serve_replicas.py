"""Several replicas of a bundle behind Ray Serve: each a whole ``bilevel serve`` of its own, with its own scheduler and caches.

    pip install 'bilevel[cpu,serve]' 'ray[serve]'
    python examples/ray_serve_replicas.py build/example-bundle --replicas 2
    curl http://127.0.0.1:8000/v1/models

Ray Serve gives each request to the replica that has least to do. A conversation's next turn may thus come to another replica,
which reads the whole prompt again; where that costs too much, route by user in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.schedule.jobs import SchedulerLimits
from bilevel.runtime.serve.access import Access
from bilevel.runtime.serve.app import create_app
from bilevel.runtime.serve.server import build
from bilevel.runtime.serve.service import HttpLimits


class Replica:
    """One scheduler and its web application. threads: for ONNX Runtime; replicas on one machine share its cores."""

    def __init__(self, bundle: str, capacity: int, threads: int) -> None:
        session = OnnxSession.open(bundle, threads=threads)
        limits, name = SchedulerLimits(row_tokens=capacity), Path(bundle).resolve().name
        self._service, metrics = build(session, name, limits, HttpLimits(), Access(), asyncio.get_event_loop())
        self._app = create_app(self._service, metrics)

    async def __call__(self, request: Request) -> Response:
        """Hand the request to the application, and what it sends on as it comes."""
        body, sent = await request.body(), asyncio.Queue[dict[str, Any]]()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return unread.pop() if unread else await request.receive()

        async def send(message: Any) -> None:
            await sent.put(dict(message))

        work = asyncio.create_task(self._app(request.scope, receive, send))
        start = await sent.get()

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while (message := await sent.get()).get("more_body"):
                    yield message["body"]
                yield message.get("body", b"")
            finally:
                work.cancel()  # a client that went away frees its row

        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return StreamingResponse(pieces(), start["status"], headers)

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose scheduler has died."""
        if not self._service.scheduler.is_alive:
            raise RuntimeError("the scheduler has stopped")


def deploy(bundle: Path, replicas: int, *, capacity: int, threads: int, port: int) -> None:
    """Start Ray Serve on 127.0.0.1 with ``replicas`` of the bundle."""
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(Replica, name="bilevel", num_replicas=replicas, max_ongoing_requests=64)
    serve.run(deployment.bind(str(bundle.resolve()), capacity, threads))


def main() -> None:
    """Deploy and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export")
    parser.add_argument("--replicas", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens of one text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each replica (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    args = parser.parse_args()
    ray.init(num_cpus=args.replicas + 1, include_dashboard=False)
    deploy(args.bundle, args.replicas, capacity=args.capacity, threads=args.threads, port=args.port)
    try:
        asyncio.run(asyncio.Event().wait())
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
