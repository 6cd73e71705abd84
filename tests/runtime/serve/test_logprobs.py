"""Log-probabilities: a token's own bytes, every alternative, and those of the prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.doubles.bundle import VOCAB_SIZE, make_tokenizer, predict
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.support.http_server import NAME, RunningServer, running

PROMPT = [5, 6, 7, 200, 9]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(write_chat_bundle(tmp_path_factory.mktemp("bundle"))) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def value(prompt: list[int], token: int) -> float:
    """The fake model's log-probability of ``token`` behind ``prompt``: 0.1 less for each step behind the best."""
    (best,) = predict(prompt, 1)
    steps = (token - best) % VOCAB_SIZE
    return -0.1 * steps - math.log(sum(math.exp(-0.1 * step) for step in range(VOCAB_SIZE)))


def scored(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """One choice of an answer that echoes PROMPT."""
    choice: dict[str, Any] = server.complete(PROMPT, temperature=0, echo=True, **fields)["choices"][0]
    return choice


def test_the_prompts_log_probabilities(server: RunningServer, tokenizer: Tokenizer) -> None:
    choice = scored(server, max_tokens=0, logprobs=1)
    logprobs = choice["logprobs"]
    assert choice["text"] == tokenizer.decode(PROMPT) and choice["finish_reason"] == "length"
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    expected = [value(PROMPT[:place], PROMPT[place]) for place in range(1, len(PROMPT))]
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(logprobs["top_logprobs"][1:], 1):
        assert list(top.values()) == pytest.approx([value(PROMPT[:place], predict(PROMPT[:place], 1)[0])], abs=1e-4)
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(PROMPT)


def test_prompt_and_text_together(server: RunningServer) -> None:
    """As lm-evaluation-harness asks: one token more, which it drops."""
    alone = scored(server, max_tokens=0, logprobs=1)["logprobs"]
    both = scored(server, max_tokens=3, logprobs=1)
    text = server.complete(PROMPT, max_tokens=3, temperature=0, logprobs=1)["choices"][0]
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert both["logprobs"][key] == alone[key] + text["logprobs"][key]
    assert both["text"] == scored(server, max_tokens=0)["text"] + text["text"]
    for choice in (both, text):
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets) and offsets[0] == 0


def test_streamed(server: RunningServer) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    _, _, content = server.request("POST", "/v1/completions", {**body, "stream": True})
    events = [json.loads(line[6:])["choices"][0] for line in content.decode().splitlines() if line.startswith("data: {")]
    whole = scored(server, max_tokens=3, logprobs=2)
    assert "".join(event["text"] for event in events) == whole["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [each for event in events for each in event["logprobs"][key]] == whole["logprobs"][key]


def test_a_prompt_is_scored_beside_others_and_again(server: RunningServer) -> None:
    """Several prompts at once, of which all have been read before."""
    prompts = [PROMPT, [5], PROMPT[:3]]
    body = {"model": NAME, "prompt": prompts, "max_tokens": 0, "logprobs": 1, "echo": True}
    _, _, answer = server.request("POST", "/v1/completions", body)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        expected = [value(prompt[:place], prompt[place]) for place in range(1, len(prompt))]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 9


def test_as_many_alternatives_as_asked_for(server: RunningServer) -> None:
    """Of 20 neighbours in the vocabulary many are parts of characters, which used to look alike."""
    for prompt in ([5, 6, 7], [200, 201], [90, 17]):
        top = server.complete(prompt, max_tokens=4, temperature=0, logprobs=20)["choices"][0]["logprobs"]["top_logprobs"]
        assert [len(each) for each in top] == [20] * len(top)


def test_a_tokens_own_bytes(server: RunningServer, tokenizer: Tokenizer) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
    _, _, answer = server.request("POST", "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 20})
    content = answer["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(each["bytes"]) for each in content if each["token"] not in ("<eos>", "<pad>"))
    assert data.decode("utf-8", "replace") == answer["choices"][0]["message"]["content"]
    alternatives = [tuple(each["bytes"]) for token in content for each in token["top_logprobs"]]
    assert any(byte >= 0x80 for data in alternatives for byte in data)
    assert (0xEF, 0xBF, 0xBD) not in alternatives  # U+FFFD stands for bytes that are none


def test_no_token_at_all(server: RunningServer) -> None:
    choice = server.complete(PROMPT, max_tokens=0)["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")


@pytest.mark.parametrize("stop", ["", [], None])
def test_no_stop_text(server: RunningServer, stop: Any) -> None:
    body = {"max_tokens": 6, "temperature": 0}
    assert server.complete(PROMPT, **body, stop=stop)["choices"] == server.complete(PROMPT, **body)["choices"]
