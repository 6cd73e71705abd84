"""Parity of a bundle with the checkpoint it came from: selection, computation, end to end, and what must hold anyway.

``check_bundle`` returns the report and records the verdict in ``bundle.json``. Of the checkpoint one part at a time is in
memory; of the graph one part at a time, and once the whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bilevel.bundle.format import read_manifest, record_verdict
from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig
from bilevel.config_json import config_to_dict
from bilevel.errors import BundleError, RequestError
from bilevel.export.check import end_to_end
from bilevel.export.check.compare import Comparison
from bilevel.export.check.effect import judge_rounding
from bilevel.export.check.extremes import expert_extremes
from bilevel.export.check.failure import first_failing, where_it_starts
from bilevel.export.check.graph_parts import GraphParts
from bilevel.export.check.invariants import check_invariants
from bilevel.export.check.judge import Array
from bilevel.export.check.layered import LayeredModel, Passage
from bilevel.export.check.replay import Replay
from bilevel.export.check.shipped import ShippedGraph
from bilevel.export.check.structure import structure_differences
from bilevel.export.check.text import BACKENDS, Request, make_text, open_tokenizer, token_ids
from bilevel.export.check.word_states import WordStates
from bilevel.export.decoder.bundle import GRAPH_FILE, describe_file
from bilevel.export.report.judgements import (
    Activations,
    Effect,
    EndToEnd,
    Invariant,
    RouterResult,
    StructureDifference,
    TensorResult,
)
from bilevel.export.report.model import Failure, JudgedText, ModelShape, Report, Verdicts
from bilevel.plugins.library.cpu import find_cpu_library
from bilevel.weight_files import weights_entry

Stage = Callable[[str], None]


def _silent(stage: str) -> None:
    pass


def _verify(bundle: Path, manifest: dict[str, Any], config: ModelConfig) -> None:
    """The bundle's files must be the ones that were exported, and from a model of this shape."""
    for name, entry in manifest["files"].items():
        path = bundle / name
        if not path.is_file() or describe_file(path) != entry:
            raise BundleError(f"{path} is missing or not the file that was exported; export the bundle again with --force")
    if manifest["config"] != json.loads(json.dumps(config_to_dict(config))):
        raise BundleError(f"{bundle} was exported from a model of another configuration; give the checkpoint that it came from")


def check_bundle(
    bundle: Path,
    checkpoint: Path,
    *,
    data: Path | None = None,
    tokens: int | None = None,
    cuts: Sequence[int] | None = None,
    row_order: Sequence[int] | None = None,
    backend: str = "all",
    precision: str | None = None,
    shrink: bool = True,
    on_stage: Stage = _silent,
    on_remark: Stage = _silent,
) -> Report:
    """Compare ``bundle`` with ``checkpoint`` and record the verdict in the bundle; returns the report.

    The arguments are those of :class:`Request`. precision: refuse a bundle of another one. on_stage: is told what is being
    done; on_remark: that the verdict could not be recorded. Raises BilevelError when the comparison could not run; a parity
    failure is a report with ``passed`` False.
    """
    started = time.perf_counter()
    request = Request(Path(bundle), Path(checkpoint), data, tokens, cuts, row_order, backend, shrink)
    exported = read_manifest(request.bundle)
    manifest = dict(exported.manifest)
    if precision is not None and manifest["precision"] != precision:
        raise RequestError(
            f"{bundle} is of precision {manifest['precision']}, not {precision}; give that one, or export the checkpoint again "
            "with --precision"
        )
    on_stage("reading the checkpoint's headers")
    source = Checkpoint(request.checkpoint, exported.ignored_keys)
    _verify(request.bundle, manifest, source.config)
    check = _Check(request, manifest, source, on_stage)
    report = replace(check.report(), seconds=time.perf_counter() - started)
    try:
        record_verdict(request.bundle, manifest, report.verdict())
    except BundleError as error:
        on_remark(str(error))
    return report


