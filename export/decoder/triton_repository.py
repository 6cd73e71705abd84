"""A bundle as a model repository of Triton Inference Server, for those who outgrow one device.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.onnx, model.data     the bundle's graph, unchanged

Triton keeps the caches of each conversation ("sequence", in its words) between requests and passes them through the graph:
its implicit state management, of which every cache of the bundle is one state. A client numbers its sequence, marks its first
and last request, and sends input_ids [1, tokens], past_len [1, 1] and new_len [1, 1]; it gets the logits (and the routes, if it
asks) and chooses the next token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from bilevel.bundle.format import Bundle, read_manifest
from bilevel.bundle.tensors import TensorSpec
from bilevel.errors import ExportError
from bilevel.folders import replacing

VERSION = "1"
_HEADER = """\
# Written by bilevel export. Triton's ONNX Runtime runs the routed operators' portable bodies; the fast CPU kernels take their
# place where the server has the library of bilevel's installation:
# model_operations { op_library_filename: ["/PATH/_cpu.abi3.so"] }
"""


def write_repository(bundle: Path, repository: Path, *, capacity: int | None = None, sequences: int = 8) -> Path:
    """Write the model's folder, named like the bundle, into ``repository``; an earlier one is replaced. Returns it.

    capacity: tokens of one sequence, a multiple of the block size, which Triton has to know to allocate the caches (None: the
    model's positions, 4,096 at most). sequences: that it keeps at once. Raises ExportError.
    """
    manifest = read_manifest(bundle)
    size, most = manifest.block_size, manifest.max_positions
    whole = manifest.round_up(min(capacity or 4096, most))
    if capacity is not None and capacity != whole:
        raise ExportError(f"capacity={capacity} must be a multiple of block_size={size}, at most the model's {most} positions")
    if sequences < 1:
        raise ExportError(f"sequences={sequences} must be at least 1")
    target = repository / bundle.resolve().name
    if target.exists() and not (target / "config.pbtxt").is_file():
        raise ExportError(f"{target} exists and is no model of Triton's (no config.pbtxt); move it away")
    repository.mkdir(parents=True, exist_ok=True)
    with replacing(target, ExportError) as folder:
        (folder / VERSION).mkdir()
        for name in (manifest.graph.file, "model.data"):
            shutil.copyfile(bundle / name, folder / VERSION / name)
        (folder / "config.pbtxt").write_text(config_pbtxt(manifest, target.name, whole, sequences), encoding="utf-8")
    return target


def config_pbtxt(bundle: Bundle, name: str, capacity: int, sequences: int) -> str:
    """The model's configuration in Protocol Buffers' text format (message inference.ModelConfig).

    The first axis of every tensor is the batch, which Triton adds to what is written here.
    """
    graph, sizes = bundle.graph, bundle.sizes(-1, capacity)
    caches = {name for spec, output in graph.state for name in (spec.name, output)}
    called = [_tensor("input", spec, sizes) for spec in graph.inputs if spec.name not in caches]
    given = [_tensor("output", spec, sizes) for spec in graph.outputs if spec.name not in caches]
    states = [_state(spec, output, sizes) for spec, output in graph.state]
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {json.dumps(graph.file)}",
        "max_batch_size: 1  # a sequence is one row, with a length of its own",
        *called,
        *given,
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        "sequence_batching {",
        "  max_sequence_idle_microseconds: 600000000",
        f"  oldest {{ max_candidate_sequences: {sequences} }}",
        *states,
        "}",
    ]
    return _HEADER + "\n".join(lines) + "\n"


def _type(spec: TensorSpec) -> str:
    """Triton's name of a dtype: TYPE_FP32, TYPE_BF16, TYPE_INT64."""
    return "TYPE_" + spec.dtype.replace("bfloat", "bf").replace("float", "fp").upper()


def _dims(spec: TensorSpec, sizes: Mapping[str, int]) -> str:
    """The sizes behind the batch; -1 is free."""
    return ", ".join(map(str, spec.resolve({**sizes, "new_tokens": -1})[1:]))


def _tensor(kind: str, spec: TensorSpec, sizes: Mapping[str, int]) -> str:
    dims = _dims(spec, sizes)
    # Triton knows no tensor of the batch alone: a client sends one value in an axis of its own, which the graph does not see.
    shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"{kind} [ {{ name: {json.dumps(spec.name)} data_type: {_type(spec)} {shape} }} ]"


def _state(spec: TensorSpec, output: str, sizes: Mapping[str, int]) -> str:
    """One cache: zeros when a sequence begins, then what the last call gave."""
    kind, dims = f"data_type: {_type(spec)}", f"dims: [ {_dims(spec, sizes)} ]"
    names = f"input_name: {json.dumps(spec.name)} output_name: {json.dumps(output)}"
    return f'  state [ {{ {names} {kind} {dims} initial_state [ {{ name: "zeros" {kind} {dims} zero_data: true }} ] }} ]'
