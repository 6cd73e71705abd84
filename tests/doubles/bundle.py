"""A bundle made without PyTorch whose every token can be predicted by hand.

The graph has a real bundle's inputs and outputs. Its caches hold the token ids, and the best next token is a checksum over
every id that the row has seen and the place where it stands: a token lost, repeated, misplaced or leaked from padding or
from another row changes the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper

VOCAB_SIZE, EOS, BLOCK_SIZE = 293, 1, 8  # 293 is prime: the checksums reach every token
MAX_POSITIONS, PREFILL_CHUNK = 100, 16  # 100 is not a multiple of the block size
HIDDEN = "hidden.1"  # the output that the head reads
OPSET = 23  # what an exported graph has; Python 3.10's ONNX Runtime stops there
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NAMES = {TensorProto.INT64: "int64", TensorProto.INT32: "int32", **{kind: name for name, kind in FLOATS.items()}}
CORPUS = ["def add(a, b):\n    return a + b\n", "the quick brown fox, the lazy dog", "für 漢字 und 🦊🦊"] * 3


def predict(prompt: Sequence[int], max_tokens: int, eos: Sequence[int] = (EOS,), limit: int = MAX_POSITIONS) -> list[int]:
    """What greedy decoding of the fake model gives, in plain Python."""
    tokens = list(prompt)
    while True:
        checksum = sum((place + 1) * token + 5 * token**2 for place, token in enumerate(tokens))
        tokens.append((checksum + 7 * len(tokens)) % VOCAB_SIZE)
        generated = tokens[len(prompt) :]
        if generated[-1] in eos or len(generated) == max_tokens or len(tokens) > limit:
            return generated


def _nodes(kind: int) -> list[onnx.NodeProto]:
    def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs.split(), [output], **attributes)

    return [
        node("Cast", "past_len", "start", to=TensorProto.INT64),
        node("Cast", "new_len", "count", to=TensorProto.INT64),
        # The state: ids as they are, and as floats with a head and a channel.
        # Both are written in place at (row, place), as a real graph does.
        node("Shape", "input_ids", "size"),
        node("Shape", "input_ids", "batch", start=0, end=1),
        node("Shape", "input_ids", "new_tokens", start=1, end=2),
        node("Squeeze", "batch", "batch_scalar"),
        node("Squeeze", "new_tokens", "new_tokens_scalar"),
        node("Range", "zero batch_scalar one", "row"),
        node("Unsqueeze", "row axis_1", "row_column"),
        node("Range", "zero new_tokens_scalar one", "offset_in_call"),
        node("Unsqueeze", "start axis_1", "start_column"),
        node("Add", "start_column offset_in_call", "target"),
        node("Expand", "row_column size", "rows"),
        node("Unsqueeze", "rows axis_2", "rows_3"),
        node("Unsqueeze", "target axis_2", "target_3"),
        node("Concat", "rows_3 target_3", "index", axis=-1),
        node("ScatterND", "past.token_ids index input_ids", "present.token_ids"),
        node("Sub", "rows_3 rows_3", "head_3"),
        node("Concat", "rows_3 head_3 target_3", "key_index", axis=-1),
        node("Unsqueeze", "input_ids axis_2", "ids3"),
        node("Cast", "ids3", "key", to=kind),
        node("ScatterND", "past.key.0 key_index key", "present.key.0"),
        # A state per block, so that num_blocks must be right.
        node("Reshape", "present.token_ids by_block", "blocks"),
        node("ReduceSum", "blocks axis_3", "block_sum", keepdims=1),
        node("Cast", "block_sum", "block_sum_f", to=TensorProto.FLOAT),
        node("Cast", "past.block_key.0", "past_block_key_f", to=TensorProto.FLOAT),
        node("Mul", "past_block_key_f zero_f", "nothing"),
        node("Add", "nothing block_sum_f", "block_key_f"),
        node("Cast", "block_key_f", "present.block_key.0", to=kind),
        # Only what lies before past_len + new_len counts.
        node("Add", "start count", "length"),
        node("Unsqueeze", "length axis_1", "length_column"),
        node("Shape", "present.token_ids", "capacity", start=1, end=2),
        node("Squeeze", "capacity", "capacity_scalar"),
        node("Sub", "capacity_scalar one", "capacity_end"),
        node("Range", "zero capacity_scalar one", "place"),
        node("Less", "place length_column", "is_valid"),
        node("Where", "is_valid present.token_ids zero", "valid_ids"),
        node("Add", "place one", "weight"),
        node("Mul", "valid_ids weight", "weighted"),
        node("Squeeze", "present.key.0 axes_1_3", "key_flat"),
        node("Cast", "key_flat", "key_ids", to=TensorProto.INT64),
        node("Mul", "valid_ids key_ids", "squares"),
        node("Mul", "squares five", "five_squares"),
        node("Add", "weighted five_squares", "terms"),
        node("ReduceSum", "terms axis_1", "checksum", keepdims=1),
        node("Mul", "length_column seven", "seven_lengths"),
        node("Add", "checksum seven_lengths", "total"),
        *_logits(),
        # The same total behind every token of the call, as far as the logits depend on it: what the head makes logits of.
        node("CumSum", "terms one", "checksums"),
        node("Clip", "target zero capacity_end", "ends"),
        node("GatherElements", "checksums ends", "column_checksum", axis=1),
        node("Add", "target one", "column_length"),
        node("Mul", "column_length seven", "column_sevens"),
        node("Add", "column_checksum column_sevens", "column_total"),
        node("Mod", "column_total vocab_size", "best"),
        node("Unsqueeze", "best axis_2", "best_3"),
        node("Cast", "best_3", HIDDEN, to=kind),
    ]


def _logits() -> list[onnx.NodeProto]:
    """Of the totals [N, 1]: token (total mod V) is best; the following ones are ever less likely."""
    return [
        helper.make_node("Sub", ["vocabulary", "total"], ["offset"]),
        helper.make_node("Mod", ["offset", "vocab_size"], ["distance"]),
        helper.make_node("Cast", ["distance"], ["distance_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["distance_f", "slope"], ["logits"]),
    ]


def make_head(precision: str = "float32") -> onnx.ModelProto:
    """The output head alone: logits of rows of one token each."""
    info, kind = helper.make_tensor_value_info, FLOATS[precision]
    nodes = [
        helper.make_node("Squeeze", [HIDDEN, "axis_2"], ["best"]),
        helper.make_node("Cast", ["best"], ["total"], to=TensorProto.INT64),
        *_logits(),
    ]
    inputs = [info(HIDDEN, kind, ["batch", "new_tokens", 1]), info("new_len", TensorProto.INT32, ["batch"])]
    used = {name for node in nodes for name in node.input}
    weights = [weight for weight in _constants() if weight.name in used]
    graph = helper.make_graph(nodes, "head", inputs, [info("logits", TensorProto.FLOAT, ["batch", VOCAB_SIZE])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _constants() -> list[onnx.TensorProto]:
    values = {
        "axes_1_3": [1, 3],
        "axis_1": [1],
        "axis_2": [2],
        "axis_3": [3],
        "by_block": [0, 1, -1, BLOCK_SIZE],
        "zero": 0,
        "one": 1,
        "five": 5,
        "seven": 7,
        "vocab_size": VOCAB_SIZE,
    }
    arrays = {name: np.array(value, np.int64) for name, value in values.items()}
    arrays |= {"zero_f": np.array(0, np.float32), "slope": np.array(-0.1, np.float32)}
    arrays["vocabulary"] = np.arange(VOCAB_SIZE)
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def make_model(precision: str = "float32") -> onnx.ModelProto:
    """The graph with float caches of one precision; its weights are saved beside it by ``write_bundle``."""
    kind = FLOATS[precision]
    info = helper.make_tensor_value_info
    states = [
        ("token_ids", TensorProto.INT64, ["batch", "capacity"]),
        ("key.0", kind, ["batch", 1, "capacity", 1]),
        ("block_key.0", kind, ["batch", 1, "num_blocks", 1]),
    ]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "new_tokens"]),
        info("past_len", TensorProto.INT32, ["batch"]),
        info("new_len", TensorProto.INT32, ["batch"]),
        *(info(f"past.{name}", dtype, shape) for name, dtype, shape in states),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["batch", VOCAB_SIZE]),
        *(info(f"present.{name}", dtype, shape) for name, dtype, shape in states),
        info(HIDDEN, kind, ["batch", "new_tokens", 1]),
    ]
    graph = helper.make_graph(_nodes(kind), "fake", inputs, outputs, _constants())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with few merges: characters beyond ASCII take several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _ports(values: Sequence[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    def port(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        shape = [size.dim_param or size.dim_value for size in tensor.shape.dim]
        return {"name": value.name, "dtype": NAMES[tensor.elem_type], "shape": shape}

    return [port(value) for value in values]


def write_bundle(folder: Path, eos: Sequence[int] = (EOS,), precision: str = "float32") -> Path:
    """Write the bundle into ``folder``, which must exist. Ids above 256 are no whole numbers of bfloat16's caches."""
    model = make_model(precision)
    inputs, outputs = _ports(model.graph.input), [port for port in _ports(model.graph.output) if port["name"] != HIDDEN]
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=1024)
    onnx.save_model(make_head(precision), folder / "head.onnx")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "num_hidden_layers": 1, "head_dim": 1, "routing": {"preset": "two_level", "topk": 3}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = ("model.onnx", "model.data", "head.onnx", "config.json", "tokenizer.json")
    manifest = {
        "format": "bilevel-bundle",
        "format_version": 1,
        "created_by": {"bilevel": "0.1.0"},
        "precision": precision,
        "config": config,
        "block_size": BLOCK_SIZE,
        "limits": {"max_positions": MAX_POSITIONS, "prefill_chunk": PREFILL_CHUNK},
        "tokens": {"bos": None, "eos": list(eos)},
        "operators": {"CoarseRoute": 1},
        "graph": {
            "file": "model.onnx",
            "opset": OPSET,
            "inputs": inputs,
            "outputs": outputs,
            "state": [{"input": f"past.{name}", "output": f"present.{name}"} for name in ("token_ids", "key.0", "block_key.0")],
            "head": {"file": "head.onnx", "hidden": HIDDEN},
        },
        "files": {name: file_record(folder / name) for name in names},
        "checks": [],
    }
    (folder / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def file_record(path: Path) -> dict[str, Any]:
    """A file as bundle.json lists it."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json in place."""
    path = folder / "bundle.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
