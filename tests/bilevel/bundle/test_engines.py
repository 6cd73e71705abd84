"""An engine's manifest: what is written is read, and what is none is refused in one sentence with its remedy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.bundle.engines import Engine, read_engine
from bilevel.errors import EngineError

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    (tmp_path / "engines").mkdir()
    return Engine(
        name="fast",
        path=tmp_path / "engines" / "fast.plan",
        created_by={"bilevel": "0.1.0", "tensorrt": "10.3.0"},
        backend="tensorrt",
        version="10.3.0",
        platform="aarch64",
        architectures=(86, 89),
        precision="float16",
        capacity=512,
        batch=(1, 4),
        new_tokens=((1, 64), (1, 1)),
        plugins={"nodes": 17, "library": None},
        weight_streaming=True,
        graph_sha256="0" * 64,
        memory_bytes={"weights": 5, "activations": 3, "caches": 1},
        sha256="1" * 64,
        num_bytes=9,
    )


@pytest.mark.parametrize("changes", [{}, {"platform": None, "plugins": None, "weight_streaming": False, "architectures": ()}])
def test_what_is_written_is_read(engine: Engine, changes: dict[str, Any]) -> None:
    engine = dataclasses.replace(engine, **changes)
    path = engine.write()
    assert path == engine.path.with_name("fast.json") and read_engine(path) == engine
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(engine.as_dict()))


def test_the_manifest_has_the_documented_keys_in_their_order(engine: Engine) -> None:
    from bilevel.bundle import engines

    documented = [line.strip().split("   ")[0] for line in str(engines.__doc__).splitlines() if line.startswith("    ")]
    names = [name for line in documented for name in line.split(", ")]
    assert [name for name in names if name in engine.as_dict()] == list(engine.as_dict())


def test_every_key_is_missed_by_name(engine: Engine) -> None:
    content = engine.as_dict()
    keys = [*content, "plan.file", "plan.sha256", "plan.bytes", "memory_bytes.weights", "memory_bytes.caches"]
    for key in keys:
        outer, _, inner = key.partition(".")
        edited = json.loads(json.dumps(content))
        del (edited[outer] if inner else edited)[inner or outer]
        path = engine.write()
        path.write_text(json.dumps(edited))
        with pytest.raises(EngineError, match=rf"is no engine's manifest \(fast.json does not give {key}.*build it anew"):
            read_engine(path)


WRONG: dict[str, tuple[Edit, str]] = {
    "backend": (lambda m: m.update(backend="tvm"), "backend='tvm', which must be one of tensorrt, tensorrt-rtx"),
    "bool": (lambda m: m.update(capacity=True), "capacity=True, which must be a whole number"),
    "zero": (lambda m: m.update(capacity=0), "capacity=0, which must be at least 1"),
    "range": (lambda m: m.update(batch=[4, 1]), r"batch=\[4, 1\], which must be \[fewest, most\]"),
    "ranges": (lambda m: m.update(new_tokens=[[1, 1], 3]), r"new_tokens=3, which must be \[fewest, most\]"),
    "no-profile": (lambda m: m.update(new_tokens=[]), "it has no profile"),
    "architecture": (lambda m: m.update(architectures=["sm_89"]), "architectures=.'sm_89'., which must be a list of whole"),
    "memory": (lambda m: m["memory_bytes"].update(caches=-1), "memory_bytes.caches=-1, which must be at least 0"),
    "outside": (lambda m: m["plan"].update(file="../secret"), "its plan '../secret' lies outside its folder"),
    "version": (lambda m: m.update(format_version=2), "it is not of format bilevel-engine version 1"),
    "streaming": (lambda m: m.update(weight_streaming=1), "weight_streaming=1, which must be true or false"),
}


@pytest.mark.parametrize("edit, message", WRONG.values(), ids=WRONG)
def test_wrong_manifest(engine: Engine, edit: Edit, message: str) -> None:
    path = engine.write()
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(EngineError, match=message) as caught:
        read_engine(path)
    assert f"build it anew: bilevel build {path.parent.parent}" in str(caught.value) and "\n" not in str(caught.value)
