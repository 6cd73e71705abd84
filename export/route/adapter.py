"""Adapters: what routing adds to a dense checkpoint, in a folder of a few megabytes.

    adapter.json         format, the base model's sizes and fingerprint, the "routing" section
    gates.safetensors    fp16: where routing.key is gate, model.layers.N.self_attn.block_keys.* of every layer, so that
                         dense_layers and topk may be edited; with weighted words, model.word_router.*
    log.json             how it was found and trained, for people

With its base it makes a checkpoint folder: the base's own files, its config.json with the routing section, the gates as one
more shard. Nothing of the base is converted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig, Routing
from bilevel.config_json import config_from_dict, config_to_dict, load_config, load_source
from bilevel.errors import CheckpointError, ConfigError
from bilevel.folders import replacing, write_json
from bilevel.sections import Section
from bilevel.weight_files import CONFIG, INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, opened, read_headers

ADAPTER, GATES, LOG = "adapter.json", "gates.safetensors", "log.json"
FORMAT = 1
_WORDS = "model.word_router."
_GATE = re.compile(r"model\.layers\.(\d+)\.self_attn\.block_keys\.(.+)")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_PROBE = "model.layers.0.self_attn.k_proj"  # small, and changed by every kind of training


@dataclass
class Adapter:
    """A routing section and, for gates, their parameters: layer -> name in ``GateKeys`` -> tensor.

    words: level 1's parameters by their names in ``WordRouter``.
    base: sizes and fingerprint of the model that it belongs to; no fingerprint: any model of these sizes.
    """

    routing: Routing
    base: dict[str, Any]
    gates: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Tensor] = field(default_factory=dict)

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
    section = config_to_dict(_any_model(adapter))["routing"]
    with replacing(folder, CheckpointError) as partial:
        write_json(partial / ADAPTER, {"format": FORMAT, "base": adapter.base, "routing": section})
        if adapter.log:
            write_json(partial / LOG, adapter.log)
        if adapter.tensors():
            _write(adapter.tensors(), partial / GATES)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """A file of safetensors that others may read too, unlike what its own writer makes."""
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _any_model(adapter: Adapter) -> ModelConfig:
    """A configuration that carries the routing section in and out."""
    return ModelConfig(**{name: adapter.base[name] for name in _SIZES}, intermediate_size=1, routing=adapter.routing)


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
    return Adapter(routing, sizes, gates, words=words)


def _routing(section: Mapping[str, Any], sizes: Mapping[str, Any]) -> Routing:
    return config_from_dict({**{name: sizes[name] for name in _SIZES}, "intermediate_size": 1, "routing": section}).routing


def _read_tensors(path: Path) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    gates: dict[int, dict[str, Tensor]] = {}
    words: dict[str, Tensor] = {}
    with opened(path, ADAPTER) as file:
        for key in file.describe():
            if key.startswith(_WORDS):
                words[key.removeprefix(_WORDS)] = file.get_tensor(key).float()
                continue
            if not (found := _GATE.fullmatch(key)):
                raise CheckpointError(f"{path} holds {key}, which is no gate's; make the adapter anew with: bilevel route")
            gates.setdefault(int(found[1]), {})[found[2]] = file.get_tensor(key).float()
    return gates, words


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


def merge(adapter: Adapter, checkpoint: Path, folder: Path, *, link: bool = False, ignore: Collection[str] = ()) -> None:
    """Write the routed checkpoint into the empty ``folder``: the base's files copied, or linked."""
    check_base(adapter, checkpoint, ignore)
    place: Callable[[Path, Path], Any] = _link if link else shutil.copyfile
    stored = read_headers(checkpoint)
    weights = sorted({entry.file for entry in stored.values()})
    names = {path: path.name for path in weights}
    if tensors := adapter.tensors(routed=True):
        for single in (WEIGHTS, PICKLE):  # the reader takes a single file for the whole model
            if [path.name for path in weights] == [single]:
                names = {weights[0]: single.replace(".", "-00001-of-00002.")}
        listing = {entry.key: names[entry.file] for entry in stored.values()}
        _write(tensors, folder / GATES)
        index = {"metadata": {}, "weight_map": {**listing, **dict.fromkeys(tensors, GATES)}}
        write_json(folder / (INDEX if weights[0].suffix == ".safetensors" else PICKLE_INDEX), index)
    for path, name in names.items():
        place(path, folder / name)
    left = {CONFIG, *(path.name for path in weights), *((INDEX, PICKLE_INDEX) if tensors else ())}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in left and not path.name.startswith("."):
            place(path, folder / path.name)
    raw = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    section = config_to_dict(_any_model(adapter))["routing"]
    write_json(folder / CONFIG, {**raw, "routing": section})


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve())


@contextmanager
def merged(adapter_folder: Path | None, checkpoint: Path, ignore: Collection[str] = ()) -> Iterator[Path]:
    """The checkpoint with the adapter as a folder of links, for the time of the block; without an adapter the checkpoint."""
    if adapter_folder is None:
        yield checkpoint
        return
    from bilevel.export.route.seer import is_seer, load_seer

    if is_seer(adapter_folder):
        adapter = load_seer(adapter_folder, load_source(checkpoint, ignore).config)
    else:
        adapter = load_adapter(adapter_folder)
    with tempfile.TemporaryDirectory(prefix="bilevel-") as parent:
        folder = Path(parent) / f"{checkpoint.resolve().name}+{adapter_folder.resolve().name}"  # reports show this name
        folder.mkdir()
        merge(adapter, checkpoint, folder, link=True, ignore=ignore)
        yield folder


def is_untrained(checkpoint: Path) -> bool:
    """Whether a checkpoint's routing section comes with nothing that was learned or calibrated for it."""
    try:
        routing = load_config(checkpoint).routing
    except ConfigError:
        return False  # the export says what is wrong
    bare = routing.key != "gate" and not routing.route_dim and not routing.dense_layers
    return not routing.is_dense and bare and not (checkpoint / LOG).is_file()


def check_target(folder: Path, force: bool, checkpoint: Path | None = None) -> None:
    """Refuse a folder that would be lost, the checkpoint that is read above all. Raises CheckpointError."""
    if checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder} is or holds the checkpoint that is read, which would be lost; name another folder for OUT"
        )
    if not folder.exists():
        return
    if not force:
        raise CheckpointError(f"{folder} exists; choose another folder or replace it with --force")
    if not folder.is_dir() or (any(folder.iterdir()) and not any((folder / name).is_file() for name in (CONFIG, ADAPTER))):
        raise CheckpointError(
            f"{folder} exists and is neither a checkpoint nor an adapter, so --force does not replace it; move it away"
        )


def write_result(adapter: Adapter, checkpoint: Path, folder: Path, *, as_adapter: bool) -> None:
    """Write the adapter alone, or the whole routed checkpoint with the log beside it."""
    if as_adapter:
        save_adapter(adapter, folder)
        return
    with replacing(folder, CheckpointError) as partial:
        merge(adapter, checkpoint, partial)
        write_json(partial / LOG, adapter.log)
