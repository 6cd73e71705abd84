"""Generation against a model whose every token is known beforehand."""

from __future__ import annotations

import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.errors import ContextTooLong, RequestError
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.results import Event
from bilevel.runtime.generate.sampling import SamplingParams
from tests.doubles.bundle import EOS, MAX_POSITIONS, PREFILL_CHUNK, VOCAB_SIZE, predict, write_bundle

TOKENS = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=45)
# Shorter than a block, a block, one more, longer than a chunk and no multiple of it.
LENGTHS = [1, 7, 8, 9, 16, 17, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.open(folder, threads=1)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The same model without an end-of-text token."""
    return Generator.open(write_bundle(tmp_path_factory.mktemp("endless"), eos=()), threads=1)


def prompt_of(length: int) -> list[int]:
    return [2 + (7 * place + length) % 280 for place in range(length)]


def ids_of(generator: Generator, prompts: list[list[int]], params: SamplingParams, **options: int) -> list[list[int]]:
    return [completion.token_ids for completion in generator.generate(prompts, params, **options).finish()]


@pytest.mark.parametrize("chunk", [1, 5, 8, PREFILL_CHUNK], ids=lambda chunk: f"chunk{chunk}")
@pytest.mark.parametrize("length", LENGTHS, ids=lambda length: f"L{length}")
def test_generate_gives_the_predicted_tokens(generator: Generator, length: int, chunk: int) -> None:
    found = ids_of(generator, [prompt_of(length)], SamplingParams(max_tokens=20), prefill_chunk=chunk)
    assert found == [predict(prompt_of(length), 20)]


@given(st.lists(TOKENS, min_size=1, max_size=4), st.integers(1, PREFILL_CHUNK), st.integers(1, 25))
def test_rows_of_a_batch_are_what_they_are_alone(
    generator: Generator, prompts: list[list[int]], chunk: int, max_tokens: int
) -> None:
    """Rows of different lengths, any chunk: short rows generate while long ones are read, finished rows idle."""
    found = ids_of(generator, prompts, SamplingParams(max_tokens=max_tokens), prefill_chunk=chunk)
    assert found == [predict(prompt, max_tokens) for prompt in prompts]


@given(st.lists(TOKENS, min_size=2, max_size=4), st.integers(1, PREFILL_CHUNK), st.integers(0, 2**32))
def test_sampled_rows_do_not_depend_on_each_other(
    generator: Generator, prompts: list[list[int]], chunk: int, seed: int
) -> None:
    """One setting per row: row i of a batch is what it is alone, for any chunk."""
    params = [SamplingParams(temperature=2.0, top_p=0.9, seed=seed + row, max_tokens=12) for row in range(len(prompts))]
    together = generator.generate(prompts, params, prefill_chunk=chunk).finish()
    for prompt, each, completion in zip(prompts, params, together, strict=True):
        assert generator.generate([prompt], [each]).finish()[0] == completion


def test_one_seed_for_all_rows_still_gives_different_texts(generator: Generator) -> None:
    first, second = ids_of(generator, [[5, 6]] * 2, SamplingParams(temperature=2.0, seed=4, max_tokens=20))
    assert first != second
    assert ids_of(generator, [[5, 6]] * 2, SamplingParams(temperature=2.0, seed=4, max_tokens=20)) == [first, second]


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3), st.integers(0, 99))
def test_pieces_joined_are_the_full_decode(endless: Generator, prompts: list[str], seed: int) -> None:
    generation = endless.generate(prompts, SamplingParams(temperature=3.0, seed=seed, max_tokens=25))
    events = list(generation)
    for row, completion in enumerate(generation.completions):
        mine = [event for event in events if event.row == row]
        assert [event.token for event in mine] == completion.token_ids
        assert "".join(event.text for event in mine) == completion.text == endless.tokenizer.decode(completion.token_ids)


def test_end_of_text_token_ends_a_row(generator: Generator) -> None:
    """Prompts after which it comes at once, not at all, and later, where it cuts a character that was held back."""
    found = {prompt: predict(prompt, 9) for prompt in product(range(2, 80), repeat=2)}
    at_once = next(prompt for prompt, ids in found.items() if ids == [EOS])
    never = next(prompt for prompt, ids in found.items() if EOS not in ids)
    cuts = (prompt for prompt, ids in found.items() if ids[-1] == EOS and len(ids) > 2)
    cut = next(prompt for prompt in cuts if generator.tokenizer.decode(found[prompt]).endswith("\ufffd"))
    generation = generator.generate([at_once, cut, never], SamplingParams(max_tokens=9))
    events = list(generation)
    assert [completion.finish_reason for completion in generation.completions] == ["eos", "eos", "length"]
    assert [event for event in events if event.row == 0] == [Event(0, EOS, "", "eos")]
    assert generation.completions[1].token_ids == found[cut]
    assert generation.completions[1].text == generator.tokenizer.decode(found[cut][:-1])


def test_stop_text_ends_a_row_and_is_left_out(endless: Generator) -> None:
    full = endless.texts(["add"], SamplingParams(max_tokens=30))[0]
    stop = full[5:8]
    generation = endless.generate(["add"], SamplingParams(max_tokens=30, stop=(stop,)))
    text = "".join(event.text for event in generation)
    assert text == full[: full.index(stop)]
    assert generation.completions[0].finish_reason == "stop"
    assert len(generation.completions[0].token_ids) < 30


def test_texts(generator: Generator) -> None:
    prompts = ["def add(", "漢字"]
    expected = [predict(generator.tokenizer.encode(prompt), 6) for prompt in prompts]
    assert generator.texts(prompts, SamplingParams(max_tokens=6)) == [generator.tokenizer.decode(ids) for ids in expected]


def test_prompt_of_bytes_is_text(generator: Generator) -> None:
    params = SamplingParams(max_tokens=5)
    assert generator.texts(["für".encode()], params) == generator.texts(["für"], params)


def test_generator_without_a_tokenizer(generator: Generator) -> None:
    bare = Generator(generator.session, None)
    assert bare.generate([[3, 4]], SamplingParams(max_tokens=5)).finish()[0].token_ids == predict([3, 4], 5)
    assert bare.texts([[3, 4]], SamplingParams(max_tokens=5)) == [""]
    with pytest.raises(RequestError, match="needs a tokenizer"):
        bare.generate(["text"])
    with pytest.raises(RequestError, match="stop texts need a tokenizer"):
        bare.generate([[3]], SamplingParams(stop=("x",)))


@pytest.mark.parametrize("length", [1, 30, 32])
def test_capacity_ends_a_row(endless: Generator, length: int) -> None:
    """25 tokens are rounded up to 4 blocks of 8; the token after the last place is still given, for it needs no place."""
    generation = endless.generate([prompt_of(length)], SamplingParams(max_tokens=99), capacity=25)
    completion = generation.finish()[0]
    assert completion.token_ids == predict(prompt_of(length), 99, eos=(), limit=32)
    assert (len(completion.token_ids), completion.finish_reason) == (33 - length, "length")


def test_max_positions_ends_a_row(endless: Generator) -> None:
    """The model's limit of 100 positions holds although its last block would have room for 4 more."""
    completion = endless.generate([prompt_of(90)], SamplingParams(max_tokens=500)).finish()[0]
    assert completion.token_ids == predict(prompt_of(90), 500, eos=())
    assert len(completion.token_ids) == MAX_POSITIONS - 90 + 1


def test_prompt_as_long_as_the_model_allows(endless: Generator) -> None:
    assert ids_of(endless, [prompt_of(100), [3]], SamplingParams(max_tokens=4)) == [
        predict(prompt_of(100), 4, eos=()),
        predict([3], 4, eos=()),
    ]


def test_cancel_during_decode_keeps_the_text(endless: Generator) -> None:
    cancel = threading.Event()
    generation = endless.generate(["add", "fox"], SamplingParams(max_tokens=50), cancel=cancel)
    events = []
    for event in generation:
        events.append(event)
        if len(generation.completions[0].token_ids) == 6:
            cancel.set()
    assert [event.finish_reason for event in events[-2:]] == ["cancelled"] * 2
    for prompt, completion in zip(["add", "fox"], generation.completions, strict=True):
        assert completion.token_ids == predict(endless.tokenizer.encode(prompt), 50, eos=())[: len(completion.token_ids)]
        assert completion.text == endless.tokenizer.decode(completion.token_ids) != ""


def test_cancel_during_prefill(generator: Generator) -> None:
    cancel = threading.Event()
    progress: list[tuple[int, int]] = []

    def on_progress(read: int, total: int) -> None:
        progress.append((read, total))
        cancel.set()

    generation = generator.generate([prompt_of(41)], prefill_chunk=10, on_progress=on_progress, cancel=cancel)
    assert list(generation) == [Event(0, None, "", "cancelled")]
    assert progress == [(10, 41)]


def test_progress_counts_prompt_tokens_of_all_rows(generator: Generator) -> None:
    progress: list[tuple[int, int]] = []
    options = {"prefill_chunk": 8, "on_progress": lambda *counts: progress.append(counts)}
    generator.generate([prompt_of(20), prompt_of(3)], SamplingParams(max_tokens=9), **options).finish()
    assert progress == [(11, 23), (19, 23), (23, 23)]


def test_stats(endless: Generator) -> None:
    generation = endless.generate([prompt_of(20), prompt_of(3)], SamplingParams(max_tokens=9), prefill_chunk=8)
    assert generation.stats.prefill_tokens_per_second is generation.stats.decode_tokens_per_second is None
    first = next(generation)
    first_token_seconds = generation.stats.first_token_seconds
    assert first.row == 1 and first_token_seconds is not None and first_token_seconds > 0
    generation.finish()
    stats = generation.stats
    # The short row got 3 of its tokens while the long one was read in 3 calls, and the long one its first.
    assert (stats.num_prompt_tokens, stats.num_new_tokens, stats.num_decode_tokens) == (23, 18, 14)
    assert stats.first_token_seconds == first_token_seconds <= stats.prefill_seconds + 60
    assert stats.decode_tokens_per_second == 14 / stats.decode_seconds
    assert stats.prefill_tokens_per_second == 23 / stats.prefill_seconds


def test_generation_may_be_left_and_taken_up(generator: Generator) -> None:
    generation = generator.generate([[3, 4], [5]], SamplingParams(max_tokens=6))
    begun = [next(generation) for _ in range(3)]
    assert len(begun) + len(list(generation)) == sum(len(completion.token_ids) for completion in generation.completions)
    assert [completion.token_ids for completion in generation.completions] == [predict([3, 4], 6), predict([5], 6)]


def test_generations_may_run_side_by_side(generator: Generator) -> None:
    one, other = (generator.generate([[first]], SamplingParams(max_tokens=6)) for first in (8, 9))
    found = [(a.token, b.token) for a, b in zip(one, other, strict=True)]
    assert found == list(zip(predict([8], 6), predict([9], 6), strict=True))


@pytest.mark.parametrize("prompt", ["", b"", []], ids=["text", "bytes", "ids"])
def test_empty_prompt(generator: Generator, prompt: str | bytes | list[int]) -> None:
    with pytest.raises(RequestError, match="prompt 1 is empty; give at least one character"):
        generator.generate([[3], prompt])


@pytest.mark.parametrize("prompts", [[], "text", b"text"], ids=["none", "text", "bytes"])
def test_prompts_must_be_a_list(generator: Generator, prompts: list[str]) -> None:
    with pytest.raises(RequestError, match="must be a list that holds at least one prompt"):
        generator.generate(prompts)


def test_prompt_longer_than_the_capacity(generator: Generator) -> None:
    with pytest.raises(
        ContextTooLong, match=r"prompt 1 has 17 tokens, but a row holds 16; .* raise the capacity \(at most 100\)"
    ):
        generator.generate([[3], prompt_of(17)], capacity=16)


def test_prompt_longer_than_the_model_allows(generator: Generator) -> None:
    with pytest.raises(ContextTooLong, match="prompt 0 has 101 tokens, but a row holds 100; shorten it$"):
        generator.generate([prompt_of(101)])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1.5, "3"])
