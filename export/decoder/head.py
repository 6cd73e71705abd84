"""The output head as a file of its own, for logits of more tokens than each row's last: what checking several drafted tokens
in one call takes.

The decoder's graph gives logits of one token a row, which is all that reading and generating need. What enters its last norm
becomes one more output, which costs nothing where nobody asks for it, and ``head.onnx`` makes logits of any rows of that; it
names the same weights in ``model.data``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir

from bilevel.config import ModelConfig
from bilevel.errors import ExportError
from bilevel.model import hidden_name

HEAD_FILE = "head.onnx"
_CALL = ("input_ids", "past_len", "new_len")


def save_head(graph: Path, config: ModelConfig) -> dict[str, Any]:
    """Write the head beside the decoder's ``graph``, which gets its output; returns what bundle.json says of it.

    The head's inputs are those of a call whose rows have one token each: hidden [N, 1, d], new_len int32 [N], all of them 1,
    and input_ids int64 [N, 1], whose values do not matter; its output is logits fp32 [N, vocab].
    """
    model, name = onnx_ir.load(graph), hidden_name(config.num_hidden_layers)
    values = onnx_ir.convenience.create_value_mapping(model.graph)
    if name not in values:
        raise ExportError(f"{graph} has no value {name}; this is a fault of bilevel's own, please report it")
    head = onnx_ir.convenience.extract(model.graph, [name, *_CALL], ["logits"])
    for value in [value for value in head.inputs if not value.uses()]:
        head.inputs.remove(value)
    weights = sorted(head.initializers.items())  # they come in any order, and a model exported twice is the same file
    head.initializers.clear()
    head.initializers.update(weights)
    _save(onnx_ir.Model(head, ir_version=model.ir_version), graph.with_name(HEAD_FILE))
    if values[name] not in model.graph.outputs:
        model.graph.outputs.append(values[name])
    _save(model, graph)
    return {"file": HEAD_FILE, "hidden": name}


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Weights stay in the file where they lie."""
    onnx_ir.save(model, path)
    onnx.checker.check_model(str(path))
