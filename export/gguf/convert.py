"""A GGUF file -> a checkpoint folder in Hugging Face's format, one piece of a tensor at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from bilevel.errors import CheckpointError
from bilevel.export.gguf.configuration import make_config
from bilevel.export.gguf.dequantise import read_chunks
from bilevel.export.gguf.parts import read_parts
from bilevel.export.gguf.placement import Placed, Rows
from bilevel.export.gguf.tokenizer import make_tokenizer
from bilevel.folders import replacing

# --dtype -> (config.json's name, safetensors' name, bytes a weight)
DTYPES = {"fp32": ("float32", "F32", 4), "fp16": ("float16", "F16", 2), "bf16": ("bfloat16", "BF16", 2)}


@dataclass(frozen=True)
class ImportReport:
    """What an import did. kinds: how many tensors the file stores in each type; size_bytes: of the checkpoint's weights."""

    path: Path
    config: dict[str, Any]
    num_weights: int
    size_bytes: int
    kinds: dict[str, int]


def import_gguf(
    path: Path, folder: Path, *, dtype: str = "fp32", force: bool = False, on_stage: Callable[[str], None] = lambda stage: None
) -> ImportReport:
    """Write the model in the GGUF file ``path`` as a checkpoint ``folder``. Raises CheckpointError; nothing is then written.

    dtype: fp32 holds the dequantised weights exactly; fp16 and bf16 round them. An existing checkpoint is replaced only with
    force.
    """
    path, folder = Path(path), Path(folder)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is unknown; the types are {', '.join(DTYPES)}")
    check_target(folder, force)
    on_stage(f"reading the head of {path}")
    file = read_parts(path)
    config, placed = make_config(file)
    tokenizer, tokenizer_config, ends = make_tokenizer(file)
    if len(tokenizer.get_vocab()) > config["vocab_size"]:
        raise CheckpointError(
            f"{path} lists {len(tokenizer.get_vocab())} tokens (tokenizer.ggml.tokens) and embeds {config['vocab_size']} "
            "(token_embd.weight); convert the model again with llama.cpp's convert_hf_to_gguf.py"
        )
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    config["dtype"] = DTYPES[dtype][0]
    generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    with replacing(folder, CheckpointError) as partial:
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation)
        _write_json(partial / "tokenizer_config.json", tokenizer_config)
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        with (partial / "model.safetensors").open("wb") as output:
            _write_weights(placed, output, dtype, on_stage)
        size = (partial / "model.safetensors").stat().st_size
    count = sum(int(np.prod(each.shape)) for each in placed)
    sources = {rows.source.name: rows.source.kind for each in placed for rows in each.rows}
    kinds = Counter(sources.values())
    return ImportReport(folder, config, count, size, dict(kinds.most_common()))


def check_target(folder: Path, force: bool) -> None:
    """Refuse a folder that would be lost. Raises CheckpointError."""
    if not folder.exists():
        return
    if not force:
        raise CheckpointError(f"{folder} exists; choose another folder or replace it with --force")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise CheckpointError(
            f"{folder} exists and is no checkpoint (no config.json), so --force does not replace it; move it away"
        )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(placed: list[Placed], output: BinaryIO, dtype: str, on_stage: Callable[[str], None]) -> None:
    """A safetensors file in the order of ``placed``: the length of its head, the head (names, types, shapes, places), the
    weights.

    The safetensors package writes a file only from tensors that are in memory all at once.
    """
    _, name, width = DTYPES[dtype]
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in placed:
        begin, end = end, end + width * int(np.prod(each.shape))
        head[each.name] = {"dtype": name, "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little") + text)
    for number, each in enumerate(placed, start=1):
        on_stage(f"weights: tensor {number} of {len(placed)}, {each.name}")
        for rows in each.rows:
            chunks = read_chunks(rows.source, rows.heads, rows.start, rows.stop)
            output.writelines(_rounded(rows, weights, dtype).data for weights in chunks)


def _rounded(rows: Rows, weights: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 weights as they are stored. Raises CheckpointError where one is too large for fp16."""
    if dtype == "bf16":
        rounded: np.ndarray = quantize(weights, GGMLQuantizationType.BF16)
        return np.ascontiguousarray(rounded)
    if dtype == "fp32":
        return np.ascontiguousarray(weights, np.float32)
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError(
            f"{rows.source.path} holds weights too large for fp16 in {rows.source.name}; import it as fp32 or bf16"
        )
    return half
