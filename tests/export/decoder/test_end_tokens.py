"""What ends a text is the union of what a checkpoint's files say, each with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bilevel.config import ModelConfig
from bilevel.errors import ExportError
from bilevel.export.decoder.end_tokens import TEMPLATE, end_tokens
from tests.support.tokenizers_of_kinds import byte_level_bpe, unigram

CHATML = (
    "{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}</s>{% endif %}"
)


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        eos_token_ids=(1,),
    )


def write(folder: Path, make: Any = byte_level_bpe, **files: Any) -> Path:
    make().save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_every_source_counts(tmp_path: Path, config: ModelConfig) -> None:
    write(tmp_path, generation_config={"eos_token_id": [5, 1]}, tokenizer_config={"eos_token": "</s>", "chat_template": CHATML})
    assert end_tokens(tmp_path, config) == {
        1: ["config.json", "generation_config.json"],
        5: ["generation_config.json"],
        2: ["tokenizer_config.json's eos_token"],
        3: [TEMPLATE],
    }


@pytest.mark.parametrize("make", [byte_level_bpe, unigram])
def test_the_tokenizers_end_alone(tmp_path: Path, config: ModelConfig, make: Any) -> None:
    write(tmp_path, make, generation_config={}, special_tokens_map={"eos_token": {"content": "<|im_end|>"}})
    assert end_tokens(tmp_path, config) == {1: ["config.json"], 3: ["special_tokens_map.json's eos_token"]}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # no token ends a turn
        "{% for m in messages %}<pad>{{ m.content }} and more </s>{% endfor %}",  # something else comes first
        "{{ raise_exception('no') }}",
        "{{ nothing.at.all }}",
        "{% for m in messages %}{{ m.role }}</s>{% endfor %}",  # the answer is not shown
    ],
)
def test_templates_that_say_nothing(tmp_path: Path, config: ModelConfig, template: str) -> None:
    write(tmp_path, tokenizer_config={"chat_template": template})
    assert end_tokens(tmp_path, config) == {1: ["config.json"]}


def test_a_template_may_refer_to_the_tokens_it_is_given(tmp_path: Path, config: ModelConfig) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    write(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": [{"name": "default", "template": template}]})
    assert end_tokens(tmp_path, config)[2] == ["tokenizer_config.json's eos_token", TEMPLATE]


@pytest.mark.parametrize("listed", [10**6, -1, "2", True, [None]])
def test_an_end_that_is_no_token(tmp_path: Path, config: ModelConfig, listed: Any) -> None:
    with pytest.raises(ExportError, match=r"generation_config.json of .* names the end token .*: mend it"):
        end_tokens(write(tmp_path, generation_config={"eos_token_id": listed}), config)
    (tmp_path / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ExportError, match="is not valid JSON .*|is no JSON object; write it anew or delete it"):
        end_tokens(tmp_path, config)


@pytest.mark.parametrize(
    "damage",
    [
        {"added_tokens": [{"id": 1}]},
        {"added_tokens": [{"content": "x"}]},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": None}},
    ],
)
def test_a_file_that_is_no_tokenizers(tmp_path: Path, config: ModelConfig, damage: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(damage), encoding="utf-8")
    with pytest.raises(ExportError, match=r"tokenizer\.json is no tokenizer's"):
        end_tokens(tmp_path, config)
