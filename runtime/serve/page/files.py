"""The page's files and under which addresses they are served. They hold nothing of the model: no key is asked for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# What the page may load and ask: this server. Its scripts cannot turn text into markup, whatever a model writes.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def _address(path: Path) -> str:
    return "/" if path.suffix == ".html" else f"/page/{path.name}"


FILES = {_address(path): path for path in sorted(_FOLDER.iterdir()) if path.suffix in _KINDS}
"""Addresses to files."""


def page_routes() -> list[Route]:
    """A route for each file, read once."""
    return [Route(address, _shown(path)) for address, path in FILES.items()]


def _shown(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content, kind = path.read_text(encoding="utf-8"), _KINDS[path.suffix]

    async def show(request: Request) -> Response:
        # Another version of the server has other scripts, which must not meet the old ones.
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return show
