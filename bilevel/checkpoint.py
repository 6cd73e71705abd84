"""Checkpoints: a folder in Hugging Face's format (``config.json``, ``model.safetensors``) to a model and back.

Loading keeps a strict ledger: every stored tensor fills a place in the model and every place is filled, or the load fails and
names what was left. Names, shapes and dtypes are judged from the file headers, before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bilevel.config import Experts
from bilevel.config_json import config_to_dict, load_source
from bilevel.errors import CheckpointError
from bilevel.families.shared.family import EMBEDDING, HEAD
from bilevel.families.shared.pieces import plan, tied_names
from bilevel.folders import replacing
from bilevel.model import CausalLM
from bilevel.weight_files import CONFIG, INDEX, WEIGHTS, opened, read_headers

_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32")
_TABLE = ".mlp.gate.tid2eid"
# Old Llama files store this derived buffer; it is the only tensor that may be left over.
_DERIVED = ".rotary_emb.inv_freq"


class Checkpoint:
    """A checkpoint folder whose weights can be read part by part. Raises ConfigError and CheckpointError.

    The ledger is settled from the file headers when this is made; weights are read by :meth:`fill`, one tensor at a time.
    ignore: unknown keys of ``config.json`` to pass over.
    """

    def __init__(self, folder: Path, ignore: Collection[str] = ()) -> None:
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
        source = load_source(folder, ignore)
        self.config, self.ignored, self._layout = source.config, source.ignored, source.layout
        self._stored = read_headers(folder)
        skeleton = self.skeleton()
        tensors = {**dict(skeleton.named_parameters()), **dict(skeleton.named_buffers())}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._pieces = plan(shapes, self.config, self._layout, self._stored)
        self._check_ledger()

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
        part = EMBEDDING if tied and part == HEAD else part
        # Parameters that are one tensor (a tied head) appear once here, under the first name.
        parameters, buffers = (
            {name: tensor for name, tensor in named if not part or name.startswith(f"{part}.")}
            for named in (model.named_parameters(), model.named_buffers())
        )
        if tied:
            parameters.pop(f"{HEAD}.weight", None)
        weights = {name: torch.empty(p.shape, dtype=dtype) for name, p in parameters.items()}
        weights |= {name: torch.empty_like(b, device="cpu") for name, b in buffers.items()}
        self._read(weights)
        if f"{EMBEDDING}.weight" in weights:
            self._check_tied()
        model.load_state_dict(weights, assign=True, strict=False)
        if tied and f"{EMBEDDING}.weight" in weights:
            model.lm_head.weight = model.model.embed_tokens.weight

    def _read(self, weights: Mapping[str, Tensor]) -> None:
        """Copy every stored tensor into its places among ``weights``; NaN and infinite values are refused by name."""
        wanted = {
            name: here
            for name, pieces in self._pieces.items()
            if (here := [piece for piece in pieces if piece.target in weights])
        }
        for path in sorted({self._stored[name].file for name in wanted}):
            with opened(path) as file:
                for name in (name for name in wanted if self._stored[name].file == path):
                    tensor = file.get_tensor(self._stored[name].key)
                    for piece in wanted[name]:
                        if piece.target.endswith(_TABLE):
                            _check_table(name, tensor, self.config.experts)
                        _check_finite(name, path, tensor, piece.fill(tensor, weights[piece.target]))

    def changed(self, changes: Mapping[str, Tensor]) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Every file with its tensors by their names there, after ``changes`` (a parameter's name -> what is added, fp32).

        One file is in memory at a time; tensors keep their dtype.
        """
        for path in sorted({entry.file for entry in self._stored.values()}):
            with opened(path) as file:
                content = {}
                for name, entry in self._stored.items():
                    if entry.file == path:
                        content[entry.key] = tensor = file.get_tensor(entry.key).clone()
                        for piece in self._pieces.get(name, ()):
                            if piece.target in changes:
                                piece.add(tensor, changes[piece.target])
                yield path, content

    def _check_tied(self) -> None:
        """A head that is stored beside the embedding that it is tied to must be equal."""
        names = tied_names(self.config, self._layout)
        if names is None or not all(name in self._stored for name in names):
            return
        values = []
        for entry in (self._stored[name] for name in names):
            with opened(entry.file) as file:
                values.append(file.get_tensor(entry.key))
        if values[0].shape != values[1].shape or not torch.equal(values[0].float(), values[1].float()):
            raise CheckpointError(
                f"{self.folder} stores a {names[1]} that differs from {names[0]}, but its {CONFIG} ties the two; "
                "set tie_word_embeddings to false"
            )

    def _check_ledger(self) -> None:
        """Both sides of the ledger must agree: dtypes, then names, then shapes."""
        folder, stored, pieces = self.folder, self._stored, self._pieces
        tables = {name for name, parts in pieces.items() if parts[0].target.endswith(_TABLE)}
        unsupported = sorted(
            name for name, entry in stored.items() if entry.dtype not in (_INTEGERS if name in tables else _FLOATS)
        )
        if unsupported:
            raise CheckpointError(
                f"{folder} stores {_listed(unsupported)} as {stored[unsupported[0]].dtype}; "
                + (
                    "a table of experts holds whole numbers; store it as int32 or int64"
                    if unsupported[0] in tables
                    else "bilevel reads float weights only, so give the checkpoint before quantization"
                )
            )
        spare = tied_names(self.config, self._layout) or ()  # a tied head may be stored a second time
        left = sorted(
            name
            for name in stored
            if name not in pieces
            and name not in spare
            and not name.endswith(_DERIVED)
            and not name.startswith(self._layout.unused)
        )
        if left:
            raise CheckpointError(f"{folder} stores {_listed(left)}, for which the model of its {CONFIG} has no place")
        missing = sorted(name for name in pieces if name not in stored)
        if missing and all(".block_keys." in name for name in missing):
            raise CheckpointError(
                f"{folder} lacks {_listed(missing)}, the gates that routing.key 'gate' chooses by; train them with: "
                "bilevel route --method gate"
            )
        if missing:
            raise CheckpointError(f"{folder} lacks {_listed(missing)}, which the model of its {CONFIG} needs")
        for name, parts in pieces.items():
            if stored[name].shape != parts[0].shape:
                raise CheckpointError(
                    f"{name} has shape {list(stored[name].shape)} in {stored[name].file.name}, "
                    f"but the model of {CONFIG} needs {list(parts[0].shape)}"
                )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one would be an extreme. Reads once and copies nothing, unlike
    ``isfinite().all()``."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_table(name: str, table: Tensor, experts: Experts | None) -> None:
    """A word's experts must exist, and each be named once: a second time would count twice, which no gate here does."""
    assert experts is not None
    outside = ((table < 0) | (table >= experts.num_experts)).any(1)
    twice = (table.sort(1).values.diff(dim=1) == 0).any(1)
    for rows, problem in ((outside, f"but there are experts 0..{experts.num_experts - 1}"), (twice, "one of them twice")):
        if rows.any():
            word = int(rows.nonzero()[0])
            raise CheckpointError(
                f"{name} gives token {word} the experts {table[word].tolist()}, {problem}; correct the table, or num_experts"
            )


