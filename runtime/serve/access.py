"""Who may ask: under which names the server is known, which pages may use it, and the keys that open it.

A browser lets any page send requests to a server on its user's machine. Origin says which page that is; a page whose name was
made to point at this machine (DNS rebinding) passes for one of the server's own, but cannot hide its name in Host.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Collection
from pathlib import Path

from starlette.requests import Request

from bilevel.errors import RequestError
from bilevel.runtime.serve.refusal import ApiError

ANY = "*"


class Access:
    """What a request must show before anything of it is read.

    hosts: names, besides addresses, localhost and this machine's own, under which the server may be asked. origins: pages that
    may use it besides its own, as in "https://chat.example". ANY among them allows all. keys: None where no key is asked for.
    """

    def __init__(self, keys: Keys | None = None, hosts: Collection[str] = (), origins: Collection[str] = ()) -> None:
        self.keys, self.origins = keys, tuple(origin.rstrip("/").lower() for origin in origins)
        self._hosts = {host.lower().rstrip(".") for host in hosts} | {"localhost", *_own_names(socket.gethostname())}

    def check(self, request: Request, *, asks_key: bool) -> None:
        """Raises ApiError: 403 for another host or origin than the allowed ones, 401 without a key where one is asked for."""
        self._check_host(request.headers.get("host", ""))
        self._check_origin(request.headers.get("origin"), request.headers.get("host", ""))
        if asks_key and self.keys is not None:
            self.keys.find(request)

    def client(self, request: Request) -> str:
        """Whose turn in the queue a request takes: the key's, or the address's."""
        if self.keys is not None:
            return self.keys.find(request)
        return request.client.host if request.client is not None else ""

    def _check_host(self, host: str) -> None:
        name = _name(host)
        # Without a Host it is no browser.
        if not host or ANY in self._hosts or name in self._hosts or name.endswith(".localhost") or _is_address(name):
            return
        raise ApiError(
            403, f"this server is not known as {name[:60]!r}; ask it by its address, or start it with --allow-host NAME"
        )

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or ANY in self.origins or origin.lower() in self.origins:
            return
        if origin.partition("://")[2] != host:
            raise ApiError(
                403, "a page of another origin sent this request; only this server's own page may, and those of --allow-origin"
            )


def _own_names(name: str) -> set[str]:
    """This machine's name, whole and without its domain, and as neighbours on the local network find it (mDNS)."""
    name = name.lower().rstrip(".")
    label = name.partition(".")[0]
    return {each for each in (name, label, f"{name}.local", f"{label}.local") if label}


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Keys:
    """The keys that open the server, one on each line of a file. Raises RequestError where the file holds none."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RequestError(f"{path} is not UTF-8; write a key on a line, for example: openssl rand -hex 24") from None
        lines = (line.strip() for line in text.splitlines())
        self._digests = [_digest(line) for line in lines if line and not line.startswith("#")]
        if not self._digests:
            raise RequestError(f"{path} holds no key; write one on a line, for example: openssl rand -hex 24 > {path}")

    def find(self, request: Request) -> str:
        """The name under which a key's owner waits in the queue.

        Raises ApiError 401. Every key is compared, in constant time.
        """
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if kind.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            refused = ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")
            refused.headers["WWW-Authenticate"] = "Bearer"
            raise refused
        return f"key {matches.index(True)}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
