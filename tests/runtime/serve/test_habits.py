"""Fields that clients send by habit: neutral values change nothing, others are refused and never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.runtime.serve.requests.habits import ChatHabits, Habits
from bilevel.runtime.serve.requests.schemas import ChatRequest, CompletionRequest
from tests.doubles.bundle import EOS, MAX_POSITIONS, predict
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.support.http_server import NAME, RunningServer, running

# What real clients send: OpenAI's SDK and those written for vLLM, llama.cpp, LM Studio, Open WebUI, LangChain, LiteLLM.
NEUTRAL: dict[str, list[Any]] = {
    "user": ["somebody"],
    "metadata": [{}, {"run": "1"}],
    "store": [False],
    "service_tier": ["auto", "default"],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "top_k": [-1, 0],
    "min_p": [0],
    "typical_p": [1, 1.0],
    "repetition_penalty": [1],
    "best_of": [1],
    "stop": ["", []],
    "stop_token_ids": [[]],
    "min_tokens": [0],
    "ignore_eos": [False],
    "skip_special_tokens": [True],
    "response_format": [{"type": "text"}],
    "cache_prompt": [True, False],
    "stream_options": [{"include_usage": True, "continuous_usage_stats": False, "include_obfuscation": False}],
}
CHAT: dict[str, list[Any]] = {
    "modalities": [["text"]],
    "prediction": [{"type": "content", "content": "x"}],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "top_logprobs": [],
    "max_completion_tokens": [6],
}
HARMFUL = {
    "store": True,
    "service_tier": "flex",
    "best_of": 3,
    "use_beam_search": True,
    "min_tokens": 5,
    "stop_token_ids": [5],
    "skip_special_tokens": False,
    "prompt_logprobs": 1,
    "mirostat": 2,
}
HARMFUL_IN_CHAT = {
    **{key: value for key, value in HARMFUL.items() if key != "prompt_logprobs"},
    "modalities": ["text", "audio"],
    "reasoning_effort": "high",
    "verbosity": "low",
    "functions": [{"name": "f"}],
    "continue_final_message": True,
    "audio": {"voice": "x"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    bundle: Path = write_chat_bundle(tmp_path_factory.mktemp("bundle"))
    with running(bundle) as server:
        yield server


def ask(server: RunningServer, chat: bool, **fields: Any) -> tuple[int, Any]:
    path, prompt = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}) if chat else (
        "/v1/completions", {"prompt": "hi"})  # fmt: skip
    status, _, answer = server.request("POST", path, {"model": NAME, "max_tokens": 6, "temperature": 0, **prompt, **fields})
    return status, answer


def fields_of(table: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: st.sampled_from([None, *values]) for name, values in table.items()})


@settings(max_examples=25)
@given(fields=st.booleans().flatmap(lambda chat: st.tuples(st.just(chat), fields_of(NEUTRAL | (CHAT if chat else {})))))
def test_neutral_values_change_nothing(server: RunningServer, fields: tuple[bool, dict[str, Any]]) -> None:
    chat, given_fields = fields
    if not chat:
        given_fields.pop("parallel_tool_calls", None)
    (status, answer), (_, plain) = ask(server, chat, **given_fields), ask(server, chat)
    assert status == 200, answer
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize("chat", [False, True])
def test_values_that_would_change_the_answer_are_refused(server: RunningServer, chat: bool) -> None:
    for name, value in (HARMFUL_IN_CHAT if chat else HARMFUL).items():
        status, answer = ask(server, chat, **{name: value})
        assert status == 400 and name in answer["error"]["message"], (name, answer)


def test_null_is_neutral_for_every_field_that_may_be_left_out(server: RunningServer) -> None:
    for model, chat in ((CompletionRequest, False), (ChatRequest, True)):
        names = [name for name, field in model.model_fields.items() if not field.is_required() and name not in ("routes",)]
        assert {*Habits.model_fields, *(ChatHabits.model_fields if chat else ())} <= set(names)
        nothing = dict.fromkeys(names)
        assert ask(server, chat, **{**nothing, "max_tokens": 6, "temperature": 0})[0] == 200


def test_what_counts_in_text_parts_and_answers(server: RunningServer) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    answer = {"role": "assistant", "content": "ok", "refusal": None, "annotations": [], "audio": None, "function_call": None,
              "tool_calls": None, "reasoning_content": None, "provider_specific_fields": None, "parsed": {"a": 1}}  # fmt: skip
    status, found = ask(server, True, messages=[{"role": "user", "content": [part]}, answer, {"role": "user", "content": "x"}])
    assert status == 200, found
    wrong = [{"role": "user", "content": "hi"}, {**answer, "annotations": [{"url": "x"}]}]
    assert ask(server, True, messages=wrong)[0] == 400


def test_settings_that_do_something(server: RunningServer) -> None:
    """The fake model's best token is known, and the others follow it at distances of 0.1."""
    best = predict([5, 6, 7], 1)[0]
    following = (best + 1) % 293

    def first(**fields: Any) -> int:
        answer = server.complete([5, 6, 7], max_tokens=1, logprobs=0, **fields)
        text: str = answer["choices"][0]["logprobs"]["tokens"][0]
        return next(token for token in (best, following, (best + 5) % 293) if server_word(server, token) == text)

    assert first() == best
    assert first(logit_bias={str(best): -100}) == following
    assert first(logit_bias={str((best + 5) % 293): 1}) == (best + 5) % 293
    assert first(min_p=1.0, temperature=50.0, seed=1) == best
    assert first(top_k=1, temperature=50.0, seed=1) == best


def server_word(server: RunningServer, token: int) -> str:
    answer = server.complete([5], max_tokens=1, logprobs=0, logit_bias={str(token): 100})
    return str(answer["choices"][0]["logprobs"]["tokens"][0])


def test_ignoring_the_end(server: RunningServer) -> None:
    bias = {str(EOS): 100}
    assert server.complete([5, 6], max_tokens=9, logit_bias=bias)["usage"]["completion_tokens"] == 1
    assert server.complete([5, 6], max_tokens=9, logit_bias=bias, ignore_eos=True)["usage"]["completion_tokens"] == 9


def test_no_limit(server: RunningServer) -> None:
    for chat in (False, True):
        status, answer = ask(server, chat, max_tokens=-1)
        usage = answer["usage"]
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "stop" or usage["total_tokens"] == MAX_POSITIONS + 1
    assert ask(server, True, max_tokens=0)[0] == 400
