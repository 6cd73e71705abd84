"""Misuse of the Python interface and of the command line: a sentence of this package's, and exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.runtime.cli.main import COMMANDS, main
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from tests.doubles.bundle import write_bundle
from tests.fuzz.oracles import bounded, cases, outcome
from tests.fuzz.values import odd_numbers, odd_texts

odd: st.SearchStrategy[Any] = st.none() | odd_numbers | odd_texts | st.just([]) | st.just(b"\xff") | st.just(object())
FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_tokens", "stop")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator.open(write_bundle(tmp_path_factory.mktemp("bundle")), "onnx", threads=1)


@cases(60)
@given(name=st.sampled_from(FIELDS), value=odd)
def test_sampling_params(name: str, value: Any) -> None:
    outcome(lambda: SamplingParams(**{name: value}))


prompts = st.lists(
    odd_texts
    | st.binary(max_size=8)
    | st.lists(odd_numbers | st.integers(-2, 300), max_size=5)
    | st.just([5] * 500)
    | st.none(),
    max_size=3,
)


@cases(60)
@given(prompts=prompts | odd, capacity=st.none() | odd, chunk=st.none() | odd)
def test_generate(generator: Generator, prompts: Any, capacity: Any, chunk: Any) -> None:
    params = SamplingParams(max_tokens=2)
    outcome(lambda: generator.generate(prompts, params, capacity=capacity, prefill_chunk=chunk).finish())


@cases(30)
@given(backend=odd, threads=odd)
def test_open(generator: Generator, backend: Any, threads: Any) -> None:
    outcome(lambda: Generator.open(generator.session.bundle.folder, backend, threads=threads))


numbers = st.sampled_from(["0", "-1", "1", "100000", "9" * 30, "1e400", "nan", "inf", "x", "", "1_0", "\u0663"])
options = st.sampled_from(
    ["--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--capacity", "--prefill-chunk", "--threads", "--stop"]
)


@cases(40)
@given(pairs=st.lists(st.tuples(options, numbers), max_size=2), prompt=odd_texts)
def test_run(generator: Generator, pairs: list[tuple[str, str]], prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{name}={value}" for name, value in pairs]
    folder = str(generator.session.bundle.folder)
    with bounded():
        try:
            status = main(["run", folder, "--backend", "onnx", "--max-tokens", "2", *arguments, "--", prompt])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
    told = capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in told
    assert status == 0 or told


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("place", ["nothing", "file", "fifo", "empty", "checkpoint", "device"])
def test_every_command_on_what_it_was_not_made_for(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and status 2; a FIFO is not waited for."""
    target = make_place(tmp_path, place)
    extra = {
        "run": ["text"],
        "export": [str(tmp_path / "out")],
        "import": [str(tmp_path / "out")],
        "route": [str(tmp_path / "out")],
        "check": ["--against", str(target)],
        "bench": ["--lengths", "16"],
        "quality": ["--quick"],
    }
    leading = ["build", "--arch", "87", "--geometry"] if command == "kernels" else []
    if command == "doctor" and place == "device":
        pytest.skip("a device is no folder, which the other commands show")
    with bounded():
        try:
            status = main([command, *leading, str(target), *extra.get(command, [])])
        except SystemExit as end:
            status = int(end.code or 0)
    told = capsys.readouterr().err
    assert status == 2 and "Traceback" not in told and told.strip()


def make_place(folder: Path, kind: str) -> Path:
    import os

    path = folder / "target"
    if kind == "file":
        path.write_bytes(b"\x7fELF")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        return Path("/dev/zero")
    elif kind != "nothing":
        path.mkdir()
        if kind == "checkpoint":
            (path / "config.json").write_text("{}", encoding="utf-8")
    return path
