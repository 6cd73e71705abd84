"""A checkpoint in the place of a bundle: exported for the time of a measurement, so that the device runtime answers for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bilevel.errors import require
from bilevel.export.decoder.bundle import export_bundle
from bilevel.export.decoder.source import checkpoint_folder
from bilevel.export.route.merge import merged


@contextmanager
def exported(source: Path, adapter: Path | None, on_stage: Callable[[str], None]) -> Iterator[tuple[Path, Path]]:
    """(bundle, checkpoint) of a checkpoint folder, a GGUF file or a name on the Hub, with an adapter joined to it or without.

    What is written lies in a temporary folder. Raises BilevelError.
    """
    for name in ("onnx", "onnxscript", "safetensors"):
        require(name)
    with tempfile.TemporaryDirectory(prefix="bilevel-quality-") as folder:
        target = Path(folder) / "bundle"
        with checkpoint_folder(source, target, on_stage) as checkpoint, merged(adapter, checkpoint) as routed:
            export_bundle(routed, target, on_stage=on_stage)
            yield target, routed