class _Check:
    """One run."""

    def __init__(self, request: Request, manifest: dict[str, Any], source: Checkpoint, on_stage: Stage) -> None:
        self.request, self.manifest, self.source, self.config = request, manifest, source, source.config
        self.precision, self.weights = str(manifest["precision"]), str(manifest.get("weights", {"format": "fp32"})["format"])
        self.caches = str(manifest.get("caches", "fp32"))
        # Codes turn over where sums differ in a last bit, so that PyTorch's own error against fp64 is the measure of the whole.
        self.rounded = self.precision if self.caches == "fp32" else f"{self.caches} caches"
        self.path, self._on_stage = request.bundle / GRAPH_FILE, on_stage
        self.longest = int(manifest.get("limits", {}).get("prefill_chunk", 512))
        self.ids, self.data_source = token_ids(request, self.config)
        self.text = make_text(request, self.ids, self.config, self.longest)
        self.plain = LayeredModel(source, self.precision, weights=self.weights, caches=self.caches)
        self.exact = LayeredModel(source, self.precision, exact=True, weights=self.weights, caches=self.caches)
        on_stage("cutting the graph into parts")
        self.executions = self._executions()
        self.parts = GraphParts(self.path, self.config, self.executions, self.precision)

    def _executions(self) -> dict[str, Path | None]:
        """Both executions of the one file: what any ONNX Runtime does with it, and what this machine's users get."""
        library, backend = find_cpu_library(), self.request.backend
        if backend not in BACKENDS:
            raise RequestError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if backend == "kernels" and library is None:
            raise RequestError(
                "the CPU kernels are not installed here; reinstall bilevel where there is a C++ compiler, or use "
                "--backend portable"
            )
        has_kernels = library is not None and backend != "portable" and bool(self.manifest["operators"])
        executions: dict[str, Path | None] = {} if backend == "kernels" and has_kernels else {"bodies": None}
        return {**executions, "CPU kernels": library} if has_kernels else executions

    def report(self) -> Report:
        """Run every judgement. How long it took is for the caller to say."""
        words = WordStates(self.text)
        comparison = Comparison(self.config, self.precision, words.add)
        replay = Replay(self.plain, self.exact, self.parts, comparison, self._on_stage)
        with torch.no_grad():
            passages = replay.run(self.text)
        results = [entry.result() for entry in comparison.entries]
        selection = tuple(result for result in results if isinstance(result, RouterResult))
        computation = tuple(result for result in results if isinstance(result, TensorResult))
        structure = structure_differences(self.config, self.parts.nodes, self.weights, self.caches)
        try:
            ends, invariants = self._alone(passages, any(router.excused for router in selection))
        except BundleError as error:
            if all(result.passed for result in results) and not structure:
                raise
            ends, invariants = end_to_end.could_not_run(str(error))
        order = replay.order_invariant()
        invariants += [law for law in (order, self._extremes()) if law is not None]
        activations, effect = self._rounding() if ends.teacher_forced.tokens else (None, None)
        verdicts = Verdicts(
            structure=not structure,
            selection=all(router.passed for router in selection),
            computation=all(tensor.passed for tensor in computation),
            end_to_end=ends.passed,
            invariants=all(invariant.passed for invariant in invariants),
            activations=activations.passed if activations is not None else None,
        )
        return Report(
            passed=verdicts.passed,
            verdicts=verdicts,
            **self._compared(),
            structure=tuple(structure),
            selection=selection,
            computation=computation,
            end_to_end=ends,
            invariants=tuple(invariants),
            activations=activations,
            effect=effect,
            words=words.words(self._decode),
            failure=self._failure(replay, structure),
            seconds=0.0,
        )

    def _extremes(self) -> Invariant | None:
        """The expert gates at logits that the text need not hold. A gate that cannot be run alone is the parts' to report."""
        experts = self.config.experts
        if experts is None:
            return None
        self._on_stage("expert gates at extreme logits")
        return expert_extremes(self.parts, experts)

    def _compared(self) -> dict[str, Any]:
        """The report's fields that say what was compared with what."""
        import onnxruntime

        routing, experts = self.config.routing, self.config.experts
        return {
            "bundle": str(self.request.bundle),
            "against": str(self.request.checkpoint),
            "model_sha256": self.manifest["files"][GRAPH_FILE]["sha256"],
            "checkpoint_sha256": _checkpoint_hash(self.request.checkpoint),
            "precision": self.precision,
            "weights": self.weights,
            "caches": None if self.caches == "fp32" else self.caches,
            "backend": f"ONNX Runtime {onnxruntime.__version__} on CPU, PyTorch {torch.__version__}",
            "executions": tuple(self.executions),
            "model": ModelShape(
                layers=self.config.num_hidden_layers,
                expert_layers=tuple(sorted(experts.layers)) if experts else (),
                preset=routing.preset,
                block_size=routing.block_size,
                coarse_topk=routing.coarse_topk if routing.is_two_level else None,
                topk=routing.topk,
            ),
            "data": JudgedText(self.data_source, int(self.text.lengths.sum()), len(self.text.ids), tuple(self.text.sizes)),
        }

    def _alone(self, passages: list[Passage], excused: bool) -> tuple[EndToEnd, list[Invariant]]:
        """The shipped graph on its own: next token, greedy text, invariants."""
        self._on_stage("the whole graph on its own: next token")
        library = self.executions.get("CPU kernels")
        device = ShippedGraph(self.path, self.config, self.precision, caches=self.caches, library=library)
        head = end_to_end.Head(self.parts)
        with torch.no_grad():
            models, hidden = (self.plain, self.exact), [passage.x for passage in passages]
            forced = end_to_end.next_token(device, head, self.text, models, self.rounded, hidden=hidden, excused=excused)
            self._on_stage("the whole graph on its own: greedy text")
            size, longest = self.config.routing.block_size, self.config.max_position_embeddings
            wanted = int(self.text.lengths.sum())
            prompts, count = end_to_end.greedy_prompts(self.ids, wanted, size, longest)
            greedy = end_to_end.greedy(models, device, head, prompts, count, self.longest, self.rounded, excused=excused)
        # As far as every invariant has something to say; the longest texts only take longer.
        ids = self.ids[: min(int(self.text.lengths.max()), self.longest, 16 * size)]
        kl_limit = math.inf if forced.limit is None else forced.limit
        invariants = check_invariants(device, self.plain, ids, self.rounded, kl_limit, self._on_stage)
        return EndToEnd(forced, greedy, end_to_end.METHOD), invariants

    def _rounding(self) -> tuple[Activations | None, Effect | None]:
        if (self.weights, self.caches) == ("fp32", "fp32"):
            return None, None
        self._on_stage("the shipped graph against the checkpoint as it was trained")
        shipped = ShippedGraph(self.path, self.config, self.precision, caches=self.caches, fp32_activations=False)
        row, sizes = int(self.text.lengths.argmax()), self.text.sizes
        with torch.no_grad():
            formats = self.weights, self.caches
            return judge_rounding(self.source, *formats, shipped, self.parts, self.text.ids[row], sizes, self.longest)

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.request.bundle)

    def _decode(self, ids: Array) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    def _failure(self, replay: Replay, structure: list[StructureDifference]) -> Failure | None:
        if first_failing(replay.comparison.entries) is not None:
            self._on_stage("looking for the smallest input that shows the difference")
        with torch.no_grad():
            return where_it_starts(replay, self.text, structure, self._decode, shrink=self.request.shrink)


def _checkpoint_hash(checkpoint: Path) -> str:
    """SHA-256 of the weight file, or of its index where the weights are sharded."""
    return str(describe_file(weights_entry(checkpoint))["sha256"])
