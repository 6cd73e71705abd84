"""``bilevel serve``: a bundle over HTTP, many users on one device."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bilevel.errors import RequestError, require
from bilevel.runtime.backend.select import MOST_THREADS, add_backend_options
from bilevel.runtime.cli.sampling import add_speculation_option

EPILOG = """\
  bilevel serve my-bundle                            http://127.0.0.1:8000: a page to try it, and for programs
                                                       /v1   OpenAI's API (models, completions, chat/completions,
                                                             responses)
                                                       /v2   Open Inference Protocol (KServe, Triton's clients)
                                                       /metrics for Prometheus, /openapi.json
  bilevel serve my-bundle --host 0.0.0.0 --api-key-file keys.txt     reachable from other machines, with a key

No other page than the server's own may use it from a browser, and it answers to addresses, localhost and this machine's name:
--allow-origin and --allow-host widen that. A client that takes nothing of its answer for a minute is cut off; 1,000 are served.
A container has a name of its own: give --allow-host NAME, under which the machine is asked.

One key a line; lines that begin with # are comments. Ctrl-C, or SIGTERM, refuses new requests and lets running answers finish
for --grace seconds; a second one ends at once. The server speaks plain HTTP: put a proxy that does TLS in front of it.
Behind one, give --allow-host NAME where it passes Host on (nginx: proxy_set_header Host $http_host), or --allow-origin
https://NAME where it does not.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by bilevel export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    add_backend_options(parser)
    add_speculation_option(parser)
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--max-rows", type=int, metavar="N", help="texts generated at once (default: 8, or the engine's most)")
    parser.add_argument("--max-queue", type=int, default=64, metavar="N", help="texts that may wait (default: %(default)s)")
    parser.add_argument(
        "--capacity",
        type=int,
        metavar="TOKENS",
        help="prompt and text of one row (default: the engine's, or the model's if a quarter of the free memory holds it)",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="ask for one of these keys (default: open to all)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which clients may ask, besides addresses, localhost and this machine's own; may be repeated; *: any",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page, as in https://chat.example, that may use the server from a browser; may be repeated; *: any",
    )
    parser.add_argument("--max-body", type=int, default=4 << 20, metavar="BYTES", help="longest request (default: %(default)s)")
    parser.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep what was read of prompts' beginnings in this folder, so that a long system prompt is ready after a restart",
    )
    parser.add_argument(
        "--prefix-cache-bytes", type=int, default=4 << 30, metavar="BYTES", help="most of that folder (default: %(default)s)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="for running answers (default: %(default)g)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: one per core (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of sizes and hashes")


def main(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    _check(args)
    for name in ("starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2"):
        require(name)
    from bilevel.runtime.serve.server import serve

    return serve(args)


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is opened."""
    for name, least, most in (
        ("port", 0, 65535),
        ("max_rows", 1, 1024),
        ("max_queue", 0, 1 << 20),
        ("capacity", 1, 1 << 30),
        ("max_body", 1, 1 << 40),
        ("prefix_cache_bytes", 1, 1 << 50),
        ("grace", 0, 1e9),
        ("threads", 0, MOST_THREADS),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise RequestError(f"--{name.replace('_', '-')} {value} must lie between {least} and {most:g}")
    if args.api_key_file is not None and not os.access(args.api_key_file, os.R_OK):
        raise RequestError(
            f"--api-key-file {args.api_key_file} cannot be read; write a key into it: openssl rand -hex 24 > FILE"
        )
