"""A process that compiles a stranger's grammar first, to see what it costs: one that takes too long takes it down, no more.

llguidance counts its work, but not all of it: an intersection of a few short patterns compiles for hours. What the worker has
compiled in time is compiled again where it is used, which takes as long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping

from bilevel.errors import RequestError
from bilevel.runtime.grammar.library import Vocabulary, open_matcher, open_tokenizer
from bilevel.runtime.grammar.sources import one_line

SECONDS, START_SECONDS, MEMORY_BYTES = 2.0, 30.0, 1 << 30


class Worker:
    """The process, started when it is first needed; one thread at a time may use it.

    special: {id: name} of the tokens that grammars may name. seconds: for one grammar.
    """

    def __init__(self, special: Mapping[int, str], seconds: float = SECONDS) -> None:
        self._special, self._seconds = dict(special), seconds
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str, name: str) -> None:
        """Raises RequestError, naming ``name``, for a grammar that is wrong or takes too long."""
        answer = self._ask(grammar)
        if answer is None:
            raise RequestError(f"{name} takes more than {self._seconds:g} s or too much memory to compile; simplify it")
        if answer:
            raise RequestError(f"{name} cannot be followed: {one_line(answer)}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, grammar: str) -> str | None:
        """What is wrong with the grammar, "" for nothing, None where the process did not survive it."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the server, which lets running answers finish
            )
            if self._exchange(self._special, START_SECONDS) is None:
                raise OSError("the process that checks grammars does not start")
        return self._exchange(grammar, self._seconds)

    def _exchange(self, message: object, seconds: float) -> str | None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = threading.Timer(seconds, process.kill)
        deadline.start()
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            deadline.cancel()
        if not line.endswith(b"\n"):
            self.close()
            return None
        return str(json.loads(line))


def main() -> None:
    """Answer what is wrong with each grammar, one a line; the first line is what the grammars may name."""
    special = {int(token): str(name) for token, name in json.loads(sys.stdin.buffer.readline()).items()}
    eos = max((*special, 255)) + 1
    # Single bytes: what compiling costs hardly depends on the vocabulary.
    tokens = [bytes([token]) if token < 256 and token not in special else b"" for token in range(eos + 1)]
    vocabulary = Vocabulary(tokens, {**special, eos: "<eos>"}, eos, lambda text: list(text.encode()))
    tokenizer = open_tokenizer(vocabulary, [eos])
    _answer("")
    while line := sys.stdin.buffer.readline():
        _limit()
        matcher = open_matcher(tokenizer, json.loads(line))
        if not matcher.is_error():
            matcher.compute_bitmask()
        _answer(matcher.get_error())


def _answer(message: str) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit() -> None:
    """Also ends where the one who would kill it has gone."""
    try:
        import resource
    except ImportError:
        return  # no such limits on this system
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + 2 * SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
