"""A text that follows a grammar fits it, whatever the model wants to say; and no stranger's grammar costs more than it may."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.bundle.confined import Limits
from bilevel.errors import BundleError, DeadEnd, MissingDependency, RequestError
from bilevel.runtime.generate.sampling import Sampler, SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar import sources, worker
from bilevel.runtime.grammar.compiler import MOST_CHARACTERS, Compiled, Compiler
from bilevel.runtime.grammar.narrow import narrowed
from tests.support import tokenizers_of_kinds as kinds

KINDS = (kinds.byte_level_bpe, kinds.byte_fallback_bpe, kinds.byte_fallback_bpe_without_prefix)
END = "<|im_end|>"


def compiler_of(make: Callable[[], Any], folder: Path) -> Compiler:
    kinds.saved(make(), folder)
    tokenizer = BundleTokenizer(folder / "tokenizer.json")
    names = {name: token for token, name in tokenizer.special.items()}
    vocab_size = 400  # more than the tokenizer has, as checkpoints do
    return Compiler(tokenizer, vocab_size, [names[END]])


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    opened = compiler_of(request.param, tmp_path_factory.mktemp("tokenizer"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    opened = compiler_of(kinds.byte_level_bpe, tmp_path_factory.mktemp("plain"))
    yield opened
    opened.close()


def write(compiler: Compiler, compiled: Compiled, seed: int, most: int = 3000) -> str | None:
    """What a model of random logits writes, None where it does not come to an end."""
    random, follower = np.random.default_rng(seed), compiled.follow()
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), compiler._vocab_size, constraint=follower)
    tokens: list[int] = []
    while len(tokens) < most and not sampler.is_complete:
        token = sampler.sample(random.normal(0, 3, compiler._vocab_size).astype(np.float32))
        if token in compiler._eos:
            break
        tokens.append(token)
    else:
        if not sampler.is_complete:
            return None
    return b"".join(map(compiler._tokenizer.bytes_of, tokens)).decode()


LEAVES = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("boolean", "null")]),
    st.integers(-1000, 1000).map(lambda least: {"type": "integer", "minimum": least, "maximum": least + 50}),
    st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(st.text(max_size=5) | st.integers(-9, 9), min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def _object(parts: list[tuple[str, Any, bool]]) -> dict[str, Any]:
    required = [name for name, _, is_required in parts if is_required]
    properties = {name: schema for name, schema, _ in parts}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(
            st.tuples(st.text(min_size=1, max_size=6), inner, st.booleans()), max_size=4, unique_by=lambda part: part[0]
        ).map(_object)
        | st.tuples(inner, st.integers(0, 2)).map(lambda pair: {"type": "array", "items": pair[0], "maxItems": pair[1]})
        | st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas})
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(schema=SCHEMAS, seed=st.integers(0, 2**31))
def test_json_fits_its_schema(compiler: Compiler, schema: dict[str, Any], seed: int) -> None:
    text = write(compiler, compiler.compile(sources.json_grammar(schema, "schema"), "schema"), seed)
    assert text is not None, "these schemas have no text without an end"
    jsonschema.validate(json.loads(text), schema)


PATTERNS = ["[b-d]{2,4}x?", "(the|then) fox(es)?", "ü+[0-9]", "(a|b)*c{1,3}", r"你好[^a]|\{\}", "x?y?z?", r"[ -~]{0,3}🦊"]


@settings(max_examples=15)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 2**31))
def test_the_tokens_that_may_come_are_allowed_and_no_others(compiler: Compiler, pattern: str, seed: int) -> None:
    """Against the module regex, which tells of any beginning whether it may go on.

    Where only one byte may follow, it is enough that one token is allowed.
    """
    random, follower, text = (
        np.random.default_rng(seed),
        compiler.compile(sources.regex_grammar(pattern, "p"), "p").follow(),
        b"",
    )
    for _ in range(4):
        allowed = follower.allowed()
        expected = np.array([_may_come(compiler, token, pattern, text) for token in range(compiler._vocab_size)])
        assert not (wrong := np.flatnonzero(allowed & ~expected)).size, (text, wrong)
        starts = {compiler._tokenizer.bytes_of(int(token))[:1] for token in np.flatnonzero(expected)}
        assert allowed.any() and (len(starts) == 1 or (allowed == expected).all()), (text, np.flatnonzero(allowed != expected))
        chosen = int(random.choice(np.flatnonzero(allowed)))
        if chosen in compiler._eos:
            return
        follower.accept(chosen)
        text += compiler._tokenizer.bytes_of(chosen)
        if follower.is_complete:
            assert regex.fullmatch(pattern, text.decode())
            return


def _may_come(compiler: Compiler, token: int, pattern: str, text: bytes) -> bool:
    if token in compiler._eos:
        return (
            regex.fullmatch(pattern, text.decode(errors="replace").replace("\ufffd", "a")) is not None
        )  # no pattern ends in a
    added = b"" if token in compiler._tokenizer.special else compiler._tokenizer.bytes_of(token)
    return bool(added) and _may_go_on(pattern, text + added)


def _may_go_on(pattern: str, data: bytes) -> bool:
    """Whether ``data``, which may end within a character, begins a match."""
    for cut in range(4):
        try:
            whole = data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
        if not cut:
            return regex.fullmatch(pattern, whole, partial=True) is not None
        return any(
            regex.fullmatch(pattern, whole + last, partial=True) for last in _beginning(data[len(data) - cut :], pattern)
        )
    return False


@functools.cache
def _beginning(data: bytes, pattern: str) -> set[str]:
    """Characters whose bytes begin with ``data``: those of the pattern, and some others where there are any."""
    found = {character for character in pattern if character.encode().startswith(data)}
    for tail in itertools.product((0x80, 0x90, 0xA0, 0xBF), repeat=3):
        for size in range(1, 4):
            with contextlib.suppress(UnicodeDecodeError):
                decoded = (data + bytes(tail[:size])).decode()
                found |= {decoded} if len(decoded) == 1 else set()
    return found


def test_objects_hold_what_the_schema_names(plain: Compiler) -> None:
    schema: dict[str, Any] = {"properties": {"properties": {"enum": [1]}, "b": {"$ref": "#/$defs/b"}}, "required": ["b"]}
    schema |= {"type": "object", "$defs": {"b": {"type": "object", "properties": {"c": {"type": "null"}}}}}
    compiled = plain.compile(sources.json_grammar(schema, "s"), "s")
    for seed in range(20):
        found = json.loads(write(plain, compiled, seed) or "")
        jsonschema.validate(found, schema)
        assert set(found) <= {"properties", "b"} and set(found["b"]) <= {"c"}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}},
        {"anyOf": [{"required": ["b"]}], "properties": {"a": {}}},
        {"enum": [{"properties": {}}], "default": {"properties": {}}},
        {"type": "object"},
        {"properties": 5},
        {"properties": {"a": {}}, "required": ["a", "b"]},
        {"properties": {"a": {}}, "required": "a"},
        {"properties": {"a": {}}, "required": [["a"]]},
    ],
)
def test_schemas_that_say_more_are_left_alone(schema: dict[str, Any]) -> None:
    assert narrowed(schema) == schema


def test_choices_and_grammars(plain: Compiler) -> None:
    choice = plain.compile(sources.choice_grammar(["yes", "no", 'ma"y\nbe'], "c"), "c")
    assert {write(plain, choice, seed) for seed in range(40)} == {"yes", "no", 'ma"y\nbe'}
    for grammar in ('start: "a" ("b" | "c")+', 'root ::= "a" [bc] [bc]*'):
        compiled = plain.compile(sources.free_grammar(grammar, "g"), "g")
        assert all(regex.fullmatch("a[bc]+", write(plain, compiled, seed) or "ab") for seed in range(10))


def test_rows_that_share_a_grammar_go_their_own_ways(plain: Compiler) -> None:
    compiled = plain.compile(sources.choice_grammar(["ab", "ac"], "c"), "c")
    assert plain.compile(sources.choice_grammar(["ab", "ac"], "c"), "c") is compiled
    first, second = compiled.follow(), compiled.follow()
    ids = {text: plain._tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b")}
    first.accept(ids["a"][0])
    assert first.allowed()[ids["b"][0]] and not second.allowed()[ids["b"][0]] and second.allowed()[ids["a"][0]]


def test_a_dead_end(plain: Compiler) -> None:
    follower = plain.compile(sources.choice_grammar(["ab"], "c"), "c").follow()
    follower.accept(plain._tokenizer.encode("b", add_special_tokens=False)[0])  # which was not allowed
    with pytest.raises(DeadEnd, match="allows no token"):
        follower.allowed()
    assert not follower.is_complete


def test_logits_that_are_not_finite_are_an_error_still(plain: Compiler) -> None:
    follower = plain.compile(sources.choice_grammar(["ab"], "c"), "c").follow()
    sampler = Sampler(SamplingParams(), plain._vocab_size, constraint=follower)
    with pytest.raises(BundleError, match="not finite"):
        sampler.sample(np.full(plain._vocab_size, np.nan, np.float32))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sources.json_grammar(nested(5000), "s"), "s is nested more than 64 deep"),
        (lambda: sources.json_grammar({"enum": ["x" * 70_000]}, "s"), "characters long, this server takes 65536"),
        (lambda: sources.regex_grammar("a" * 70_000, "s"), "characters long"),
        (lambda: sources.choice_grammar(["a" * 70_000], "s"), "characters long"),
        (lambda: sources.free_grammar("a" * 70_000, "s"), "characters long"),
        (lambda: "a" * (MOST_CHARACTERS + 1), f"makes a grammar of {MOST_CHARACTERS + 1} characters"),
        (lambda: sources.json_grammar({"type": "text"}, "s"), "s cannot be followed: .*Invalid type: text"),
        (lambda: sources.json_grammar({"type": "array", "uniqueItems": True}, "s"), "Unimplemented keys"),
        (lambda: sources.json_grammar({"$ref": "#"}, "s"), "s (cannot be followed|allows no text)"),
        (lambda: sources.json_grammar({"enum": []}, "s"), "s (cannot be followed|allows no text)"),
        (lambda: sources.regex_grammar("(", "s"), "s cannot be followed: .*regex"),
        (lambda: sources.regex_grammar(r"(?=a)b", "s"), "s cannot be followed"),
        (lambda: sources.free_grammar("start: %%%", "s"), "s cannot be followed"),
        (lambda: sources.free_grammar("start: " + "(" * 5000 + '"a"' + ")" * 5000, "s"), "s cannot be followed"),
        (lambda: sources.free_grammar('start: "a" missing', "s"), "s cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(plain: Compiler, make: Callable[[], str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plain.compile(make(), "s")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_keywords_are_ignored_only_where_it_was_said(plain: Compiler) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 2}
    rule = sources.json_rule(schema, "s", is_lenient=True)
    assert isinstance(json.loads(write(plain, plain.compile(f"start: {rule}", "s"), 0) or ""), list)
    theirs = {**schema, "x-guidance": {"lenient": True}}
    with pytest.raises(RequestError, match="Unimplemented keys"):
        plain.compile(sources.json_grammar(theirs, "s"), "s")


def test_a_grammar_that_compiles_for_hours_is_given_up(plain: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intersection of 29 short patterns; the next grammar is none the worse for it."""
    schema = {"allOf": [{"type": "string", "pattern": f"[ab]*a[ab]{{{size}}}"} for size in range(1, 30)]}
    monkeypatch.setattr(plain, "_worker", worker.Worker(plain._worker._special, Limits(wall_seconds=0.5)))
    message = r"s took longer than 0\.5 s and was stopped while it was compiled; simplify it"
    with closing(plain._worker), pytest.raises(RequestError, match=message):
        plain.compile(sources.json_grammar(schema, "s"), "s")
    monkeypatch.undo()
    assert write(plain, plain.compile(sources.choice_grammar(["still"], "s"), "s"), 0) == "still"


def test_tokenizers_whose_tokens_have_no_bytes_of_their_own(tmp_path: Path) -> None:
    compiler = compiler_of(kinds.end_of_word_bpe, tmp_path)
    with pytest.raises(RequestError, match="this model's tokenizer joins tokens in a way of its own"):
        compiler.compile('start: "a"', "s")
    without_end = Compiler(compiler._tokenizer, 400, [])
    with pytest.raises(RequestError, match="this model's tokenizer has no end token"):
        without_end.compile('start: "a"', "s")


def test_without_llguidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(worker.Worker, "check", lambda *_: None)
    with pytest.raises(MissingDependency, match=r"llguidance is not installed: pip install 'bilevel\[serve\]'"):
        compiler_of(kinds.byte_level_bpe, tmp_path).compile('start: "a"', "s")
