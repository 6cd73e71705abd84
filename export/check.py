"""Parity of a bundle with the checkpoint it came from: selection, computation, end to end (design section 9).

The report is a plain dict, the same that ``bilevel check --json`` prints and ``bundle.json`` records in short:

    passed            bool, all of the below
    bundle, against   folders; model_sha256, checkpoint_sha256: what was compared
    weights           the format of the file's weights; PyTorch's are rounded alike for everything that is judged
    executions        what ran the routed nodes: "bodies" (any ONNX Runtime), "CPU kernels" (where the library is installed);
                      selection and computation hold all of them to the same, end to end is the last one's
    data              where the tokens came from, and how many
    attributes        one entry per attribute of a routed node that differs from the model's: name, attribute, graph, model
    selection         one entry per router: rows, exact_rate, jaccard, excused, unexcused, smallest_margin, example
    computation       one entry per tensor: error (over the largest magnitude), limit
    end_to_end        teacher_forced (kl_mean, kl_max, top1_agreement), greedy (agreed), chunking (error)
    activations       only with int8 or int4 weights: the shipped file, which rounds activations too (kl_mean, limit)
    effect            only with them, and not judged: routes, kl_mean, top1_agreement, loss_before and loss_after of the shipped
                      file against the checkpoint as it was trained
    seconds           how long it took
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel.checkpoint import load_model
from bilevel.config import ModelConfig
from bilevel.config_json import config_to_dict
from bilevel.export import end_to_end
from bilevel.export.bundle import FORMAT, FORMAT_VERSION, GRAPH_FILE, MANIFEST, describe_file
from bilevel.export.judge import COMPUTATION_LIMIT, Array, Computation, Selection
from bilevel.export.probe import open_judged, open_probe, open_shown
from bilevel.export.quantise import FORMATS
from bilevel.export.replay import Replay
from bilevel.export.rounding import Effect, round_weights
from bilevel.model import CausalLM
from bilevel.plugins.cpu_library import find_cpu_library
from bilevel.plugins.errors import BundleError, RequestError

HELD_OUT = "heldout.txt"


def read_manifest(bundle: Path) -> dict[str, Any]:
    """``bundle.json``, or BundleError."""
    path = bundle / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{bundle} holds no {MANIFEST}; make a bundle with: bilevel export CHECKPOINT {bundle}") from None
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again with --force") from None
    found = (manifest.get("format"), manifest.get("format_version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise BundleError(
            f"{path} has format {found[0]} version {found[1]}, this bilevel checks {FORMAT} version {FORMAT_VERSION}; "
            "export the bundle again with --force"
        )
    kinds = {"files": dict, "config": dict, "precision": str}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path} does not give {key} as it should; export the bundle again with --force")
    return dict(manifest)


def _verify(bundle: Path, manifest: dict[str, Any], config: ModelConfig) -> None:
    """The bundle's files must be the ones that were exported, and from a model of this shape."""
    for name, entry in manifest["files"].items():
        path = bundle / name
        if not path.is_file() or describe_file(path) != entry:
            raise BundleError(f"{path} is missing or not the file that was exported; export the bundle again with --force")
    if manifest["config"] != json.loads(json.dumps(config_to_dict(config))):
        raise BundleError(f"{bundle} was exported from a model of another configuration; give the checkpoint that it came from")


def token_ids(bundle: Path, checkpoint: Path, config: ModelConfig, data: Path | None, count: int) -> tuple[Array, str]:
    """``count`` token ids to check on and where they come from: ``data``, the checkpoint's held-out text, or seeded noise."""
    path = data or (checkpoint / HELD_OUT if (checkpoint / HELD_OUT).is_file() else None)
    if path is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, count), "random token ids (seed 0)"
    from tokenizers import Tokenizer

    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}); give a text file with --data") from None
    # Enough text for the tokens asked for, without encoding a whole book.
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text[: count * 16]).ids[:count]
    if len(ids) < count:
        raise RequestError(
            f"{path} holds only {len(ids)} tokens, but {count} are to be checked; give a longer text or --tokens"
        )
    return np.array(ids), str(path)


