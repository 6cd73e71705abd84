"""Gates that were released for SeerAttention-R (arXiv 2506.08889), read as adapters.

A folder with ``config.json``, whose keys ``seerattn_*`` say what the gates are, and their weights as safetensors or a pickle:
``model.layers.N.self_attn.attn_gate.attngate_linear_q.weight`` [Hkv, G, D, D], ``attngate_linear_k.weight`` [Hkv, 3 D, D] over
greatest, least and mean key, and where they are normalised ``attngate_qnorm.weight``, ``attngate_knorm.weight`` [D].
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from bilevel.config import ModelConfig, Routing
from bilevel.errors import CheckpointError
from bilevel.export.route.adapter import Adapter, base_sizes
from bilevel.sections import Section
from bilevel.weight_files import CONFIG, float_tensor, opened

_BLOCK, _BUDGET = "seerattn_gate_block_size", "seerattn_token_budget"
_NAME = re.compile(r"^model\.layers\.(\d+)\.self_attn\.attn_gate\.attngate_(\w+)\.weight$")
_NAMES = {"linear_q": "query_weight", "linear_k": "key_weight", "qnorm": "query_norm.weight", "knorm": "key_norm.weight"}
# What the released gates are, and bilevel's gate computes: key -> (value, default of a key that is not there).
_KIND = {
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_q_head_pooling_type": "Qproj",
}
_DEFAULT_BUDGET = 4096  # tokens, what the paper's long texts read


def is_seer(folder: Path) -> bool:
    """Whether the folder holds gates of SeerAttention-R."""
    path = Path(folder) / CONFIG
    return path.is_file() and f'"{_BLOCK}"' in path.read_text(encoding="utf-8", errors="replace")


def load_seer(folder: Path, config: ModelConfig) -> Adapter:
    """The gates in ``folder`` for a model of these sizes. Raises CheckpointError naming what bilevel's gate is not."""
    section = Section.read(
        Path(folder) / CONFIG, lambda problem: CheckpointError(f"{folder}: {problem}; download the gates again")
    )
    for key, expected in _KIND.items():
        if (value := section.get(key, str, default=expected)) != expected:
            raise CheckpointError(f"{folder} has {key}={value!r}, but bilevel's gate computes {expected!r}; give such gates")
    if (width := section.number("seerattn_gate_hidden_size")) != config.head_dim:
        raise CheckpointError(
            f"{folder} has seerattn_gate_hidden_size={width}, but bilevel's gate is as wide as a head, {config.head_dim}; "
            "give gates of that width"
        )
    if not section.get("seerattn_use_rope", bool, default=True):
        raise CheckpointError(f"{folder} has seerattn_use_rope=false, but bilevel's gate turns by position; give such gates")
    size = section.number(_BLOCK)
    gates = _read(Path(folder), config)
    norms = {"query_norm.weight" in gate for gate in gates.values()}
    if len(norms) != 1:
        raise CheckpointError(f"{folder} normalises the gates of some layers and not of others; download the gates again")
    tokens = int(section.get(_BUDGET, int, default=_DEFAULT_BUDGET))
    missing = tuple(layer for layer in range(config.num_hidden_layers) if layer not in gates)
    routing = Routing(
        preset="moba_gqa", key="gate", block_size=size, topk=max(2, tokens // size), gate_norm=norms.pop(), dense_layers=missing
    )
    return Adapter(routing, dict(base_sizes(config)), gates)


def _read(folder: Path, config: ModelConfig) -> dict[int, dict[str, Tensor]]:
    """Layer -> the parameters of ``GateKeys``."""
    files = sorted(folder.glob("*.safetensors")) or sorted([*folder.glob("*.bin"), *folder.glob("*.pth")])
    gates: dict[int, dict[str, Tensor]] = {}
    heads, width = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // heads
    shapes = {"linear_q": (heads, group, width, width), "linear_k": (heads, 3 * width, width)}
    for path in files:
        with opened(path) as file:
            for key, (_, shape) in file.describe().items():
                match = _NAME.match(key)
                if match is None or match[2] not in _NAMES:
                    continue
                layer, kind = int(match[1]), match[2]
                if shape != (expected := shapes.get(kind, (width,))):
                    raise CheckpointError(
                        f"{key} has shape {list(shape)}, but the model needs {list(expected)}; give its gates"
                    )
                tensor = float_tensor(file, key)
                gates.setdefault(layer, {})[_NAMES[kind]] = tensor.flatten(1, 2) if kind == "linear_q" else tensor
    if not gates:
        raise CheckpointError(
            f"{folder} holds no tensors model.layers.N.self_attn.attn_gate.attngate_linear_q.weight; download the gates again"
        )
    return gates
