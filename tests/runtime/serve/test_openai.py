"""OpenAI's endpoints, judged by OpenAI's own client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer

from tests.doubles.bundle import BLOCK_SIZE, MAX_POSITIONS, VOCAB_SIZE, edit_manifest, file_record, predict, write_bundle
from tests.support.http_server import NAME, RunningServer, running

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}{{ raise_exception('begin with a user') }}"
    "{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_chat_bundle(folder: Path, template: str = TEMPLATE) -> Path:
    write_bundle(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    edit_manifest(folder, lambda m: m["files"].update({"chat_template.jinja": file_record(folder / "chat_template.jinja")}))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(bundle / "tokenizer.json"))


def expected(tokenizer: Tokenizer, prompt: str | list[int], max_tokens: int) -> str:
    ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    return tokenizer.decode(predict(ids, max_tokens))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "bilevel"
    with pytest.raises(openai.NotFoundError, match="the model 'other' is not served here, 'fake' is"):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", ["def add(a, b):", [5, 6, 7], "für 漢字 und 🦊🦊"])
def test_a_completion_is_what_the_model_says(client: openai.OpenAI, tokenizer: Tokenizer, prompt: str | list[int]) -> None:
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=20, temperature=0)
    choice = answer.choices[0]
    assert choice.text == expected(tokenizer, prompt, 20)
    assert choice.finish_reason in ("length", "stop")
    ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(predict(ids, 20)) == answer.usage.total_tokens - len(ids)


def test_several_prompts_and_choices(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompts = ["def add", "the quick"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=6, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [expected(tokenizer, p, 6) for p in prompts for _ in range(2)]
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(tokenizer.encode(p).ids) for p in prompts)


def test_streaming_gives_the_same_text(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    stream = client.completions.create(
        model=NAME, prompt="für 漢", max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(tokenizer, "für 漢", 30)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason is not None
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(chunks) - 1


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    texts = []
    for _ in range(2):
        answer = client.completions.create(model=NAME, prompt="def", n=3, max_tokens=12, temperature=30.0, seed=-7)
        texts.append([choice.text for choice in answer.choices])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_stop_text_ends_the_answer_and_frees_the_row(
    client: openai.OpenAI, server: RunningServer, tokenizer: Tokenizer
) -> None:
    whole = expected(tokenizer, "def add", 40)
    stop = whole[6:9]
    for stream in (False, True):
        answer = client.completions.create(
            model=NAME, prompt="def add", max_tokens=40, temperature=0, stop=[stop, "never"], stream=stream
        )
        pieces = list(answer) if stream else [answer]
        assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]
        assert pieces[-1].choices[0].finish_reason == "stop"
    wait_for(lambda: server.scheduler.num_active == 0)


def wait_for(is_so: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_logprobs(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """The fake model's logits fall by 0.1 from the best token on, so every value is known."""
    answer = client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=4, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.top_logprobs and found.tokens and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == 4
    assert found.text_offset[0] == 0
    assert found.token_logprobs == pytest.approx([found.token_logprobs[0]] * 4, abs=1e-5)
    values = list(found.top_logprobs[0].values())
    assert max(values) == pytest.approx(found.token_logprobs[0])
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content) == 3
    best, second = content.content[0].top_logprobs
    assert best.logprob - second.logprob == pytest.approx(0.1, abs=1e-5)
    assert bytes(content.content[0].bytes or []).decode() == content.content[0].token


def test_chat_uses_the_bundles_template(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    prompt = "<system>be brief<user>hello<assistant>"
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=10, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == expected(tokenizer, prompt, 10)
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=10, temperature=0, stream=True)  # type: ignore[arg-type]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="refuses these messages: begin with a user"):
        client.chat.completions.create(model=NAME, messages=[{"role": "assistant", "content": "x"}])


def test_chat_without_a_limit_fills_the_row(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], temperature=0)
    usage = answer.usage
    assert usage is not None
    assert answer.choices[0].finish_reason == "stop" or usage.total_tokens == MAX_POSITIONS + 1


def test_the_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    prompt = [7, 8, 9] * 9
    client.completions.create(model=NAME, prompt=prompt, max_tokens=3, temperature=0)
    again = client.completions.create(model=NAME, prompt=[*prompt, 4], max_tokens=3, temperature=0)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == len(prompt)


def test_many_clients_at_once_get_what_they_get_alone(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    texts: dict[int, str] = {}

    def ask(index: int) -> None:
        stream = client.completions.create(
            model=NAME, prompt=[index + 2] * (index + 1), max_tokens=25, temperature=0, stream=True
        )
        texts[index] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: expected(tokenizer, [index + 2] * (index + 1), 25) for index in range(10)}


def test_a_client_that_goes_away_frees_its_row(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.completions.create(model=NAME, prompt=[3, 4], max_tokens=90, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.scheduler.num_active == 0)


def test_routes_without_a_graph_that_gives_them_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match="the graph that runs this model does not give its routes; leave routes out"
    ):
        client.completions.create(model=NAME, prompt="x", extra_body={"routes": True})


def test_routes_name_the_blocks_of_the_prompt(exported: object) -> None:
    """A real model: every generated token says which blocks its last word read, and the prompt comes cut into blocks."""
    bundle = exported("two_level")[1]  # type: ignore[operator]
    with running(bundle) as server:
        prompt = "def add(a, b): return a + b"
        body = {"model": NAME, "prompt": prompt, "max_tokens": 5, "temperature": 0, "stream": True, "routes": True}
        status, _, content = server.request("POST", "/v1/completions", body)
        assert status == 200
        events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
        opening, chunks = events[0], events[1:]
        size = opening["block_size"]
        assert "".join(opening["prompt_blocks"][0]) == prompt
        num_prompt = len(Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(prompt).ids)
        assert len(opening["prompt_blocks"][0]) == -(-num_prompt // size)
        assert opening["routed_layers"] == list(range(len(chunks[0]["choices"][0]["routes"]["blocks"])))
        for place, chunk in enumerate(chunks):
            routes = chunk["choices"][0]["routes"]
            position = num_prompt - 1 + place
            assert routes["position"] == position
            for layer in routes["blocks"]:
                assert layer == sorted(set(layer)) and layer[-1] == position // size
                assert set(layer) <= set(routes["candidates"])
            assert set(routes["experts"]) == {"1"} and len(routes["experts"]["1"]) == 2
        whole = server.complete(prompt, max_tokens=5, routes=True)
        assert whole["choices"][0]["routes"] == [chunk["choices"][0]["routes"] for chunk in chunks]


def test_vocabulary_is_checked(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"the prompt holds the token {VOCAB_SIZE}"):
        client.completions.create(model=NAME, prompt=[VOCAB_SIZE])
    assert BLOCK_SIZE > 1
