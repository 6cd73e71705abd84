"""A process of its own for one side of a measurement, so that its memory and its library settings are its own.

worker = Worker(Side, spec, threads=2)
worker.call("decode", 8)  # Side(spec).decode(8), over there
worker.close()
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bilevel.errors import BilevelError

# Where numpy's linear algebra reads its number of threads, once, when it is loaded.
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """os.environ with ``values`` for a while: a process that starts meanwhile inherits them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Any, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The other process: build the object, then answer (method, arguments) until the pipe closes."""
    target = None
    try:
        target = factory(*args)
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(target, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        pass  # the other side has left, or Ctrl-C reached both
    except (BilevelError, MemoryError, OSError) as error:
        pipe.send((False, str(error) or "out of memory; give shorter contexts with --contexts"))


class Worker:
    """An object in a process of its own; its errors are raised here as BilevelError.

    factory, args: picklable; the object is ``factory(*args)``. threads: for numpy's linear algebra over there.
    environment: further variables for the process.
    """

    def __init__(
        self, factory: Callable[..., Any], *args: Any, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args), daemon=True)
        with _environment({**dict.fromkeys(_THREADS, str(threads)), **(environment or {})}):
            self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the object and wait for its result."""
        return self._receive((method, args))

    def _receive(self, request: tuple[str, tuple[Any, ...]] | None = None) -> Any:
        try:
            if request is not None:
                self._pipe.send(request)
            succeeded, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise BilevelError(
                f"a measuring process ended with status {self._process.exitcode}"
                + (" (the system kills a process that needs more memory than there is)" if self._process.exitcode == -9 else "")
                + "; give shorter contexts with --contexts"
            ) from None
        if not succeeded:
            self.close()
            raise BilevelError(result)
        return result

    def close(self) -> None:
        """End the process and give its memory back."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
