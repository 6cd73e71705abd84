"""``bilevel deploy``: what it prints and returns, that it needs no PyTorch, and the folder's own script on this machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.bundle.manifest import MANIFEST
from bilevel.runtime.cli.main import main
from tests import ROOT
from tests.doubles.bundle import write_bundle
from tests.support.http_server import free_port
from tests.test_imports import HEAVY

HERE = f"linux-{platform.machine()}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder for this machine, written where none of the heavy packages can be imported, and what was printed."""
    path = tmp_path_factory.mktemp("deploy")
    (path / "bundle").mkdir()
    bundle = write_bundle(path / "bundle")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); from bilevel.runtime.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "deploy", str(bundle), str(path / "board"), "--target", HERE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return path / "board", run.stdout


def test_it_needs_none_of_the_heavy_packages_and_says_what_is_next(written: tuple[Path, str]) -> None:
    folder, text = written
    files = json.loads((folder / "deploy.json").read_text(encoding="utf-8"))["files"]
    assert f"{len(files) + 1} files" in text and "it starts on the CPU at least" in text
    assert "nothing is missing" in text and f"rsync -a {folder} DEVICE:" in text


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}
    command = [str(folder / "run.sh"), *arguments]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)


def test_the_script_explains_itself(written: tuple[Path, str]) -> None:
    result = run_script(written[0], "--help")
    assert result.returncode == 0 and "./run.sh serve --port 9000" in result.stdout


def test_the_script_refuses_a_file_that_changed_on_its_way(written: tuple[Path, str]) -> None:
    readme = written[0] / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text[:-2] + "!\n", encoding="utf-8")
    try:
        result = run_script(written[0], "install", PYTHON=sys.executable)
    finally:
        readme.write_text(text, encoding="utf-8")
    assert result.returncode == 2 and not (written[0] / ".venv").exists()
    assert result.stderr == "README.md differs from its SHA-256 in deploy.json\nrun.sh: error: copy the folder anew\n"


def test_the_script_names_the_python_that_it_needs(written: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    result = run_script(written[0], "install", PATH=str(tmp_path))
    assert result.returncode == 2
    assert "this folder was written for Python" in result.stderr and "\n" not in result.stderr.strip()


def test_a_bundle_that_cannot_start_gives_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    bundle = write_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "precision": "bfloat16"}), encoding="utf-8")
    assert main(["deploy", str(bundle), str(tmp_path / "board"), "--target", HERE, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["starts_on_cpu"] is False and printed["missing"][0]["remedy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nano"], "--target 'nano' is not known; take one of orin-jp62, thor-jp7"),
        (["--target", HERE], "is not a bundle (it has no bundle.json)"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", str(tmp_path / "nothing"), str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bilevel: error: ") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_the_folder_really_starts_here_without_a_network(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """In an environment of its own, from its wheels alone: text on the terminal, and over HTTP."""
    folder = tmp_path / "board"
    assert main(["deploy", str(exported("two_level")[1]), str(folder), "--target", HERE, "--with-wheels"]) == 0
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    installed = run_script(folder, "install", **offline)
    assert installed.returncode == 0, installed.stderr
    assert "runs      model.onnx in ONNX Runtime on the CPU" in installed.stdout
    check = subprocess.run([folder / ".venv/bin/python", "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout  # the pins fit each other
    text = run_script(folder, "run", "def add(a, b):", "--max-tokens", "4", "--json", **offline)
    assert text.returncode == 0 and json.loads(text.stdout)["completions"][0]["text"]
    library = folder / ".venv/lib" / f"python3.{sys.version_info.minor}" / "site-packages/bilevel/plugins/_cpu.abi3.so"
    assert library.is_file()
    port = free_port()
    process = subprocess.Popen([folder / "run.sh", "serve", "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None and "serving board at" in process.stderr.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as response:
            assert json.load(response)["data"][0]["id"] == "board"
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
