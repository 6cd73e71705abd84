"""What runs in a process of its own, because it may take all of it along: ONNX Runtime and tokenizers, on files gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer, TextAssembler


def open_bundle(folder: str) -> Callable[[Any], str]:
    """Open and run a bundle whose files are someone's; the sentence of what it was refused for, "done" where it ran."""

    def run(verify: bool) -> str:
        try:
            session = OnnxSession.open(Path(folder), verify=verify, threads=1)
            Generator(session, None).generate([[5, 6, 7]], SamplingParams(max_tokens=2)).finish()
        except BilevelError as error:
            return str(error)
        return "done"

    return run


def read_tokenizer(folder: str) -> Callable[[Any], str]:
    """Encode and decode, all at once and piece by piece, with a tokenizer that is someone's."""

    def run(text: str) -> str:
        try:
            tokenizer = BundleTokenizer(Path(folder) / "tokenizer.json")
            ids = tokenizer.encode(text)[:200]
            tokenizer.decode(ids)
            assembler = TextAssembler(tokenizer, ("stop", "<eos>"), ids[:2])
            for token in ids:
                assembler.push(token)
            assembler.end("length")
            for token in [*ids, 0, 10**6]:
                tokenizer.bytes_of(token)
        except BilevelError as error:
            return str(error)
        return "done"

    return run