def check_bundle(
    bundle: Path,
    checkpoint: Path,
    *,
    data: Path | None = None,
    tokens: int = 512,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Compare ``bundle`` with ``checkpoint`` on ``tokens`` tokens and record the verdict in the bundle; returns the report.

    Raises BilevelError when the comparison could not run; a parity failure is a report with ``passed`` False.
    """
    started = time.perf_counter()
    bundle, checkpoint = Path(bundle), Path(checkpoint)
    manifest = read_manifest(bundle)
    on_stage("loading the checkpoint")
    model = load_model(checkpoint)
    config = model.config
    _verify(bundle, manifest, config)
    _check_count(tokens, config)
    ids, source = token_ids(bundle, checkpoint, config, data, tokens)
    weights = _weights(bundle, manifest)
    report = {
        "bundle": str(bundle),
        "against": str(checkpoint),
        "model_sha256": manifest["files"][GRAPH_FILE]["sha256"],
        "checkpoint_sha256": _checkpoint_hash(checkpoint),
        "precision": manifest["precision"],
        "weights": weights,
        "backend": f"ONNX Runtime on CPU, PyTorch {torch.__version__}",
        "data": {"source": source, "tokens": len(ids)},
        **_judge(bundle / GRAPH_FILE, model, weights, ids, on_stage),
        "seconds": time.perf_counter() - started,
    }
    _record(bundle, manifest, report)
    return report


def _judge(path: Path, model: CausalLM, weights: str, ids: Array, on_stage: Callable[[str], None]) -> dict[str, Any]:
    """The judgements of the graph at ``path``, and whether all of them hold. Rounds the weights of ``model``."""
    effect = Effect(model, ids) if weights != "fp32" else None
    round_weights(model, weights)
    on_stage("selection and computation: PyTorch's routes forced into the graph")
    # Both executions of the one file: what any ONNX Runtime does with it, and what this machine's users get.
    probes, library = {"bodies": open_probe(path)}, find_cpu_library()
    if library is not None and probes["bodies"].nodes:
        probes["CPU kernels"] = open_probe(path, library)
    replay = Replay(model, probes)
    replay.run(*_batch(ids, model.config.routing.block_size))
    on_stage("end to end: the shipped graph on its own")
    ends = _end_to_end(open_judged(path, weights, library), model, ids)
    judgements: list[Selection | Computation] = [*replay.selections.values(), *replay.computations.values()]
    passed = not replay.attributes and all(j.passed for j in judgements) and all(entry["passed"] for entry in ends.values())
    rounding: dict[str, Any] = {}
    if effect is not None:
        on_stage("the shipped graph against the checkpoint as it was trained")
        rounding["activations"], rounding["effect"] = effect.judge(open_shown(path))
        passed = passed and rounding["activations"]["passed"]
    return {
        "passed": passed,
        "executions": list(probes),
        "attributes": replay.attributes,
        "selection": [{**s.as_dict(), "passed": s.passed} for s in replay.selections.values()],
        "computation": [{**c.as_dict(), "passed": c.passed} for c in replay.computations.values()],
        "end_to_end": ends,
        **rounding,
    }


def _weights(bundle: Path, manifest: dict[str, Any]) -> str:
    """The format of the bundle's weights; bundles from before there was a choice do not say."""
    entry = manifest.get("weights", {"format": "fp32"})
    found = entry.get("format") if isinstance(entry, dict) else entry
    if found not in FORMATS:
        raise BundleError(f"{bundle} says its weights are {found!r}, this bilevel knows {', '.join(FORMATS)}; export it again")
    return str(found)


def _check_count(tokens: int, config: ModelConfig) -> None:
    least = 3 * config.routing.block_size + 8
    if not least <= tokens <= config.max_position_embeddings:
        raise RequestError(
            f"tokens={tokens} must lie between {least} (a few blocks) and {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )


def _batch(ids: Array, block_size: int) -> tuple[Array, Array, list[int]]:
    """Two rows of different lengths, and calls that end inside, at and across block borders."""
    other = ids[: len(ids) * 3 // 5][::-1]
    rows = np.zeros((2, len(ids)), dtype=np.int64)
    rows[0], rows[1, : len(other)] = ids, other
    return rows, np.array([len(ids), len(other)]), [block_size + 1, 1, 1, block_size - 3, 2 * block_size, 5]


def _end_to_end(session: Any, model: CausalLM, ids: Array) -> dict[str, dict[str, Any]]:
    size = model.config.routing.block_size
    prompt, generated = max(len(ids) - 128, size + 1), min(32, len(ids) // 2)
    return {
        "teacher_forced": end_to_end.teacher_forced(session, model, ids, prompt),
        "greedy": end_to_end.greedy(session, model, ids[: len(ids) - generated], generated),
        "chunking": end_to_end.chunking(session, model, ids, (1, size, size + 1, 3, 2 * size), COMPUTATION_LIMIT),
    }


def _checkpoint_hash(checkpoint: Path) -> str:
    """SHA-256 of the weight file, or of its index where the weights are sharded."""
    single = checkpoint / "model.safetensors"
    path = single if single.is_file() else checkpoint / "model.safetensors.index.json"
    return str(describe_file(path)["sha256"])


def _record(bundle: Path, manifest: dict[str, Any], report: dict[str, Any]) -> None:
    """Append the verdict to ``bundle.json``, which stays whole if this is interrupted."""
    kept = ("passed", "model_sha256", "checkpoint_sha256", "precision", "weights", "backend", "executions", "data")
    excused = sum(entry["excused"] for entry in report["selection"])
    worst = max(entry["error"] for entry in report["computation"])
    verdict = {key: report[key] for key in kept} | {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "routes_excused": excused,
        "largest_error": worst,
        "kl_mean": report["end_to_end"]["teacher_forced"]["kl_mean"],
    }
    manifest["checks"] = [*manifest.get("checks", []), verdict]
    partial = bundle / f".{MANIFEST}.partial"
    try:
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, bundle / MANIFEST)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(f"the verdict could not be recorded in {bundle / MANIFEST} ({error.strerror})") from error
