"""The bundle, format version 1: a folder that holds everything needed to run one exported model.

    bundle.json       this manifest
    config.json       the model's configuration in Hugging Face's format, with its "routing" and "experts" sections
    tokenizer.json    Hugging Face ``tokenizers``
    model.onnx        the graph; model.data its weights
    head.onnx         its output head alone, with the same weights
    dense.onnx        optional: the dense twin, which has the same weights; bfloat16 bundles have none

``bundle.json`` is one JSON object:

    format, format_version    "bilevel-bundle" and 1; another version is refused
    created_by                {tool: version}
    precision                 "float32", "float16" or "bfloat16": the type of caches, activations and float weights.
                              Scores of routers, logits of expert gates and the graph's logits are float32 in all three
    weights                   optional {"format": "fp32" (the default), "int8" or "int4", ...}: how the matrix products' weights
                              are stored. fp32: as floats, of the type that precision says. The integer formats go with
                              precision float32 and also say how many products and layers of experts, and which weights stayed
                              floats {"bits", "block", "activations", "quantised", "experts", "kept_fp32": {what for: bytes}}
    caches                    optional "fp32" (the default: of the type that precision says), "int8" or "int4": how keys and
                              values are cached; packed rows are uint8 (``bilevel/bundle/cache_rows.py``) and go with float32
    config                    the contents of config.json
    block_size                R; a cache's capacity is a multiple of it
    limits                    {"max_positions": tokens a row may hold, "prefill_chunk": most tokens of one call}
    tokens                    {"bos": id or null, "eos": [ids]}, and optional "eos_sources": {id: [who says that it ends texts]}
    operators                 {operator: version}, those of ``bilevel.contract`` that the graph uses
    graph.file, graph.opset   the ONNX file and its opset
    graph.inputs, .outputs    [{"name", "dtype", "shape"}]; a size is a number or one of batch, new_tokens, capacity and
                              num_blocks (= capacity / block_size)
    graph.state               [{"input", "output"}]: caches, carried from one call to the next
    graph.routes              optional {"candidates": output or null, "blocks": [blocks.LAYER of each routed layer],
                              "experts": {layer: output}}: what the routers of a call chose, int32 [batch, heads, new_tokens,
                              kept] (experts [batch, new_tokens, kept]), -1 in the unused tail; only where attention is routed
    graph.head                optional {"file", "hidden"}: the output head as an ONNX file that makes logits of any rows of
                              ``hidden``, an output of the graph [batch, new_tokens, d] that graph.outputs does not list
    dense_twin                optional {"file", "operators", "inputs", "outputs", "state"}: the same weights with ordinary
                              attention, which ``bilevel bench`` measures the graph against; described like the graph
    ignored_keys              optional [key]: keys of the checkpoint's config.json that the export was asked to pass over
    files                     {name: {"sha256", "bytes"}} of every other file in the folder
    checks                    verdicts that ``bilevel check`` appended

One call of the graph. Rows are right-padded. ``input_ids`` int64 [batch, new_tokens]; ``past_len`` int32 [batch], tokens
already in each row's caches; ``new_len`` int32 [batch], valid tokens of this call, 0 for an idle row. All new_tokens of every
row are written at past_len, so past_len + new_tokens <= capacity holds for idle rows too. ``logits`` float32 [batch, vocab]
belong to each row's last valid token. Caches start as zeros; a cache's input and output are bound to one buffer.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from bilevel.bundle.cache_rows import FORMATS, CacheRows
from bilevel.bundle.manifest import (
    MANIFEST,
    FileRecord,
    Graph,
    open_manifest,
    read_files,
    read_graph,
    read_weights,
    remedy,
    write_manifest,
)
from bilevel.bundle.tensors import PRECISIONS
from bilevel.contract import MOST_BLOCK, MOST_POSITIONS
from bilevel.errors import BundleError, ContractError
from bilevel.folders import file_sha256
from bilevel.sections import Section


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's manifest, checked. Fields are those of bundle.json (see the module's docstring).

    manifest: bundle.json as it stands, for whoever adds to it. graph: what runs; twin: the dense twin's, where there is one.
    """

    folder: Path
    manifest: Mapping[str, Any]
    created_by: Mapping[str, str]
    precision: str
    weights: Mapping[str, Any]
    caches: str
    config: Mapping[str, Any]
    block_size: int
    max_positions: int
    prefill_chunk: int
    bos: int | None
    eos: tuple[int, ...]
    opset: int
    graph: Graph
    twin: Graph | None
    files: Mapping[str, FileRecord]
    checks: tuple[Mapping[str, Any], ...]
    ignored_keys: tuple[str, ...] = ()
    eos_sources: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def dense_twin(self) -> Bundle:
        """This bundle with the dense twin's graph in the place of its own. Raises BundleError where it has none."""
        if self.twin is None:
            raise BundleError(f"{self.folder} has no dense twin (bundle.json gives no dense_twin); {self.remedy}")
        return dataclasses.replace(self, graph=self.twin, twin=None)

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.graph.vocab_size

    @property
    def graph_path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.graph.file

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.json"

    def round_up(self, tokens: int) -> int:
        """The smallest capacity that holds ``tokens``."""
        return max(1, math.ceil(tokens / self.block_size)) * self.block_size

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        """Values of the symbols that caches use."""
        return {"batch": batch, "capacity": capacity, "num_blocks": capacity // self.block_size}

    def state_bytes(self, batch: int, capacity: int) -> int:
        """Memory of all caches for ``batch`` rows of ``capacity`` tokens."""
        sizes = self.sizes(batch, capacity)
        return sum(spec.num_bytes(sizes) for spec, _ in self.graph.state)

    @property
    def remedy(self) -> str:
        """What to do about a damaged bundle."""
        return remedy(self.folder)

    def file_problem(self, name: str, verify: bool = True) -> str | None:
        """What is wrong with a listed file ("is missing", ...), or None; its contents are looked at if ``verify``."""
        path, record = self.folder / name, self.files[name]
        if not path.is_file():
            return "is missing"
        if not verify:
            return None
        if (size := path.stat().st_size) != record.num_bytes:
            return f"holds {size} bytes instead of {record.num_bytes}"
        return None if file_sha256(path) == record.sha256 else "differs from the SHA-256 in bundle.json"


def read_manifest(path: str | Path) -> Bundle:
    """Read and check bundle.json alone, not the files that it lists. Raises BundleError."""
    folder = Path(path)
    manifest = open_manifest(folder)
    files = read_files(manifest)
    if "tokenizer.json" not in files:
        raise manifest.fail("bundle.json does not list tokenizer.json among its files")
    twin = manifest.section("dense_twin") if "dense_twin" in manifest else None
    graph = read_graph(manifest.section("graph"), manifest.section("operators"), files)
    return Bundle(
        folder=folder,
        manifest=manifest.values,
        created_by=manifest.get("created_by", dict),
        precision=manifest.choice("precision", PRECISIONS),
        weights=read_weights(manifest),
        caches=_caches(manifest, graph),
        config=_config(manifest),
        block_size=manifest.number("block_size", most=MOST_BLOCK),
        max_positions=manifest.number("limits.max_positions", most=MOST_POSITIONS),
        prefill_chunk=manifest.number("limits.prefill_chunk", most=MOST_POSITIONS),
        bos=manifest.get("tokens.bos", int, NoneType),
        eos=manifest.numbers("tokens.eos"),
        opset=manifest.number("graph.opset"),
        graph=graph,
        twin=None if twin is None else read_graph(twin, twin.section("operators"), files),
        files=files,
        checks=tuple(manifest.get("checks", list)),
        ignored_keys=tuple(map(str, manifest.get("ignored_keys", list, default=[]))),
        eos_sources=_eos_sources(manifest),
    )


def _config(manifest: Section) -> dict[str, Any]:
    """The configuration, whose sections are objects."""
    config: dict[str, Any] = manifest.get("config", dict)
    for name in ("routing", "experts"):
        manifest.get(f"config.{name}", dict, NoneType, default=None)
    return config


def _caches(manifest: Section, graph: Graph) -> str:
    """The format of keys and values, which is that of the graph's caches."""
    form: str = manifest.choice("caches", tuple(FORMATS)) if "caches" in manifest else "fp32"
    width: int | None = None  # bytes of a row; None: numbers
    if form != "fp32":
        if (precision := manifest.get("precision", str)) != "float32":
            raise manifest.fail(f"{MANIFEST} gives {form} caches and precision {precision}; packed caches go with float32")
        try:
            width = CacheRows.of(form, manifest.number("config.head_dim", most=MOST_BLOCK)).num_bytes
        except ContractError as error:
            raise manifest.fail(str(error)) from None
    for spec in (spec for spec, _ in graph.state if spec.name.startswith(("past.key.", "past.value."))):
        is_packed = spec.dtype == "uint8"
        if is_packed != (width is not None) or (is_packed and spec.shape[-1:] != (width,)):
            raise manifest.fail(
                f"{spec.name} is {spec.dtype} {list(spec.shape)}, which {form} caches are not"
                + ("" if width is None else f" (uint8, {width} bytes a row)")
            )
    return form


def _eos_sources(manifest: Section) -> dict[int, tuple[str, ...]]:
    """Who says of each end token that it is one; empty in bundles that do not tell."""
    listed = manifest.get("tokens.eos_sources", dict, default={})
    for value in listed.values():
        if not isinstance(value, list) or not all(isinstance(source, str) for source in value):
            raise manifest.wrong("tokens.eos_sources", listed, "lists of texts by token")
    return {token: tuple(listed.get(str(token), ())) for token in manifest.numbers("tokens.eos")}


def load_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Read and check a bundle folder; the format is described in this module's docstring.

    verify: compare every file's size and SHA-256 with the manifest (that the files exist is checked always).
    Raises BundleError naming what differs and the command that makes the bundle anew.
    """
    bundle = read_manifest(path)
    for name in bundle.files:
        if problem := bundle.file_problem(name, verify):
            raise BundleError(f"{bundle.folder}: {name} {problem}; {bundle.remedy}")
    return bundle


def record_verdict(folder: Path, manifest: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
    """Append the verdict of a check and the time to bundle.json, which stays whole if this is interrupted.

    manifest: bundle.json as it stands. Raises BundleError where it cannot be written.
    """
    entry = {**verdict, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        write_manifest(folder, {**manifest, "checks": [*manifest.get("checks", []), entry]})
    except OSError as error:
        raise BundleError(f"the verdict could not be recorded in {folder / MANIFEST} ({error.strerror})") from error
