"""Beginnings of texts that outlive the process: what caches held of them, in a folder; a long system prompt is read once.

A file ``*.prefix`` is one line of JSON (format, fingerprint, number of tokens, CRC-32 of the rest), the tokens as int32, then
each cache of the bundle's state for one row, in the graph's order. The fingerprint covers the bundle's files and the backend,
since another model's caches would be taken for this one's without a sign. Files are written by a thread of their own to a
temporary name and renamed; of a damaged one nothing is used, and it is removed. One process at a time has the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.tensors import DTYPES
from bilevel.errors import RequestError
from bilevel.folders import locked
from bilevel.runtime.backend.session import Caches, Session
from bilevel.runtime.schedule.slots import Slots, common_prefix

FORMAT, SUFFIX, LEAST_TOKENS = 1, ".prefix", 64
_HEADER, _PENDING = 4096, 2  # longest header; prefixes that may wait to be written, each as large as a row
_KEEP_SECONDS = 10.0  # that storing what the rows hold may take when a server ends
_LOG = logging.getLogger("bilevel.prefixes")


@dataclass
class Prefix:
    """One file. size: bytes; used: when it was last written or read, seconds."""

    path: Path
    tokens: list[int]
    size: int
    used: float


class PrefixStore:
    """The folder of one bundle's prefixes, ``most_bytes`` at most; the least recently used give way.

    Raises RequestError where the folder holds another bundle's, is another server's or cannot be written.
    """

    def __init__(self, folder: Path, session: Session, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        bundle = session.bundle
        self._specs = [spec for spec, _ in bundle.graph.state]
        self._block_size = bundle.block_size
        files = sorted((name, record.sha256) for name, record in bundle.files.items())
        state = [(spec.name, spec.dtype, spec.shape) for spec in self._specs]
        told = json.dumps([FORMAT, session.backend, files, state], default=list)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        self._lock, self._guard = threading.Lock(), ExitStack()
        with ExitStack() as guard:
            self._entries = self._scan(guard)
            self._guard = guard.pop_all()
        self._waiting: queue.Queue[tuple[list[int], list[NDArray[Any]]] | None] = queue.Queue(_PENDING)
        self._writer = threading.Thread(target=self._write_all, name="bilevel-prefixes", daemon=True)
        self._writer.start()

    def _scan(self, guard: ExitStack) -> list[Prefix]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            guard.enter_context(locked(self.folder))
            for path in self.folder.glob(f".*{SUFFIX}.partial"):
                path.unlink()  # of a process that was killed
            found = [self._read_head(path) for path in sorted(self.folder.glob(f"*{SUFFIX}")) if path.is_file()]
        except BlockingIOError:
            raise RequestError(
                f"--prefix-cache {self.folder} is in use by another server; name a folder of its own for each"
            ) from None
        except OSError as error:
            raise RequestError(
                f"--prefix-cache {self.folder} cannot be used ({error.strerror or error}); name a folder that can be written"
            ) from None
        return self._fitting([each for each in found if each is not None], 0)

    def _read_head(self, path: Path) -> Prefix | None:
        """What a file holds; None where it is damaged. Raises RequestError for another bundle's."""
        with path.open("rb") as file:
            header = _header(file.readline(_HEADER))
            if header is not None and header["fingerprint"] != self.fingerprint:
                raise RequestError(
                    f"--prefix-cache {self.folder} holds prefixes of another bundle or backend ({path.name}); "
                    "name another folder, or remove this one"
                )
            status = path.stat()
            size = 0 if header is None else 4 * min(header["tokens"], status.st_size)
            tokens = file.read(size)
        if header is None or len(tokens) != 4 * header["tokens"]:
            _LOG.warning("%s is damaged and removed", path)
            path.unlink(missing_ok=True)
            return None
        return Prefix(path, np.frombuffer(tokens, np.int32).tolist(), status.st_size, status.st_mtime)

    def longest(self, prompt: Sequence[int]) -> tuple[Prefix | None, int]:
        """(file, length) of the longest stored beginning of ``prompt``, less its last token, which must be run."""
        wanted = prompt[:-1]
        with self._lock:
            lengths = [(common_prefix(each.tokens, wanted), each) for each in self._entries]
        length, best = max(lengths, key=lambda pair: pair[0], default=(0, None))
        return (best, length) if length >= LEAST_TOKENS else (None, 0)

    def load(self, prefix: Prefix) -> list[NDArray[Any]] | None:
        """Caches of one row [1, ...] as ``Caches.write_prefix`` takes them; None where they are damaged, and then forgotten."""
        try:
            parts = self._read(prefix)
        except (OSError, ValueError) as error:
            _LOG.warning("%s is not used: %s", prefix.path, error)
            with self._lock:  # it may have given way to another one meanwhile
                self._entries = [each for each in self._entries if each is not prefix]
            _remove(prefix.path)
            return None
        prefix.used = time.time()
        with suppress(OSError):
            os.utime(prefix.path)
        return parts

    def _read(self, prefix: Prefix) -> list[NDArray[Any]]:
        """Raises ValueError for what is not as it was written."""
        with prefix.path.open("rb") as file:
            header = _header(file.readline(_HEADER))
            content = np.fromfile(file, np.uint8)
        expected = self._content_bytes(len(prefix.tokens))
        if header is None or header["tokens"] != len(prefix.tokens) or content.size != expected:
            raise ValueError("its size is not what it says")
        if zlib.crc32(content.data) != header["crc32"] or header["fingerprint"] != self.fingerprint:
            raise ValueError("its checksum differs")
        parts, start = [], len(prefix.tokens) * 4
        for spec in self._specs:
            end = start + spec.num_bytes(self._sizes(len(prefix.tokens)))
            shape = spec.resolve(self._sizes(len(prefix.tokens)))
            parts.append(content[start:end].view(DTYPES[spec.dtype].numpy).reshape(shape))
            start = end
        return parts

    def _sizes(self, tokens: int) -> dict[str, int]:
        return {"batch": 1, "capacity": tokens, "num_blocks": tokens // self._block_size}

    def _head(self, tokens: int, checksum: int) -> bytes:
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "tokens": tokens, "crc32": checksum}
        return json.dumps(header).encode() + b"\n"

    def _content_bytes(self, tokens: int) -> int:
        """Of a file, without its first line."""
        return 4 * tokens + sum(spec.num_bytes(self._sizes(tokens)) for spec in self._specs)

    def bring(self, prompt: Sequence[int], slots: Slots, caches: Caches, source: int, length: int) -> tuple[int, int]:
        """(place, length) of the longest beginning of a prompt that a place holds, given that ``source`` holds ``length``
        tokens: what is stored and longer is put into a free place first, and what deserves to be stored is.

        Where that fails, the prompt is read anew.
        """
        try:
            stored, held = self.longest(prompt)
            if stored is not None and held > length and (parts := self.load(stored)) is not None:
                target = slots.choose(0, 0)
                slots.hold(target, [])
                caches.write_prefix(target, parts, held)
                slots.hold(target, prompt[:held])
                return target, held
            # What two texts have in common and go on from differently is a beginning that others will have too.
            if length < len(slots.cached(source)) and not self._waiting.full() and self._wants(prompt[:length]):
                self._offer(prompt[:length], caches.read_prefix(source, length))
        except Exception:  # noqa: BLE001 - whatever it is, the loop goes on
            _LOG.exception("a stored prefix is not used")
            return source, common_prefix(slots.cached(source), prompt[:length])
        return source, length

    def keep(self, slots: Slots, caches: Caches) -> None:
        """Store what the places hold, as far as that takes no longer than a server's end may."""
        deadline = time.monotonic() + _KEEP_SECONDS
        for index in range(len(slots.rows)):
            tokens = slots.cached(index)
            if self._wants(tokens) and time.monotonic() < deadline:
                self._offer(tokens, caches.read_prefix(index, len(tokens)))

    def _wants(self, tokens: Sequence[int]) -> bool:
        """Whether a beginning is long enough, has room, and is not held already."""
        size = len(self._head(len(tokens), 2**32 - 1)) + self._content_bytes(len(tokens))
        with self._lock:
            held = any(common_prefix(each.tokens, tokens) == len(tokens) for each in self._entries)
        return len(tokens) >= LEAST_TOKENS and size <= self.most_bytes and not held

    def _offer(self, tokens: Sequence[int], parts: list[NDArray[Any]]) -> None:
        self._waiting.put((list(tokens), parts))

    def flush(self) -> None:
        """Wait until what was offered is written."""
        self._waiting.join()

    def close(self) -> None:
        """Write what waits, then end."""
        self._waiting.put(None)
        self._writer.join()
        self._guard.close()

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._write(*item)
            except Exception as error:  # noqa: BLE001 - who offers must not wait for a thread that is gone
                _LOG.warning("a prefix of %d tokens is not kept: %s", len(item[0]), error)
            finally:
                self._waiting.task_done()

    def _write(self, tokens: list[int], parts: list[NDArray[Any]]) -> None:
        content = [np.array(tokens, np.int32), *(np.ascontiguousarray(part) for part in parts)]
        checksum = 0
        for part in content:
            checksum = zlib.crc32(part.reshape(-1).view(np.uint8).data, checksum)
        head = self._head(len(tokens), checksum)
        size = len(head) + sum(part.nbytes for part in content)
        name = hashlib.sha256(content[0].tobytes()).hexdigest()[:32] + SUFFIX
        partial, path = self.folder / f".{name}.partial", self.folder / name
        try:
            with partial.open("wb") as file:
                file.write(head)
                for part in content:
                    file.write(part.reshape(-1).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            self._make_room(size, tokens)  # only now: a full disk costs nothing of what there was
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._entries.append(Prefix(path, tokens, size, time.time()))

    def _make_room(self, size: int, tokens: list[int]) -> None:
        """Drop what the new one says too, then the least recently used."""
        with self._lock:
            kept = [each for each in self._entries if common_prefix(each.tokens, tokens) < len(each.tokens)]
            gone = [each for each in self._entries if each not in kept]
            self._entries = self._fitting(kept, size)
        for each in gone:
            _remove(each.path)

    def _fitting(self, entries: list[Prefix], size: int) -> list[Prefix]:
        """The most recently used that leave room for ``size`` bytes; the others are removed."""
        kept = sorted(entries, key=lambda each: each.used)
        while kept and size + sum(each.size for each in kept) > self.most_bytes:
            _remove(kept.pop(0).path)
        return kept


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _header(line: bytes) -> dict[str, Any] | None:
    """A file's first line; None where it is none."""
    try:
        header = json.loads(line)
        numbers = [header[name] for name in ("tokens", "crc32")]
        is_whole = header["format"] == FORMAT and isinstance(header["fingerprint"], str)
        return header if is_whole and all(type(number) is int and number >= 0 for number in numbers) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
