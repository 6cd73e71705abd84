"""Checkpoints: a folder in Hugging Face's format (``config.json``, ``model.safetensors``) to a model and back.

Loading keeps a strict ledger: every stored tensor fills a place in the model and every place is filled, or the load fails and
names what was left. Names, shapes and dtypes are judged from the file headers, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.config_json import config_to_dict, load_config
from bilevel.errors import CheckpointError
from bilevel.folders import replacing
from bilevel.model import CausalLM

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old Llama files store this derived buffer; it is the only tensor that may be left over.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Stored:
    """One tensor as its file's header describes it; dtype in safetensors' spelling."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A checkpoint folder whose weights can be read part by part. Raises ConfigError and CheckpointError.

    The ledger is settled from the file headers when this is made; weights are read by :meth:`fill`, one tensor at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
        self.config = load_config(folder)
        self._stored = _read_headers(folder)
        skeleton = self.skeleton()
        tensors = {**dict(skeleton.named_parameters()), **dict(skeleton.named_buffers())}
        _check_ledger(folder, self._stored, _places(tensors, self.config, self._stored))

    def skeleton(self) -> CausalLM:
        """The model with shapes only (on torch's meta device), in eval mode."""
        with torch.device("meta"):
            return CausalLM(self.config).eval()

    def fill(self, model: CausalLM, part: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Give the parameters below the module ``part`` ("": all) their values in ``dtype``; buffers keep the model's own
        dtype.

        A tied head counts to the embedding: filling either fills both.
        """
        tied = self.config.tie_word_embeddings
        part = _EMBEDDING.removesuffix(".weight") if tied and part == _HEAD.removesuffix(".weight") else part
        # Parameters that are one tensor (a tied head) appear once here, under the first name.
        parameters, buffers = (
            {name: tensor for name, tensor in named if not part or name.startswith(f"{part}.")}
            for named in (model.named_parameters(), model.named_buffers())
        )
        if tied:
            parameters.pop(_HEAD, None)
        weights = {name: torch.empty(p.shape, dtype=dtype) for name, p in parameters.items()}
        weights |= {name: torch.empty_like(b, device="cpu") for name, b in buffers.items()}
        places = _places(weights, self.config, self._stored)
        _fill(self._stored, places)
        if tied and _HEAD in places and not torch.equal(places[_HEAD], places[_EMBEDDING]):
            raise CheckpointError(
                f"{self.folder} stores a {_HEAD} that differs from {_EMBEDDING}, but its {CONFIG} ties the two; "
                "set tie_word_embeddings to false"
            )
        model.load_state_dict(weights, assign=True, strict=False)
        if tied and _EMBEDDING in weights:
            model.lm_head.weight = model.model.embed_tokens.weight


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model in a checkpoint folder, in eval mode, its parameters in ``dtype`` (buffers keep the model's own dtype).

    Reads ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names, one tensor at a time. Experts may
    be stored stacked (``mlp.experts.gate_up_proj`` [E, 2f, d]) or one by one (``mlp.experts.{e}.gate_proj.weight`` [f, d]).
    Raises ConfigError for a config that cannot be honoured, CheckpointError for weights that do not match it.
    """
    checkpoint = Checkpoint(folder)
    model = checkpoint.skeleton()
    checkpoint.fill(model, dtype=dtype)
    return model


def save_model(model: CausalLM, folder: Path, *, files: Mapping[str, bytes] | None = None, overwrite: bool = False) -> None:
    """Write a checkpoint folder: config.json, model.safetensors (a tied head once) and ``files`` (name -> contents).

    The folder appears under its name only when it is complete. An existing folder is refused without ``overwrite``; with it,
    the old checkpoint stays whole until the new one is. Raises CheckpointError; what was there before is then untouched.
    """
    folder = Path(folder).resolve()
    files = dict(files or {})
    for name in files:
        if name in (CONFIG, WEIGHTS, INDEX, "", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"the extra file {name!r} must be a plain file name other than {CONFIG} and {WEIGHTS}")
    _check_target(folder, overwrite)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[_HEAD]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    files[CONFIG] = (json.dumps({**config_to_dict(model.config), "dtype": dtype}, indent=2) + "\n").encode()
    with replacing(folder, CheckpointError) as partial:
        for name, contents in files.items():
            (partial / name).write_bytes(contents)
        try:
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # safetensors' own name for a full disk


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, or CheckpointError with what is there instead."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a weight index ({error!r}); download the checkpoint again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index} names the file {name!r}, which does not lie in the folder itself")
        return [folder / name for name in sorted(names)]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}), and reading those can run foreign code; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder} holds no {WEIGHTS} and no {INDEX}; give the folder of a complete checkpoint")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file; whatever is wrong with it becomes one sentence."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, but {INDEX} names it; download the checkpoint again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); download the checkpoint again") from None


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Name -> header entry of every tensor in the checkpoint."""
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in sorted(file.keys()):
                if name in stored:
                    raise CheckpointError(f"{name} is stored twice, in {stored[name].file.name} and in {path.name}")
                entry = file.get_slice(name)
                stored[name] = _Stored(path, entry.get_dtype(), tuple(entry.get_shape()))
    return stored


def _places(weights: dict[str, Tensor], config: ModelConfig, stored: Mapping[str, _Stored]) -> dict[str, Tensor]:
    """Stored name -> the memory that it fills; experts that are stored one by one fill views of the stacked weights."""
    places = dict(weights)
    if config.tie_word_embeddings and _HEAD in stored and _EMBEDDING in weights:
        places[_HEAD] = torch.empty_like(weights[_EMBEDDING])  # a second copy: only compared, then dropped
    for layer in config.experts.layers if config.experts else ():
        prefix = f"model.layers.{layer}.mlp.experts"
        stacked = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        if stacked[0] not in places or any(name in stored for name in stacked):
            continue
        gate_up, down = (places.pop(name) for name in stacked)
        for expert in range(down.shape[0]):
            gate, up = gate_up[expert].chunk(2)
            for kind, view in (("gate", gate), ("up", up), ("down", down[expert])):
                places[f"{prefix}.{expert}.{kind}_proj.weight"] = view
    return places


def _check_ledger(folder: Path, stored: Mapping[str, _Stored], places: Mapping[str, Tensor]) -> None:
    """Both sides of the ledger must agree: dtypes, then names, then shapes."""
    unsupported = sorted(name for name, entry in stored.items() if entry.dtype not in _FLOATS)
    if unsupported:
        raise CheckpointError(
            f"{folder} stores {_listed(unsupported)} as {stored[unsupported[0]].dtype}; "
            "bilevel reads float weights only, so give the checkpoint before quantization"
        )
    left = sorted(name for name in stored if name not in places and not name.endswith(_DERIVED))
    if left:
        raise CheckpointError(f"{folder} stores {_listed(left)}, for which the model of its {CONFIG} has no place")
    missing = sorted(name for name in places if name not in stored)
    if missing:
        raise CheckpointError(f"{folder} lacks {_listed(missing)}, which the model of its {CONFIG} needs")
    for name, place in places.items():
        if stored[name].shape != tuple(place.shape):
            raise CheckpointError(
                f"{name} has shape {list(stored[name].shape)} in {stored[name].file.name}, "
                f"but the model of {CONFIG} needs {list(place.shape)}"
            )


def _listed(names: list[str], most: int = 3) -> str:
    """``a, b, c and 4 more tensors``."""
    rest = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _fill(stored: Mapping[str, _Stored], places: Mapping[str, Tensor]) -> None:
    """Copy every stored tensor into its place; NaN and infinite values are refused by name."""
    for path in sorted({stored[name].file for name in places}):
        with _opened(path) as file:
            for name in (name for name in places if stored[name].file == path):
                tensor, place = file.get_tensor(name), places[name]
                place.copy_(tensor)
                if torch.isfinite(place).all():
                    continue
                if torch.isfinite(tensor).all():
                    kind = str(place.dtype).removeprefix("torch.")
                    raise CheckpointError(f"{name} holds values too large for {kind}; load or export the model in float32")
                raise CheckpointError(f"{name} in {path.name} holds NaN or infinite values; the model is not usable")


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that exists, or that is no checkpoint and would be lost."""
    if not folder.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder or ask for it to be overwritten")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise CheckpointError(f"{folder} exists and is no checkpoint (no {CONFIG}), so it is not overwritten; move it away")
