"""Checkpoint folder -> bundle folder: the graph, its weights, config and tokenizer, and ``bundle.json`` that describes them.

The format is specified in ``bilevel/bundle/format.py``, which reads it. A bundle is written under a temporary name and renamed
when complete: an interrupted export leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import bilevel
from bilevel.bundle.chat import additional_files
from bilevel.bundle.manifest import MANIFEST, FileRecord, write_manifest
from bilevel.bundle.tensors import ONNX_DTYPES
from bilevel.checkpoint import load_model
from bilevel.config import ModelConfig
from bilevel.config_json import config_to_dict, load_source
from bilevel.contract import BY_NAME, MOST_BLOCK
from bilevel.errors import ExportError, require
from bilevel.export.decoder.decoder import route_outputs, save_decoder, state_tensors
from bilevel.export.decoder.dense_twin import dense_config, save_dense_twin
from bilevel.export.decoder.dense_twin_kv8 import cache_ranges, save_int8_cache
from bilevel.export.decoder.end_tokens import end_tokens
from bilevel.export.decoder.head import save_head
from bilevel.export.graph.nodes import routed_nodes
from bilevel.export.graph.precision import PRECISIONS, TWIN_PRECISIONS, check_precision
from bilevel.export.graph.quantise import check_format, quantise_graph, table_bits
from bilevel.export.graph.schemas import ONNX_OPSET
from bilevel.export.graph.sessions import load_graph
from bilevel.export.graph.shared_weights import share_weights
from bilevel.folders import check_within, replacing, write_json
from bilevel.model import CausalLM

GRAPH_FILE = "model.onnx"
TWIN_FILE = "dense.onnx"
_CALIBRATION = 512  # tokens that the range of an int8 cache is taken from
# Copied as they are where the checkpoint has them.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class ExportReport:
    """What an export did: where the bundle lies, how large it is, and how many nodes of each operator its graph has.

    weights: the manifest's entry of that name (``bilevel.export.graph.quantise``).
    """

    path: Path
    size_bytes: int
    operators: dict[str, int]
    weights: dict[str, Any]


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    force: bool = False,
    prefill_chunk: int = 512,
    weights: str = "fp32",
    precision: str = "fp32",
    caches: str = "fp32",
    ignore_keys: Collection[str] = (),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ExportReport:
    """Export the model in ``checkpoint`` to ``bundle``. Raises BilevelError; an existing bundle is replaced only with force.

    prefill_chunk: tokens that the runtime prefills per call unless told otherwise. weights: fp32, int8 or int4
    (``bilevel.export.graph.quantise`` says what is rounded). precision: fp32, fp16 or bf16, the type of weights, activations
    and caches; routers' scores, expert gates' logits, softmax and norms are accumulated in fp32 in every one, and the logits
    are fp32. caches: int8 or int4 for packed keys and values (fp32: of the model's type). ignore_keys: unknown keys of
    config.json that are passed over. on_stage: told what is being done.
    """
    checkpoint, bundle = Path(checkpoint), Path(bundle)
    check_format(weights)
    check_precision(precision, weights, caches)
    check_target(bundle, force)
    if not 1 <= prefill_chunk <= MOST_BLOCK:
        raise ExportError(f"prefill_chunk={prefill_chunk} must be at least 1 and at most {MOST_BLOCK}")
    config = _load_config(checkpoint, ignore_keys)
    tokenizer, ends = _read_tokenizer(checkpoint), end_tokens(checkpoint, config)
    if not 0 <= (config.bos_token_id or 0) < config.vocab_size:
        raise ExportError(
            f"config.json of {checkpoint} names the first token {config.bos_token_id}; the model's tokens are 0 to "
            f"{config.vocab_size - 1}: mend it"
        )
    on_stage(f"loading {checkpoint}")
    model = load_model(checkpoint, dtype=getattr(torch, PRECISIONS[precision]), ignore=ignore_keys)
    with replacing(bundle, ExportError) as folder:
        graphs, stored = _save_graphs(model, folder, weights, caches, precision in TWIN_PRECISIONS, on_stage)
        on_stage("writing the bundle")
        for name, contents in tokenizer.items():
            (folder / name).write_bytes(contents)
        write_json(folder / "config.json", config_to_dict(config))
        manifest = _manifest(graphs[GRAPH_FILE], config, ends, prefill_chunk)
        manifest["graph"]["head"] = save_head(folder / GRAPH_FILE, config)
        if TWIN_FILE in graphs:
            twin = graphs[TWIN_FILE]
            manifest["dense_twin"] = {**_ports(TWIN_FILE, twin, dense_config(config)), "operators": _versions(twin)}
        manifest |= {"precision": PRECISIONS[precision], "weights": stored, "caches": caches}
        if ignore_keys:
            manifest["ignored_keys"] = sorted(ignore_keys)
        manifest["files"] = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, manifest)
    counts: dict[str, int] = {}
    for node in routed_nodes(graphs[GRAPH_FILE].graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return ExportReport(bundle, sum(entry["bytes"] for entry in manifest["files"].values()), counts, stored)


def _save_graphs(
    model: CausalLM, folder: Path, weights: str, caches: str, takes_twin: bool, on_stage: Callable[[str], None]
) -> tuple[dict[str, onnx.ModelProto], dict[str, Any]]:
    """Write the routed graph and, where there is one, its dense twin; returns them by file, and the manifest's ``weights``."""
    on_stage("tracing and translating to ONNX")
    graphs = {GRAPH_FILE: save_decoder(model, folder / GRAPH_FILE, caches=caches)}
    if takes_twin and not model.config.routing.is_dense:
        on_stage("tracing the dense twin")
        graphs[TWIN_FILE] = save_dense_twin(model, folder / TWIN_FILE)
    on_stage("storing the weights")
    table = table_bits(weights, model.config) if weights != "fp32" else None
    stored = {name: quantise_graph(folder / name, weights, table=table) for name in graphs}[GRAPH_FILE]
    share_weights(folder, list(graphs))
    if weights != "fp32":
        graphs = {name: load_graph(folder / name) for name in graphs}
    if TWIN_FILE in graphs and (weights, caches) != ("fp32", "fp32"):
        graphs[TWIN_FILE] = _with_small_cache(folder / TWIN_FILE, model.config)
    return graphs, stored


def _with_small_cache(twin: Path, config: ModelConfig) -> onnx.ModelProto:
    """Give the twin of a model with small weights or caches int8 caches, the engine's best; random tokens give their range."""
    length = min(_CALIBRATION, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length)
    return save_int8_cache(twin, twin, cache_ranges(twin, tokens))


def _load_config(checkpoint: Path, ignore_keys: Collection[str]) -> ModelConfig:
    """The checkpoint's configuration; every key to ignore must be one that would be refused."""
    source = load_source(checkpoint, ignore_keys)
    if idle := sorted(set(ignore_keys) - set(source.ignored)):
        raise ExportError(
            f"--ignore-key {idle[0]}: {checkpoint / 'config.json'} has no such key, or needs none to be ignored; "
            "leave the option out"
        )
    return source.config


def check_target(bundle: Path, force: bool) -> None:
    """Refuse a folder that would be lost. Raises ExportError."""
    if not bundle.exists():
        return
    if not force:
        raise ExportError(f"{bundle} exists; choose another folder or replace it with --force")
    if not bundle.is_dir() or (any(bundle.iterdir()) and not (bundle / MANIFEST).is_file()):
        raise ExportError(f"{bundle} exists and is no bundle (no {MANIFEST}), so --force does not replace it; move it away")


def _read_tokenizer(checkpoint: Path) -> dict[str, bytes]:
    if not (checkpoint / "tokenizer.json").is_file():
        raise ExportError(
            f"{checkpoint} holds no tokenizer.json, which the runtime reads; write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    files = {name: checkpoint / name for name in _TOKENIZER_FILES} | additional_files(checkpoint)
    contents = {}
    for name, path in files.items():
        if path.is_file():
            check_within(path, checkpoint, ExportError)
            contents[name] = path.read_bytes()
    _check_tokenizer(contents["tokenizer.json"], checkpoint / "tokenizer.json")
    return contents


def _check_tokenizer(content: bytes, path: Path) -> None:
    """Refuse what the runtime would refuse."""
    tokenizers = require("tokenizers")
    try:
        tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ExportError(
            f"{path} is no tokenizer ({str(error)[:200]}); write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None


def describe_file(path: Path) -> dict[str, Any]:
    """SHA-256 and size in bytes of one file."""
    return FileRecord.of(path).as_dict()


def _specs(values: Any) -> list[dict[str, Any]]:
    """Name, dtype and shape (free sizes by name) of graph inputs or outputs."""
    return [
        {
            "name": value.name,
            "dtype": ONNX_DTYPES[value.type.tensor_type.elem_type],
            "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def _ports(file: str, graph: onnx.ModelProto, config: ModelConfig) -> dict[str, Any]:
    """How bundle.json describes a graph: its file, inputs, outputs, and the caches and routers' choices among them."""
    routes = route_outputs(config)
    return {
        "file": file,
        "inputs": _specs(graph.graph.input),
        "outputs": _specs(graph.graph.output),
        "state": [{"input": f"past.{t.name}", "output": f"present.{t.name}"} for t in state_tensors(config)],
        **({} if routes is None else {"routes": routes}),
    }


def _versions(graph: onnx.ModelProto) -> dict[str, int]:
    """The contract's operators that a graph uses, and their versions."""
    return {name: BY_NAME[name].version for name in sorted({node.op_type for node in routed_nodes(graph.graph)})}


def _manifest(graph: onnx.ModelProto, config: ModelConfig, ends: dict[int, list[str]], prefill_chunk: int) -> dict[str, Any]:
    """``bundle.json`` without its format, ``files``, ``precision``, ``weights``, ``caches`` and ``dense_twin``."""
    return {
        "created_by": {"bilevel": bilevel.__version__, "torch": torch.__version__, "onnx": onnx.__version__},
        "config": config_to_dict(config),
        "block_size": config.routing.block_size,
        "limits": {"max_positions": config.max_position_embeddings, "prefill_chunk": prefill_chunk},
        "tokens": {
            "bos": config.bos_token_id,
            "eos": list(ends),
            "eos_sources": {str(token): sources for token, sources in ends.items()},
        },
        "operators": _versions(graph),
        "graph": {**_ports(GRAPH_FILE, graph, config), "opset": ONNX_OPSET},
        "checks": [],
    }
