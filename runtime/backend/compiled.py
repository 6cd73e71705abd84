"""What TensorRT-RTX compiles on the device, kept from process to process.

A plan of TensorRT-RTX is finished on the GPU that runs it, kernel by kernel as shapes come up; done anew in every process that
takes seconds to a minute. What was compiled lies in the user's cache folder, one file per plan: ``$XDG_CACHE_HOME/bilevel``,
else ``~/.cache/bilevel``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bilevel.bundle.engines import Engine


def cache_file(engine: Engine) -> Path:
    """Where an engine's kernels are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "bilevel" / f"{engine.sha256[:32]}.rtx"


class CompiledKernels:
    """TensorRT-RTX's runtime cache of one engine.

    A file of another version or GPU is ignored, and so is a folder that cannot be written to. config: any runtime configuration
    of the engine.
    """

    def __init__(self, config: Any, file: Path) -> None:
        self._cache, self._file = config.create_runtime_cache(), file
        self._stored = b""
        try:
            self._stored = file.read_bytes()
        except OSError:
            pass
        if self._stored and not self._cache.deserialize(self._stored):
            self._stored = b""

    def serve(self, config: Any) -> None:
        """Let contexts of a configuration take what is there, and add to it."""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what has been compiled since it was read, in one step."""
        data = bytes(self._cache.serialize())
        if data == self._stored:
            return
        self._stored = data
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, delete=False) as new:
                new.write(data)
            os.replace(new.name, self._file)
        except OSError:
            pass  # a full disk or a read-only home costs the next start its time, nothing else
