"""Work whose size a file decides, in a process of its own that may be killed: chat templates, tokenizers.

    with closing(Confined("bilevel.bundle.chat:answer_turn_end")) as worker:
        worker.ask({"source": "{{ messages }}", "special": {}, "names": ["</s>"]})

The child imports the function that is named ("module:function"), calls it with the argument, and answers questions by what that
returned. Arguments, questions and answers are JSON. A child that takes more time or memory than it may, or answers at greater
length, is killed; the next question starts another one. It can write no files, and it ends when its parent does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bilevel.errors import BilevelError

_MEMORY_SIGNALS = (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV)
_HEAD = 8  # bytes of a message's length, the lowest first
# Nothing of where the parent stands is imported: a folder may hold a json.py.
_START = "import sys; sys.path[:] = {path!r}; from bilevel.bundle.confined import answer_questions; answer_questions()"


@dataclass(frozen=True)
class Limits:
    """Of one question.

    cpu_seconds: that the child may compute, whole ones. wall_seconds: until the answer is there, however busy the machine is.
    memory: bytes beyond what it holds when it is ready. answer: bytes of JSON. start_...: the same until it is ready, all of
    its memory.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 15.0
    memory: int = 512 << 20
    answer: int = 16 << 20
    start_cpu_seconds: int = 30
    start_wall_seconds: float = 120.0
    start_memory: int = 4 << 30


class Overrun(BilevelError):
    """What was asked took more than it may; the message says of what ("took longer than 2 s and was stopped")."""


class WorkError(Exception):
    """The function raised an exception. kind: its class's name. fields: its attributes that JSON can hold."""

    def __init__(self, kind: str, message: str, fields: dict[str, Any]) -> None:
        super().__init__(message)
        self.kind, self.message, self.fields = kind, message, fields


class Confined:
    """A child that answers questions, one at a time; may be asked from any thread.

    Raises WorkError where the function fails on the argument, Overrun where that takes more than it may.
    """

    def __init__(self, function: str, argument: Any = None, limits: Limits = Limits()) -> None:
        self._function, self._argument, self._limits = function, argument, limits
        self._lock = threading.Lock()
        self._child: _Child | None = _Child(function, argument, limits)

    def ask(self, question: Any) -> Any:
        """The answer. Raises WorkError where the function raised an exception, Overrun where it took more than it may."""
        with self._lock:
            if self._child is None:
                self._child = _Child(self._function, self._argument, self._limits)
            try:
                return self._child.ask(question, self._limits.wall_seconds)
            except BaseException as error:
                if not isinstance(error, WorkError):  # an interrupt too: its answer would be taken for the next one's
                    self._end()
                raise

    def close(self) -> None:
        """End the child, even while another thread waits for its answer."""
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """One process, from its start to its end."""

    def __init__(self, function: str, argument: Any, limits: Limits) -> None:
        self._limits = limits
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=[each for each in sys.path if each])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self.kill = self._process.kill
        self.end = weakref.finalize(self, _end, self._process)
        """Kill it, and close its pipes."""
        try:
            self._cpu_seconds, self._memory = limits.start_cpu_seconds, limits.start_memory
            self.ask({"function": function, "argument": argument, "limits": asdict(limits)}, limits.start_wall_seconds)
            self._cpu_seconds, self._memory = limits.cpu_seconds, limits.memory
        except BaseException:
            self.end()
            raise

    def ask(self, question: Any, seconds: float) -> Any:
        end = time.monotonic() + seconds
        try:
            self._write(json.dumps(question).encode(), end)
            size = int.from_bytes(self._read(_HEAD, end), "little")
            if size > self._limits.answer:
                raise Overrun(f"gave an answer of more than {self._limits.answer >> 20} MiB and was stopped")
            answer = json.loads(self._read(size, end))
        except TimeoutError:
            raise Overrun(f"took longer than {seconds:g} s and was stopped") from None
        except (EOFError, BrokenPipeError):
            raise self._died() from None
        if "error" in answer:
            if answer["error"] == "MemoryError":
                raise self._too_much()
            if answer["error"] == "Overrun":
                raise Overrun(answer["message"])
            raise WorkError(answer["error"], answer["message"], answer["fields"])
        return answer["answer"]

    def _too_much(self) -> Overrun:
        return Overrun(f"took more than {self._memory >> 20} MiB and was stopped")

    def _died(self) -> Overrun:
        """Why the child is gone."""
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return Overrun(f"took longer than {self._cpu_seconds} s and was stopped")
        if status in _MEMORY_SIGNALS:
            return self._too_much()
        return Overrun(f"ended its process (status {status})")

    def _write(self, content: bytes, end: float) -> None:
        left = memoryview(len(content).to_bytes(_HEAD, "little") + content)
        while left:
            _wait(self._in, select.POLLOUT, end)
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._in, left[: 1 << 16]) :]

    def _read(self, size: int, end: float) -> bytes:
        content = bytearray()
        while len(content) < size:
            _wait(self._out, select.POLLIN, end)
            if not (piece := os.read(self._out, min(size - len(content), 1 << 20))):
                raise EOFError
            content += piece
        return bytes(content)


def _wait(file: int, event: int, end: float) -> None:
    """Until a pipe can be read or written. Raises TimeoutError."""
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def answer_questions() -> None:
    """What the child does: nothing but answer, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what a library prints is no answer
    setup = _next(questions)
    limits = Limits(**setup["limits"])
    _limit_memory(limits.start_memory)
    _limit_time(limits.start_cpu_seconds)
    try:
        module, _, name = setup["function"].partition(":")
        answer = getattr(importlib.import_module(module), name)(setup["argument"])
    except BaseException as error:  # noqa: BLE001 - tokenizers raise what is no Exception
        _reply(answers, _as_answer(error), limits.answer)
        return
    _limit_memory(limits.memory)
    _reply(answers, {"answer": None}, limits.answer)
    while True:
        question = _next(questions)
        _limit_time(limits.cpu_seconds)
        _reply(answers, _attempt(answer, question), limits.answer)


def _attempt(answer: Callable[[Any], Any], question: Any) -> dict[str, Any]:
    try:
        return {"answer": answer(question)}
    except BaseException as error:  # noqa: BLE001 - tokenizers raise what is no Exception
        return _as_answer(error)


def _as_answer(error: BaseException) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    fields = {name: value for name, value in vars(error).items() if isinstance(value, plain)}
    return {"error": type(error).__name__, "message": str(error)[:2000], "fields": fields}


def _next(questions: Any) -> Any:
    head = questions.read(_HEAD)
    content = questions.read(int.from_bytes(head, "little")) if len(head) == _HEAD else b""
    if not content:
        os._exit(0)  # the parent has gone
    return json.loads(content)


def _reply(answers: Any, answer: dict[str, Any], most: int) -> None:
    try:
        content = json.dumps(answer).encode()
    except MemoryError as error:
        content = json.dumps(_as_answer(error)).encode()
    if len(content) > most:
        content = json.dumps(_as_answer(Overrun(f"gave an answer of more than {most >> 20} MiB and was stopped"))).encode()
    answers.write(len(content).to_bytes(_HEAD, "little") + content)
    answers.flush()


def _limit_memory(memory: int) -> None:
    """No more than this on top of what there is; and no files, which nothing here has to write."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # where the system does not tell, or does not limit
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: int) -> None:
    """The processor's time: one question's, so that an idle child lives for ever and one whose parent was killed does not."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
