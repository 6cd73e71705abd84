"""An adapter and its base as one checkpoint folder: written for good, or as links for the time of an export."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.checkpoint import Checkpoint
from bilevel.config_json import load_config, load_source
from bilevel.errors import CheckpointError, ConfigError
from bilevel.export.route.adapter import (
    ADAPTER,
    GATES,
    LOG,
    Adapter,
    check_base,
    load_adapter,
    low_rank_changes,
    routing_section,
    save_adapter,
    write_tensors,
)
from bilevel.folders import check_within, replacing, write_json
from bilevel.weight_files import CONFIG, INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, read_headers

_COPIED = (".json", ".jinja", ".txt", ".model")


def merge(adapter: Adapter, checkpoint: Path, folder: Path, *, link: bool = False, ignore: Collection[str] = ()) -> None:
    """Write the routed checkpoint into the empty ``folder``: the base's files copied, or its large ones linked."""
    check_base(adapter, checkpoint, ignore)
    place: Callable[[Path, Path], Any] = _link if link else shutil.copyfile
    stored = read_headers(checkpoint)
    weights = sorted({entry.file for entry in stored.values()})
    tensors = adapter.tensors(routed=True)
    if adapter.tuned:
        base = Checkpoint(checkpoint, ignore)
        _write_shards(base.changed(_delta(adapter, base)), len(weights), tensors, folder)
    else:
        names = _shard_names(weights, tensors)
        if tensors:
            listing = {entry.key: names[entry.file] for entry in stored.values()}
            write_tensors(tensors, folder / GATES)
            _write_index(listing | dict.fromkeys(tensors, GATES), folder / _index_name(weights))
        for path, name in names.items():
            place(path, folder / name)
    left = {CONFIG, *(path.name for path in weights), *((INDEX, PICKLE_INDEX) if tensors or adapter.tuned else ())}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in left and not path.name.startswith("."):
            if path.suffix in _COPIED:  # what goes into a bundle may not be a link to elsewhere
                check_within(path, checkpoint, CheckpointError)
                shutil.copyfile(path, folder / path.name)
            else:
                place(path, folder / path.name)
    raw = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    section = routing_section(adapter)
    write_json(folder / CONFIG, {**raw, "routing": section})


def _shard_names(weights: Sequence[Path], tensors: Mapping[str, Tensor]) -> dict[Path, str]:
    """What the base's files are called beside a shard of gates; the reader takes a single file for the whole model."""
    if tensors and [path.name for path in weights] in ([WEIGHTS], [PICKLE]):
        return {weights[0]: weights[0].name.replace(".", "-00001-of-00002.")}
    return {path: path.name for path in weights}


def _index_name(weights: Sequence[Path]) -> str:
    return INDEX if weights[0].suffix == ".safetensors" else PICKLE_INDEX


def _write_index(weight_map: dict[str, str], path: Path) -> None:
    write_json(path, {"metadata": {}, "weight_map": weight_map})


def _delta(adapter: Adapter, base: Checkpoint) -> dict[str, Tensor]:
    """What the updates add to each weight of the model, in fp32. Raises CheckpointError where they do not fit it."""
    shapes = {name: tuple(each.shape) for name, each in base.skeleton().named_parameters()}
    changes = low_rank_changes(adapter.tuned)
    for name, change in changes.items():
        if shapes.get(name) != tuple(change.shape):
            raise CheckpointError(
                f"the adapter updates {name} of shape {list(change.shape)}, which {base.folder} does not have; "
                "make one for this model with: bilevel route"
            )
    return changes


def _write_shards(
    files: Iterator[tuple[Path, dict[str, Tensor]]], count: int, gates: Mapping[str, Tensor], folder: Path
) -> None:
    """New shards and their index, whatever kind of file the base's weights lie in."""
    weight_map: dict[str, str] = {}
    for number, (_, content) in enumerate(files, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors({key: tensor.contiguous() for key, tensor in content.items()}, folder / name)
        weight_map |= dict.fromkeys(content, name)
    if gates:
        write_tensors(dict(gates), folder / GATES)
        weight_map |= dict.fromkeys(gates, GATES)
    _write_index(weight_map, folder / INDEX)


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