def test_token_outside_the_vocabulary(generator: Generator, token: object) -> None:
    with pytest.raises(RequestError, match=f"prompt 0 holds the token {token!r}; this model's tokens are 0 to 292"):
        generator.generate([[3, token]])


def test_prompt_of_numpy_integers(generator: Generator) -> None:
    assert ids_of(generator, [np.array([3, 4])], SamplingParams(max_tokens=5)) == [predict([3, 4], 5)]


@pytest.mark.parametrize("prompt", [b"caf\xe9", "caf\udce9", "\ud83d"], ids=["bytes", "escaped", "surrogate"])
def test_prompt_that_is_not_utf8(generator: Generator, prompt: str | bytes) -> None:
    with pytest.raises(RequestError, match="prompt 0 is not UTF-8: byte"):
        generator.generate([prompt])


@pytest.mark.parametrize("capacity", [-1, 0, 105])
def test_capacity_out_of_range(generator: Generator, capacity: int) -> None:
    with pytest.raises(RequestError, match=f"capacity={capacity} must lie between 1 and this model's 100 positions"):
        generator.generate([[3]], capacity=capacity)


@pytest.mark.parametrize("chunk", [0, PREFILL_CHUNK + 1])
def test_prefill_chunk_out_of_range(generator: Generator, chunk: int) -> None:
    with pytest.raises(RequestError, match=f"prefill_chunk={chunk} must lie between 1 and this bundle's limit of 16"):
        generator.generate([[3]], prefill_chunk=chunk)


def test_settings_must_match_the_prompts(generator: Generator) -> None:
    with pytest.raises(RequestError, match="2 sampling settings were given for 1 prompts"):
        generator.generate([[3]], [SamplingParams()] * 2)
