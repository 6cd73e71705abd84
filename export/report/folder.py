"""The report of ``bilevel check``: what its fields mean, and the folder that ``--report`` writes.

``check_bundle`` returns the report as a plain dict, ``--json`` prints it, ``report.json`` holds it. ``REPORT_SCHEMA`` is its
JSON Schema (version 2), with a description of every field. What a reader has to know:

- Rates lie in 0..1. An error is the largest absolute difference over the largest magnitude of the reference tensor. KL and
  losses are in nats a token. A margin is the distance between the last kept and the first dropped score over the larger of
  their magnitudes, so that it has no unit.
- null means "not applicable". JSON has no infinity and no NaN: ``report_json`` writes null for them too, which concerns errors
  and distances of a graph whose numbers are not finite (those never pass).
- Layers count from 0. Level 1 and the embedding belong to no layer.

    schema, passed         2; whether all verdicts hold
    verdicts               structure, selection, computation, end_to_end, invariants; activations with rounded weights
    bundle, against        the two folders; model_sha256 and checkpoint_sha256 say what exactly was compared
    precision, weights     float32, float16 or bfloat16; fp32, int8 or int4
    backend, executions    what ran both sides; what ran the routed nodes (the portable bodies, the CPU kernels)
    model, data            the model's shape; the text, its length and the sizes of the calls it is cut into
    structure              nodes and attributes of the graph that are not the model's
    selection              per router: equal sets, excused and unexcused differences, a histogram of its margins (``margins``:
                           base-10 logarithms) and what rounding may take of them (``tolerance``)
    computation            per tensor: its error, the error that PyTorch itself makes in this precision (``floor``), the limit
    end_to_end             the shipped file alone: next-token distribution and greedy text, with intervals made by ``method``
    invariants             laws that hold whatever the weights are
    activations, effect    only with int8 or int4 weights: the cost of rounding activations, judged; what the rounding of the
                           weights changed, not judged
    words                  the judged text token by token, each with the routers that differ there and its smallest margin
    failure                where it starts: the first router or tensor that fails, the graph's nodes to look at, and the smallest
                           input that shows it
    seconds                how long the check took

``order`` of routers and tensors is one order, the graph's: the lowest that fails is where a fault starts, and everything after
it may only follow from it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from bilevel.errors import RequestError
from bilevel.export.report.html import GENERATOR, render_page
from bilevel.export.report.schema import REPORT_SCHEMA

__all__ = ["JSON_FILE", "PAGE_FILE", "REPORT_SCHEMA", "check_report_folder", "report_json", "write_report"]

JSON_FILE, PAGE_FILE = "report.json", "index.html"


def report_json(report: dict[str, Any], indent: int | None = None) -> str:
    """The report as standard JSON in ASCII: infinite numbers and NaN become null."""
    return json.dumps(_finite(report), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_report_folder(folder: Path) -> None:
    """Raise RequestError where a report could not be written, so that a long check need not run first.

    Files of the same names are replaced only if they come from here.
    """
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise RequestError(f"{nearest} is not a folder; give another one for the report")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{nearest} may not be written to; give another folder for the report")
    for name, ours in ((PAGE_FILE, _is_our_page), (JSON_FILE, _is_our_json)):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not ours(path):
            raise RequestError(f"{path} is no report of bilevel and stays as it is; give another folder for the report")


def _is_our_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return GENERATOR in file.read(2000)
    except OSError:
        return False


def _is_our_json(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "verdicts"} <= found.keys()


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write ``report.json`` and ``index.html`` into ``folder``, which is made if need be; returns the page's path.

    Both files are complete before either takes its name; earlier reports are replaced and other files stay. Raises RequestError.
    """
    folder = Path(folder)
    check_report_folder(folder)
    contents = {JSON_FILE: report_json(report, indent=1) + "\n", PAGE_FILE: render_page(report)}
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial[name].write_text(content, encoding="utf-8", newline="\n")
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise RequestError(
            f"the report could not be written into {folder} ({error.strerror or error}); give another folder"
        ) from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder / PAGE_FILE
