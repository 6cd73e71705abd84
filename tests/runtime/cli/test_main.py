"""The command line: the dispatcher, ``bilevel run``, and what must work where nothing is installed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bilevel
from bilevel.errors import BundleError
from bilevel.runtime.cli import main as cli
from bilevel.runtime.generate.rows import Row
from tests import ROOT
from tests.doubles.bundle import make_tokenizer, predict, write_bundle

# Python finds no module of these names, as on a board where they are not installed.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = {"torch", "onnx", "onnxscript", "onnxruntime", "tokenizers", "safetensors", "rich"}
BLOCKED |= {"tensorrt", "triton", "polygraphy"}
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_bundle(tmp_path_factory.mktemp("bundle"), eos=()))


def expected_text(prompt: str, max_tokens: int) -> str:
    tokenizer = make_tokenizer()
    return str(tokenizer.decode(predict(tokenizer.encode(prompt).ids, max_tokens, eos=())))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=False, capture_output=True, cwd=ROOT, encoding="utf-8")


def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python(f"{BLOCK}\nfrom bilevel.runtime.cli.main import main\nsys.exit(main())", *arguments)


def test_runtime_imports_where_nothing_is_installed() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "runtime").rglob("*.py")]
    modules = [".".join(["bilevel", *path.parts]).removesuffix(".__init__") for path in paths]
    assert "bilevel.runtime.generate.generator" in modules and "bilevel.runtime.cli.main" in modules
    done = python(f"{BLOCK}\nimport bilevel.runtime, {', '.join(modules)}")
    assert (done.returncode, done.stderr) == (0, "")


def test_help_where_nothing_is_installed() -> None:
    done = run_bare("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("bilevel export my-checkpoint my-bundle", "bilevel check my-bundle", "bilevel run my-bundle", *cli.COMMANDS):
        assert line in done.stdout


def test_inspect_where_only_numpy_is_installed(bundle: str) -> None:
    done = run_bare("inspect", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "two_level" in done.stdout


def test_run_without_onnxruntime_names_the_remedy(bundle: str) -> None:
    done = run_bare("run", bundle, "add")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bilevel: error: onnxruntime is not installed: pip install 'bilevel[cpu]'\n"


def test_options_are_judged_before_anything_is_imported(bundle: str) -> None:
    done = run_bare("run", bundle, "add", "--top-p", "2")
    assert done.stderr == "bilevel: error: top_p=2.0 must be greater than 0 and at most 1\n"


def test_dispatcher_imports_only_the_command(bundle: str) -> None:
    code = "import sys\nfrom bilevel.runtime.cli.main import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    loaded = python(code, "inspect", bundle).stderr.split()
    assert "bilevel.runtime.cli.inspect" in loaded
    assert not {"bilevel.runtime.cli.run", "bilevel.export", "torch", "onnx", "onnxruntime", "tokenizers", "rich"} & set(loaded)


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bilevel.runtime.cli.main", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"bilevel {bilevel.__version__}\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "from a checkpoint to text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, hint",
    [("exprot", "did you mean export?"), ("inspct", "did you mean inspect?"), ("xyz", "the commands are export")],
)
def test_unknown_command(capsys: pytest.CaptureFixture[str], command: str, hint: str) -> None:
    assert cli.main([command]) == 2
    assert f"there is no command '{command}'; {hint}" in capsys.readouterr().err


def install(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A command ``fail`` that raises ``error``."""

    def fail(args: object) -> int:
        raise error

    module = ModuleType("fail_command")
    module.__dict__.update(configure=lambda parser: None, main=fail)
    monkeypatch.setitem(sys.modules, "fail_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("fail_command", "fail"))


@pytest.mark.parametrize(
    "error, status, message",
    [
        (BundleError("it is broken; mend it"), 2, "bilevel: error: it is broken; mend it\n"),
        (PermissionError(13, "Permission denied", "model.onnx"), 2, "bilevel: error: model.onnx: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "bilevel: error: No space left on device\n"),
        (MemoryError(), 2, "bilevel: error: out of memory; lower the capacity or the number of prompts\n"),
        (KeyboardInterrupt(), 130, "bilevel: interrupted\n"),
        (
            ModuleNotFoundError("no", name="safetensors_absent.torch"),
            2,
            "bilevel: error: bilevel fail: safetensors_absent is not installed: pip install 'bilevel[dev]'\n",
        ),
        (
            ModuleNotFoundError("no", name="bilevel.export.cli_gone"),
            2,
            "bilevel: error: bilevel fail: this installation lacks bilevel.export.cli_gone; reinstall bilevel\n",
        ),
    ],
    ids=["bilevel", "permission", "disk-full", "memory", "interrupt", "package", "module"],
)
def test_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    install(monkeypatch, error)
    assert cli.main(["fail"]) == status
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_stack_trace(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    install(monkeypatch, BundleError("it is broken"))
    with pytest.raises(BundleError):
        cli.main(arguments)


def test_broken_package_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy is installed; a part of it that is not there is numpy's own trouble."""
    install(monkeypatch, ModuleNotFoundError("no", name="numpy.absent"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fail"])


def test_reader_that_leaves_is_no_error(bundle: str) -> None:
    """As in ``bilevel run ... | head -c 1``."""
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "inspect", bundle]
    code = f"import subprocess as s; p = s.Popen({command!r}, stdout=s.PIPE); p.stdout.close(); print(p.wait())"
    done = python(code)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_run_streams_the_text(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", bundle, "--max-tokens", "12", "add 漢字"]) == 0
    out, err = capsys.readouterr()
    assert out == expected_text("add 漢字", 12) + "\n"
    assert "12 new" in err and "tokens/s" in err and "first after" in err and err.count("\n") == 1


def test_run_takes_several_prompts_as_a_batch(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", bundle, "add", "--max-tokens", "5", "the fox"]) == 0
    first, second = expected_text("add", 5), expected_text("the fox", 5)
    assert capsys.readouterr().out == f"--- prompt 0 (length) ---\n{first}\n--- prompt 1 (length) ---\n{second}\n"


def test_run_json(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--temperature", "0.7", "--top-k", "9", "--stop", "zzzz", "--max-tokens", "7", "--prefill-chunk", "3"]
    assert cli.main(["run", bundle, *options, "add", "fox"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert [each["prompt"] for each in result["completions"]] == ["add", "fox"]
    assert all(len(each["token_ids"]) == 7 and each["finish_reason"] == "length" for each in result["completions"])
    assert (result["sampling"]["top_k"], result["sampling"]["stop"]) == (9, ["zzzz"])
    assert result["timings"]["num_new_tokens"] == 14 and result["timings"]["first_token_seconds"] > 0
    # The seed that was drawn is reported, so the same texts can be had again.
    assert cli.main(["run", bundle, *options, "--seed", str(result["sampling"]["seed"]), "add", "fox"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"] == result["completions"]


def test_run_reads_a_prompt_file(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("für 漢字\n", encoding="utf-8")
    assert cli.main(["run", bundle, "--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == expected_text("für 漢字\n", 6) + "\n"


def test_run_reads_stdin(bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("añb".encode())))
    assert cli.main(["run", bundle, "--prompt-file", "-", "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == expected_text("añb", 6) + "\n"


def test_run_on_a_terminal_without_unicode(bundle: str) -> None:
    """What the terminal cannot show becomes a question mark; the run does not break."""
    code = "import sys; sys.stdout.reconfigure(encoding='ascii')\nfrom bilevel.runtime.cli.main import main\nsys.exit(main())"
    done = python(code, "run", bundle, "add 漢字", "--max-tokens", "12")
    text = expected_text("add 漢字", 12).replace("\r", "\n")  # as reading a pipe of text does
    assert not text.isascii()
    assert (done.returncode, done.stdout) == (0, text.encode("ascii", "replace").decode() + "\n")


def test_run_shows_the_progress_of_long_prompts(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["run", bundle, "!" * 40, "--max-tokens", "2"]) == 0
    err = capsys.readouterr().err
    assert "\rreading the prompt: 16 of 40 tokens" in err and "\rreading the prompt: 32 of 40 tokens\r" in err


def test_interrupt_keeps_the_text_so_far(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the fifth token is chosen."""
    extend, before = Row.extend, signal.getsignal(signal.SIGINT)

    def interrupted(row: Row, logits: object) -> int:
        if len(row.generated_ids) == 4:
            signal.raise_signal(signal.SIGINT)
        return extend(row, logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Row, "extend", interrupted)
    assert cli.main(["run", bundle, "add", "--max-tokens", "50"]) == 130
    out, err = capsys.readouterr()
    assert out == expected_text("add", 5) + "\n"
    assert "5 new" in err and "cancelled" in err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is no prompt; give one, for example"),
        ([""], "prompt 0 is empty"),
        (["a", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["a", "--stop", ""], "none of them empty"),
        (["a", "--threads", "-2"], "--threads -2 must be at least 0"),
        (["a", "--capacity", "0"], "--capacity 0 must be at least 1"),
        (["a", "--capacity", "4096"], "capacity=4096 must lie between 1 and this model's 100 positions"),
        (["!" * 17, "--capacity", "9"], "prompt 0 has 17 tokens, but a row holds 16"),
        (["a", "--prefill-chunk", "17"], "prefill_chunk=17 must lie between 1 and this bundle's limit of 16"),
        (["a", "--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["caf\udce9"], "prompt 0 is not UTF-8: byte 3 is 0xe9"),
    ],
    ids=lambda value: "_".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_run_refuses(bundle: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["run", bundle, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bilevel: error: ") and message in err and err.count("\n") == 1


def test_run_refuses_a_file_that_is_not_utf8(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("für".encode("latin-1"))
    assert cli.main(["run", bundle, "--prompt-file", str(path)]) == 2
    assert f"{path} is not UTF-8: byte 1 is 0xfc" in capsys.readouterr().err


def test_run_refuses_a_damaged_bundle_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_bundle(tmp_path)
    (folder / "config.json").write_text("{}")
    assert cli.main(["run", str(folder), "add", "--max-tokens", "2"]) == 2
    assert "config.json holds 2 bytes instead of" in capsys.readouterr().err
    assert cli.main(["run", str(folder), "add", "--max-tokens", "2", "--no-verify"]) == 0


@pytest.mark.parametrize("arguments", [["bundle", "--max-tokens", "many"], ["bundle", "--no-such-option"]])
def test_run_argument_errors_show_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", *arguments])
    assert caught.value.code == 2
    assert "usage: bilevel run" in capsys.readouterr().err
