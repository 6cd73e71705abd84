"""The whole line in seconds: checkpoint, export, check, and text from the runtime, against greedy decoding in PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bilevel.checkpoint import load_model
from bilevel.export.check.parity import check_bundle
from bilevel.model import CausalLM
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.state import DecoderState
from tests.support.tiny_models import BLOCK_SIZE, PREFILL_CHUNK, PRESETS

MAX_TOKENS = 24
# One token, shorter than a block, a block, one more, and more than a prefill chunk.
LENGTHS = (1, 3, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * PREFILL_CHUNK + 5)


def decode_greedily(model: CausalLM, prompt: Sequence[int], eos: Sequence[int]) -> list[int]:
    """One row at a time, the prompt in one call, then token by token."""
    capacity = -(-(len(prompt) + MAX_TOKENS) // BLOCK_SIZE) * BLOCK_SIZE
    state, pending, past = DecoderState.empty(model.config, 1, capacity), list(prompt), 0
    generated: list[int] = []
    while len(generated) < MAX_TOKENS and not (generated and generated[-1] in eos):
        past_len, new_len = (torch.tensor([n], dtype=torch.int32) for n in (past, len(pending)))
        with torch.no_grad():
            logits, state = model.step(torch.tensor([pending]), past_len, new_len, state)
        past += len(pending)
        pending = [int(logits[0].argmax())]
        generated += pending
    return generated


@pytest.mark.parametrize("preset", PRESETS)
def test_checkpoint_to_text(exported: Callable[[str], tuple[Path, Path]], preset: str) -> None:
    checkpoint, bundle = exported(preset)
    model = load_model(checkpoint)
    generator = Generator.open(bundle, threads=1)
    prompts = [torch.randint(2, model.config.vocab_size, (length,)).tolist() for length in LENGTHS]
    expected = [decode_greedily(model, prompt, model.config.eos_token_ids) for prompt in prompts]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    together = generator.generate(prompts, params).finish()
    assert [completion.token_ids for completion in together] == expected
    alone = generator.generate(prompts[-1:], params, prefill_chunk=3).finish()
    assert [completion.token_ids for completion in alone] == expected[-1:]
    assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS), "the rows differ, so mixing them up would show"


def test_checkpoint_to_text_from_text(exported: Callable[[str], tuple[Path, Path]]) -> None:
    """Through the tokenizer of the bundle, which is the checkpoint's."""
    checkpoint, bundle = exported("two_level")
    generator = Generator.open(bundle, threads=1)
    prompt = "the quick brown fox, für"
    ids = generator.tokenizer.encode(prompt)
    expected = decode_greedily(load_model(checkpoint), ids, (1,))
    (completion,) = generator.generate([prompt], SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)).finish()
    assert completion.token_ids == expected


def test_checkpoint_to_check(exported: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """The check that the user runs, on the bundle that the runtime runs."""
    checkpoint, bundle = exported("two_level")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    assert check_bundle(copy, checkpoint, tokens=96).passed
