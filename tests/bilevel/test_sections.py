"""Reading JSON objects: what is taken, and the sentence for what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from bilevel.errors import ConfigError
from bilevel.sections import Section

VALUES: dict[str, Any] = {
    "name": "a",
    "size": 3,
    "scale": 0.5,
    "flag": True,
    "nothing": None,
    "ids": [1, 2],
    "words": ["a"],
    "inner": {"size": 0, "each": [{"size": 1}, {"size": -1}]},
    "files": {"a.json": {"size": 2}, "b.json": 3},
    "huge": 10**400,
    "long": "x" * 999,
}


def fail(problem: str) -> ConfigError:
    return ConfigError(f"{problem}; write it anew")


@pytest.fixture
def section() -> Section:
    return Section(VALUES, "a.json", fail)


def test_values_of_every_kind(section: Section) -> None:
    assert (section.get("name", str), section.get("size", int), section.get("flag", bool)) == ("a", 3, True)
    assert (section.get("size", float), section.get("scale", float), section.get("nothing", str, NoneType)) == (3, 0.5, None)
    assert section.get("inner.size", int) == section.section("inner").number("size", 0) == 0
    assert section.number("size", 3) == 3 and section.numbers("ids") == (1, 2) and section.choice("name", ("a", "b")) == "a"
    assert section.get("absent", int, default=7) == section.get("inner.absent", int, default=7) == 7
    assert "inner" in section and "absent" not in section
    assert [each.get("size", int) for each in section.section("inner").listed("each")] == [1, -1]
    section.refuse_unknown(VALUES)


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda s: s.get("absent", int), "a.json does not give absent"),
        (lambda s: s.get("inner.absent", int), "a.json does not give inner.absent"),
        (lambda s: s.section("inner").get("absent", int), "a.json does not give inner.absent"),
        (lambda s: s.get("size.deeper", int), "a.json does not give size.deeper"),
        (lambda s: s.get("name", int), "a.json gives name='a', which must be a whole number"),
        (lambda s: s.get("flag", int), "a.json gives flag=True, which must be a whole number"),
        (lambda s: s.get("flag", float), "a.json gives flag=True, which must be a finite number"),
        (lambda s: s.get("size", bool), "a.json gives size=3, which must be true or false"),
        (lambda s: s.get("scale", int), "a.json gives scale=0.5, which must be a whole number"),
        (lambda s: s.get("size", str, NoneType), "a.json gives size=3, which must be a text or null"),
        (lambda s: s.get("name", int, default=7), "a.json gives name='a', which must be a whole number"),
        (lambda s: s.get("long", int), f"a.json gives long='{'x' * 76}..., which must be a whole number"),
        (lambda s: s.number("inner.size"), "a.json gives inner.size=0, which must be at least 1"),
        (lambda s: s.section("inner").listed("each")[1].number("size"), "a.json gives inner.each[1].size=-1, which must be"),
        (lambda s: s.numbers("words"), "a.json gives words=['a'], which must be a list of whole numbers"),
        (lambda s: s.choice("name", ("x", "y")), "a.json gives name='a', which must be one of x, y"),
        (lambda s: s.section("ids"), "a.json gives ids=[1, 2], which must be an object"),
        (lambda s: s.listed("ids"), "a.json holds ids[0]=1, which must be an object"),
        (lambda s: s.named("files"), "a.json holds files.b.json=3, which must be an object"),
        (lambda s: s.section("inner").refuse_unknown(["sizes", "each"]), "the unknown key inner.size (did you mean sizes?)"),
        (lambda s: s.refuse_unknown(["x", "y"]), "a.json gives the unknown key name (the keys are x, y)"),
    ],
)
def test_what_is_refused(section: Section, read: Callable[[Section], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(section)
    assert str(caught.value).startswith("a.json ") and message in str(caught.value)
    assert str(caught.value).endswith("; write it anew") and "\n" not in str(caught.value)


def test_a_number_beyond_every_float_is_refused(section: Section) -> None:
    with pytest.raises(ConfigError, match="must be a finite number"):
        section.get("huge", float)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "values.json is not valid JSON"),
        (b"{", "values.json is not valid JSON"),
        (b'{"a": "\xff"}', "values.json is not valid JSON"),
        (b"[" * 100_000, "values.json is not valid JSON"),
        (b"[1]", "values.json holds .1., which must be an object"),
        (b"null", "values.json holds None, which must be an object"),
    ],
    ids=["empty", "cut", "not-utf8", "too-deep", "list", "null"],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "values.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{message}.*; write it anew$"):
        Section.read(path, fail)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "values.json").write_text('{"name": "é"}', encoding="utf-8")
    assert Section.read(tmp_path / "values.json", fail).get("name", str) == "é"
    with pytest.raises(FileNotFoundError):
        Section.read(tmp_path / "absent.json", fail)
