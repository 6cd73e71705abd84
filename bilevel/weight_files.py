"""The files that a checkpoint's weights lie in: safetensors or ``pytorch_model.bin``, one file or shards with an index.

Names, dtypes and shapes are read without the weights. A pickle is read by PyTorch's weights-only loader, which runs no foreign
code.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.folders import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What wrappers of training leave in front of every name: DataParallel and DDP, torch.compile.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_ADAPTER = "base_model.model."
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32"}  # a table of experts
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor as its file describes it: key is its name there; dtype in safetensors' spelling."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


class OpenFile(Protocol):
    """A file of weights that is open."""

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor."""
        ...

    def get_tensor(self, key: str) -> Tensor:
        """One tensor of floats or of whole numbers, on the CPU."""
        ...


class _Safetensors:
    """A safetensors file whose header the library has checked. Weights are read, not mapped, which would count against memory
    a second time: the header is its length in 8 bytes and JSON, and offsets count from its end."""

    def __init__(self, path: Path, file: Any) -> None:
        self._file, self._plain = file, path.open("rb", buffering=0)
        length = int.from_bytes(self._plain.read(8), "little")
        self._header, self._start = json.loads(self._plain.read(length)), 8 + length

    def close(self) -> None:
        """Close the file."""
        self._plain.close()

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        slices = {key: self._file.get_slice(key) for key in sorted(self._file.keys())}
        return {key: (entry.get_dtype(), tuple(entry.get_shape())) for key, entry in slices.items()}

    def get_tensor(self, key: str) -> Tensor:
        entry = self._header[key]
        if (dtype := _TORCH_DTYPES.get(entry["dtype"])) is None:
            raise CheckpointError(f"{key} is stored as {entry['dtype']}; bilevel reads float weights only: write it as F32")
        first, end = entry["data_offsets"]
        content = torch.empty(end - first, dtype=torch.uint8)
        view, done = content.numpy().data, 0
        self._plain.seek(self._start + first)
        while done < len(view):  # one read gives 2 GiB at most
            if not (count := self._plain.readinto(view[done:])):
                raise OSError(f"it ends within {key}")
            done += count
        return content.view(dtype).reshape(entry["shape"])


def float_tensor(file: OpenFile, key: str) -> Tensor:
    """A tensor in fp32. Raises CheckpointError where it holds no floats."""
    tensor = file.get_tensor(key)
    if not tensor.is_floating_point():
        kind = _DTYPES.get(tensor.dtype, tensor.dtype)
        raise CheckpointError(f"{key} is stored as {kind}, but must hold floats; write it as F32")
    return tensor.float()


class _Pickle:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            key: (_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
            for key, tensor in sorted(self._tensors.items())
        }

    def get_tensor(self, key: str) -> Tensor:
        return self._tensors[key]


@contextmanager
def opened(path: Path, index: str = INDEX) -> Iterator[OpenFile]:
    """A file of weights; whatever is wrong with it becomes one sentence."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, but {index} names it; download the checkpoint again")
    if path.suffix != ".safetensors":
        yield _Pickle(_unpickled(path))
        return
    try:
        with safe_open(path, framework="pt") as file, closing(_Safetensors(path, file)) as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); download the checkpoint again") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle."""
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error) or "weights only" not in str(error).lower():  # no pickle at all
            raise CheckpointError(f"{path} is damaged or truncated (no pickle); download the checkpoint again") from None
        raise CheckpointError(
            f"{path} holds other objects than tensors, and reading those can run foreign code; "
            "convert it with transformers' save_pretrained, which writes safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        summary = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or truncated ({summary}); download the checkpoint again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and no named tensors; save the model's state_dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds {key!r}, a {type(value).__name__} and no tensor; save the model's state_dict alone"
            )
    return dict(content)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name, without what training wrappers put in front -> entry of every tensor in the checkpoint. Raises CheckpointError."""
    files, index = _weight_files(folder)
    stored: dict[str, Stored] = {}
    for path in files:
        with opened(path, index.name if index else INDEX) as file:
            for key, (dtype, shape) in file.describe().items():
                name = _plain(key, path)
                if name in stored:
                    raise CheckpointError(f"{name} is stored twice, in {stored[name].file.name} and in {path.name}")
                stored[name] = Stored(path, key, dtype, shape)
    if index is not None:
        _check_index(index, {entry.key: entry.file.name for entry in stored.values()})
    return stored


def _plain(key: str, path: Path) -> str:
    name = _WRAPPERS.sub("", key)
    if name.startswith(_ADAPTER):
        raise CheckpointError(
            f"{path.name} holds {key}, a name of an adapter that is not merged; merge it with peft's merge_and_unload "
            "and save the model again"
        )
    return name


def _check_index(index: Path, files: Mapping[str, str]) -> None:
    """The shards hold what the index says of them, no less and no more."""
    listed = _weight_map(index)
    for key, file in listed.items():
        if files.get(key) != file:
            where = f"but it lies in {files[key]}" if key in files else "but no shard holds it"
            raise CheckpointError(f"{index} says that {key} lies in {file}, {where}; download the checkpoint again")
    for key, file in files.items():
        if key not in listed:
            raise CheckpointError(f"{file} holds {key}, which {index.name} does not list; download the checkpoint again")


def weights_entry(folder: Path) -> Path:
    """The file that stands for a checkpoint's weights: the single file, or the index of the shards. Raises CheckpointError."""
    files, index = _weight_files(folder)
    return index or files[0]


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The files of the weights and, where they are shards, their index; or CheckpointError with what is there instead."""
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single], None
        if (folder / index).is_file():
            return [folder / name for name in sorted(set(_weight_map(folder / index).values()))], folder / index
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter and not the model that it belongs to; merge the two with peft's merge_and_unload "
            "and give the folder that save_pretrained then writes"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}) under a name that is not {PICKLE}; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder} holds no {WEIGHTS} and no {INDEX}; give the folder of a complete checkpoint")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says."""
    try:
        listed = dict(read_json(index)["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a weight index ({error!r}); download the checkpoint again") from None
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}, which does not lie in the folder itself")
    return listed
