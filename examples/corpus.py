"""Text for the example model: Python's own library, split by file into training and held-out text, and a tokenizer for it."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bilevel.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
HELDOUT_BYTES = 96 * 1024


def library_folder() -> Path:
    """Where this Python keeps the sources of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(folder: Path) -> dict[str, str]:
    """Every ``*.py`` below ``folder`` by relative name, sorted. Left out: installed packages, the tables of
    ``encodings`` (numbers, not code) and files that are not UTF-8.."""
    documents = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if {"site-packages", "dist-packages", "encodings"} & set(name.split("/")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and BOS not in text and EOS not in text:
            documents[name] = text
    if not documents:
        raise ConfigError(f"{folder} holds no Python sources to train on; name a folder with *.py files by --text")
    return documents


def is_heldout(text: str) -> bool:
    """Three documents in a hundred, chosen by the hash of their text: a copy of a file falls on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < 3


def pick_heldout(documents: Iterable[str], most_bytes: int = HELDOUT_BYTES) -> list[str]:
    """Held-out documents of 2 to 20 KB in the order of their hashes, up to ``most_bytes`` in all (at least one)."""
    pool = sorted({text for text in documents if is_heldout(text)}, key=lambda text: hashlib.sha256(text.encode()).digest())
    picked: list[str] = []
    used = 0
    for text in [text for text in pool if 2048 <= len(text.encode()) <= 20480] or pool:
        if not picked or used + len(text.encode()) <= most_bytes:
            picked.append(text)
            used += len(text.encode())
    return picked


def join_documents(documents: Iterable[str]) -> str:
    """One text with ``<|eos|>`` between documents; :func:`split_documents` takes it apart."""
    return f"\n{EOS}\n".join(documents)


def split_documents(text: str) -> list[str]:
    """The inverse of :func:`join_documents`."""
    return text.split(f"\n{EOS}\n")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's kind): every byte sequence has an encoding and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, model_max_length: int) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json``, as Hugging Face's ``AutoTokenizer`` reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """uint16 [S]: the documents' tokens one after the other, each between ``<|bos|>`` and ``<|eos|>``."""
    stream: list[int] = []
    for text in documents:
        stream += [BOS_ID, *tokenizer.encode(text).ids, EOS_ID]
    return np.array(stream, dtype=np.uint16)


def prepare(folder: Path, text: Path, vocab_size: int, model_max_length: int) -> None:
    """Write ``folder``: the tokenizer's files, the training tokens and the held-out text. Made once; whole or not at all."""
    if folder.exists():
        return
    documents = read_documents(text)
    training = [document for document in documents.values() if not is_heldout(document)]
    tokenizer = train_tokenizer(training, vocab_size)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(tokenizer, model_max_length).items():
        (partial / name).write_bytes(content)
    heldout = pick_heldout(documents.values())
    (partial / "heldout.txt").write_text(join_documents(heldout), encoding="utf-8")
    np.save(partial / "heldout.npy", encode(tokenizer, heldout))
    np.save(partial / "train.npy", encode(tokenizer, training))
    partial.rename(folder)


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """int64 [n, length + 1]: consecutive windows, each sharing one token with the next; the rest is dropped."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ConfigError(f"the held-out text has {len(tokens)} tokens, too few for a row of {length}; give more text")
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int64)


def batch(tokens: np.ndarray, step: int, *, rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 [rows, length] each, of one step.

    The windows of the stream are shuffled anew in every pass; what a step sees depends on its number and the seed alone.
    """
    num_windows = (len(tokens) - 1) // length
    if num_windows < rows:
        raise ConfigError(f"the text gives {len(tokens)} tokens, fewer than one step takes ({rows * length}); give more text")
    passes, place = divmod(step, num_windows // rows)
    order = np.random.default_rng([seed, passes]).permutation(num_windows)
    chosen = order[place * rows : (place + 1) * rows]
    windows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in chosen]).astype(np.int64)
    return windows[:, :-1], windows[:, 1:]
