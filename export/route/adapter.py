"""Adapters: what routing adds to a dense checkpoint, in a folder of a few megabytes.

    adapter.json         format, the base model's sizes and fingerprint, the "routing" section
    gates.safetensors    fp16: where routing.key is gate, model.layers.N.self_attn.block_keys.* of every layer, so that
                         dense_layers and topk may be edited; with weighted words, model.word_router.*
    tuned.safetensors    fp16: low-rank updates of queries and keys that are added to the base's weights,
                         model.layers.N.self_attn.q_proj.lora_A.weight and so on (as peft's, with lora_alpha = r)
    log.json             how it was found and trained, for people

With its base it makes a checkpoint folder: the base's own files, its config.json with the routing section, the gates as one
more shard. Nothing of the base is converted, except that updates are merged into new shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig, Routing
from bilevel.config_json import config_from_dict, config_to_dict
from bilevel.errors import CheckpointError
from bilevel.folders import replacing, write_json
from bilevel.sections import Section
from bilevel.weight_files import CONFIG, float_tensor, opened

ADAPTER, GATES, TUNED, LOG = "adapter.json", "gates.safetensors", "tuned.safetensors", "log.json"
FORMAT = 1
_WORDS = "model.word_router."
_GATE = re.compile(r"model\.layers\.(\d+)\.self_attn\.block_keys\.(.+)")
_UPDATE = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.lora_[AB]\.weight")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_PROBE = "model.layers.0.self_attn.k_proj"  # small, and changed by every kind of training


@dataclass
class Adapter:
    """A routing section and, for gates, their parameters: layer -> name in ``GateKeys`` -> tensor.

    words: level 1's parameters by their names in ``WordRouter``. tuned: low-rank updates by their names in the file.
    base: sizes and fingerprint of the model that it belongs to; no fingerprint: any model of these sizes.
    """

    routing: Routing
    base: dict[str, Any]
    gates: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, *, routed: bool = False) -> dict[str, Tensor]:
        """Gates and words under a checkpoint's names, in half precision. routed: without the gates of layers that are dense."""
        prefix, dense = "model.layers.{}.self_attn.block_keys.{}", self.routing.dense_layers if routed else ()
        gates = {
            prefix.format(layer, name): tensor
            for layer, gate in self.gates.items()
            if layer not in dense
            for name, tensor in gate.items()
        }
        words = {f"{_WORDS}{name}": tensor for name, tensor in self.words.items()}
        return {name: tensor.half().contiguous() for name, tensor in {**gates, **words}.items()}


def low_rank_changes(tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a weight in the model -> what is added to it, fp32, from low-rank factors by their names in the file."""
    names = sorted({name.rpartition(".lora_")[0] for name in tuned})
    return {f"{name}.weight": tuned[f"{name}.lora_B.weight"] @ tuned[f"{name}.lora_A.weight"] for name in names}


def describe_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, and the SHA-256 of one tensor in fp32."""
    model = checkpoint.skeleton()
    checkpoint.fill(model, _PROBE)
    weight = model.get_submodule(_PROBE).get_parameter("weight").detach()
    digest = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
    return {**base_sizes(checkpoint.config), "tensor": f"{_PROBE}.weight", "sha256": digest}


def base_sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that an adapter depends on."""
    return {name: getattr(config, name) for name in _SIZES}


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the folder in one step. Raises CheckpointError."""
    section = routing_section(adapter)
    with replacing(folder, CheckpointError) as partial:
        write_json(partial / ADAPTER, {"format": FORMAT, "base": adapter.base, "routing": section})
        if adapter.log:
            write_json(partial / LOG, adapter.log)
        if adapter.tensors():
            write_tensors(adapter.tensors(), partial / GATES)
        if adapter.tuned:
            write_tensors({name: tensor.half().contiguous() for name, tensor in adapter.tuned.items()}, partial / TUNED)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A file of safetensors that others may read too, unlike what its own writer makes."""
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def routing_section(adapter: Adapter) -> dict[str, Any]:
    """The routing as config.json says it."""
    sizes = {name: adapter.base[name] for name in _SIZES}
    return dict(config_to_dict(ModelConfig(**sizes, intermediate_size=1, routing=adapter.routing))["routing"])


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder. Raises CheckpointError, ConfigError."""
    path = Path(folder) / ADAPTER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER}, so it is no adapter; make one with: bilevel route CHECKPOINT {folder} --adapter"
        )
    section = Section.read(path, lambda problem: CheckpointError(f"{folder}: {problem}; make the adapter anew"))
    if (version := section.number("format")) != FORMAT:
        raise CheckpointError(f"{path} is of format {version}, but this bilevel reads {FORMAT}; use the bilevel that wrote it")
    base = section.section("base")
    sizes: dict[str, Any] = {name: base.number(name) for name in _SIZES}
    sizes |= {name: base.get(name, str) for name in ("tensor", "sha256") if name in base}
    routing = _routing(section.get("routing", dict), sizes)
    has_tensors = routing.key == "gate" or routing.weighted_words
    gates, words = _read_tensors(path.with_name(GATES)) if has_tensors else ({}, {})
    return Adapter(routing, sizes, gates, words=words, tuned=_read_updates(path.with_name(TUNED)))


def _routing(section: Mapping[str, Any], sizes: Mapping[str, Any]) -> Routing:
    return config_from_dict({**{name: sizes[name] for name in _SIZES}, "intermediate_size": 1, "routing": section}).routing


def _read_tensors(path: Path) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    gates: dict[int, dict[str, Tensor]] = {}
    words: dict[str, Tensor] = {}
    with opened(path, ADAPTER) as file:
        for key in file.describe():
            if key.startswith(_WORDS):
                words[key.removeprefix(_WORDS)] = float_tensor(file, key)
                continue
            if not (found := _GATE.fullmatch(key)):
                raise CheckpointError(f"{path} holds {key}, which is no gate's; make the adapter anew with: bilevel route")
            gates.setdefault(int(found[1]), {})[found[2]] = float_tensor(file, key)
    return gates, words


def _read_updates(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with opened(path, ADAPTER) as file:
        names = list(file.describe())
        for name in names:
            if not _UPDATE.fullmatch(name):
                raise CheckpointError(
                    f"{path} holds {name}, which is no update of q or k; make the adapter anew with: bilevel route"
                )
            other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
            if other not in names:
                raise CheckpointError(f"{path} holds {name} without {other}; make the adapter anew with: bilevel route")
        updates = {name: float_tensor(file, name) for name in names}
    for name, down in updates.items():
        up = updates[name.replace("lora_A", "lora_B")]
        if "lora_A" in name and (down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]):
            raise CheckpointError(
                f"{path} holds {name} of shape {list(down.shape)} beside an lora_B of shape {list(up.shape)}, which do not "
                "multiply; make the adapter anew with: bilevel route"
            )
    return updates


def check_base(adapter: Adapter, checkpoint: Path, ignore: Collection[str] = ()) -> None:
    """Refuse an adapter that belongs to another model, or a base that is routed already. Raises CheckpointError."""
    base = Checkpoint(checkpoint, ignore)
    if not base.config.routing.is_dense:
        raise CheckpointError(
            f"{checkpoint} has a routing section of its own; remove it from {CONFIG}, or leave the adapter out"
        )
    here = describe_base(base)
    for name, value in adapter.base.items():
        if here.get(name) != value:
            what = "another fingerprint (its weights differ)" if name == "sha256" else f"{name}={here.get(name)}"
            raise CheckpointError(
                f"the adapter was made for another model: {checkpoint} has {what}, the adapter's base {value}; "
                "make one for this model with: bilevel route"
            )