def _check_finite(name: str, path: Path, tensor: Tensor, filled: Tensor) -> None:
    if _is_finite(filled):
        return
    if _is_finite(tensor):
        kind = str(filled.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} holds values too large for {kind}; load or export the model in float32")
    raise CheckpointError(f"{name} in {path.name} holds NaN or infinite values; the model is not usable")


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, ignore: Collection[str] = ()) -> CausalLM:
    """The model in a checkpoint folder, in eval mode, its parameters in ``dtype`` (buffers keep the model's own dtype).

    Reads ``model.safetensors`` or ``pytorch_model.bin``, or the shards that an index names, one tensor at a time. Experts may
    be stored stacked (``mlp.experts.gate_up_proj`` [E, 2f, d]) or one by one (``mlp.experts.{e}.gate_proj.weight`` [f, d]).
    ignore: unknown keys of ``config.json`` to pass over.
    Raises ConfigError for a config that cannot be honoured, CheckpointError for weights that do not match it.
    """
    checkpoint = Checkpoint(folder, ignore)
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
        del weights[f"{HEAD}.weight"]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    files[CONFIG] = (json.dumps({**config_to_dict(model.config), "dtype": dtype}, indent=2) + "\n").encode()
    with replacing(folder, CheckpointError) as partial:
        for name, contents in files.items():
            (partial / name).write_bytes(contents)
        try:
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # safetensors' own name for a full disk


def _listed(names: list[str], most: int = 3) -> str:
    """``a, b, c and 4 more tensors``."""
    rest = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that exists, or that is no checkpoint and would be lost."""
    if not folder.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder or ask for it to be overwritten")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise CheckpointError(f"{folder} exists and is no checkpoint (no {CONFIG}), so it is not overwritten; move it away")
