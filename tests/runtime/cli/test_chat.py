"""``bilevel chat`` and ``bilevel run --chat``: turns that read only what is new, commands, and what ends an answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.cli import main as cli
from bilevel.runtime.cli.conversation import ChatEncoder, Conversation, read_option
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.schedule.jobs import SchedulerLimits
from tests.doubles.bundle import edit_manifest, make_tokenizer, predict, write_bundle
from tests.runtime.serve.test_openai import write_chat_bundle

Captured = pytest.CaptureFixture[str]
TEMPLATE = "{{ style }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_chat_bundle(tmp_path_factory.mktemp("bundle"), TEMPLATE)
    edit_manifest(folder, lambda manifest: manifest["limits"].update(max_positions=400))
    return folder


def answer(prompt: str, max_tokens: int = 8) -> str:
    tokenizer = make_tokenizer()
    return str(tokenizer.decode(predict(tokenizer.encode(prompt).ids, max_tokens, limit=400)))


def chat(monkeypatch: pytest.MonkeyPatch, bundle: Path, lines: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return cli.main(["chat", str(bundle), "--max-tokens", "8", "--threads", "1", *options])


def test_turns_follow_each_other(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(monkeypatch, bundle, "hello\n\nand\\\nthen\n/reset\nhello\n", "--system", "be brief") == 0
    first = answer("<s>be brief<u>hello<a>")
    second = answer(f"<s>be brief<u>hello<a>{first}<u>and\nthen<a>")
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_commands(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "chat.json"
    lines = f'/system x\nhi\n/retry\n/option style="!"\n/save {saved}\n/system\n/load {saved}\nmore\n/exit\nnever\n'
    assert chat(monkeypatch, bundle, lines) == 0
    first = answer("<s>x<u>hi<a>")
    assert capsys.readouterr().out == f"{first}\n{first}\n{answer(f'!<s>x<u>hi<a>{first}<u>more<a>')}\n"
    messages = json.loads(saved.read_text())["messages"]
    assert messages == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first},
    ]
    assert chat(monkeypatch, bundle, "/retry\n", "--load", str(saved)) == 0
    assert capsys.readouterr().out == f"{first}\n"
    assert chat(monkeypatch, bundle, "/retry\n", "--load", str(saved), "--system", "y") == 0
    assert capsys.readouterr().out == f"{answer('<s>y<u>hi<a>')}\n"


def test_bytes_that_are_not_text(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(["chat", str(bundle), "--max-tokens", "8", "--threads", "1"]) == 2
    assert "stdin is not UTF-8; convert it" in capsys.readouterr().err


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *keys: str | type[BaseException]) -> list[str]:
    """Somebody types these lines, or presses what raises these; the prompts that ``input`` is given."""
    prompts, left = [], iter(keys)

    def read(prompt: str = "") -> str:
        prompts.append(prompt)
        key = next(left)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Screen())
    return prompts


def test_an_interrupt_at_the_prompt_drops_the_line_only(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    prompts = typed(monkeypatch, "hello", KeyboardInterrupt, "never\\", KeyboardInterrupt, "again", EOFError)
    assert cli.main(["chat", str(bundle), "--max-tokens", "8", "--threads", "1"]) == 0
    first, shown = answer("<u>hello<a>"), capsys.readouterr()
    assert shown.out == f"{first}\n{answer(f'<u>hello<a>{first}<u>again<a>')}\n"
    assert set(prompts) == {""} and shown.err.count("> ") == 5  # a file gets the answers, and no prompt


def test_a_terminal_shows_and_does_not_obey(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (wrong := tmp_path / "\x1b[2J").write_text("{")
    prompts = typed(monkeypatch, "hello", f"/load {wrong}", "/exit")
    monkeypatch.setattr("sys.stdout", screen := Screen())
    monkeypatch.setattr(Conversation, "ask", lambda *_: iter(["\x1b]0;x\x07", "é"]))
    assert cli.main(["chat", str(bundle), "--threads", "1"]) == 0
    assert screen.getvalue() == "\\x1b]0;x\\x07é\n" and prompts == ["> "] * 3
    told = capsys.readouterr().err
    assert "\\x1b[2J" in told and "\x1b" not in told


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("/retry\n", [], "there is no message to answer again"),
        ("/dance\n", [], "'/dance' is no command with what it needs; /help lists them"),
        ("/save\n", [], "'/save' is no command"),
        ("/option style\n", [], "template option 'style' must be NAME=VALUE"),
        ("", ["--template-option", "1=2"], "template option '1=2' must be NAME=VALUE"),
        ("/load /dev/null\n", [], "/dev/null"),
        ("hi\n", ["--template", "other"], "chat_template='other' is none of this model's: 'default'"),
        ("a" * 1000 + "\n", [], "but this server holds 400"),
        ("", ["--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        ("", ["--capacity", "0"], "--capacity 0 must be at least 1"),
        ("", ["--capacity", "-5"], "--capacity -5 must be at least 1"),
        ("", ["--capacity", "401"], "--capacity 401 must be at most this model's 400 positions"),
        ("caf\udce9\n", [], "stdin is not UTF-8"),
    ],
)
def test_refusals(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    options: list[str],
    message: str,
) -> None:
    assert chat(monkeypatch, bundle, lines, *options) == 2
    assert message in capsys.readouterr().err


def test_files_that_hold_no_messages(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("{", "[1]", '[{"role": "user"}]', '{"messages": 5}', '[{"role": "user", "content": null}]'):
        (tmp_path / "wrong.json").write_text(content)
        assert chat(monkeypatch, bundle, "", "--load", str(tmp_path / "wrong.json")) == 2
        assert "give a file that /save wrote" in capsys.readouterr().err


def test_a_model_without_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, write_bundle(tmp_path), "hi\n") == 2
    assert "this model has no chat template; use bilevel run" in capsys.readouterr().err


def test_run_chat(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "8", "--threads", "1"]
    assert cli.main(["run", str(bundle), "hi", "--chat", "--system", "x", "--template-option", "style=!", *options]) == 0
    assert capsys.readouterr().out == answer("!<s>x<u>hi<a>") + "\n"
    assert cli.main(["run", str(bundle), "hi", "--system", "x", *options]) == 2
    assert "give --chat too" in capsys.readouterr().err


def test_options_are_json_or_text() -> None:
    assert read_option("a=false") == ("a", False)
    assert read_option("a=b=c") == ("a", "b=c")
    assert read_option('a={"b": 1}') == ("a", {"b": 1})


@pytest.fixture
def talk(bundle: Path) -> Iterator[Any]:
    session = OnnxSession.open(bundle, threads=1)
    encoder = ChatEncoder(session.bundle, 400, None, {})
    params = SamplingParams(max_tokens=8)

    def start(**changes: Any) -> Conversation:
        tokenizer = BundleTokenizer(session.bundle.tokenizer_path)
        settings = SamplingParams(**{"max_tokens": params.max_tokens, **changes})
        return Conversation(session, tokenizer, encoder, SchedulerLimits(max_rows=1, row_tokens=400), settings)

    yield start
    encoder.close()


def test_a_turn_reads_only_what_is_new(talk: Any) -> None:
    conversation = talk()
    "".join(conversation.ask("hello"))
    first = len(conversation.job.prompt)
    "".join(conversation.ask("again"))
    assert conversation.job.num_reused >= first - 1


def test_a_question_asked_again_is_answered_anew(talk: Any) -> None:
    def answers() -> list[str]:
        conversation, given = talk(temperature=5.0, seed=1), []
        for _ in range(4):
            given.append("".join(conversation.ask("hello")))
            conversation.messages.clear()
        return given

    first = answers()
    assert len(set(first)) > 1 and answers() == first


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_came(talk: Any) -> None:
    conversation = talk(max_tokens=50)
    pieces = conversation.ask("hello")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1]["role"] == "assistant" and conversation.messages[-1]["content"].startswith(begun)
    assert conversation.finish_reason == "cancelled"
    assert "".join(conversation.ask("on")) and conversation._scheduler.num_active == 0


def test_stop_texts_and_questions_that_cannot_be_answered(talk: Any) -> None:
    whole = answer("<u>hello<a>", 30)
    conversation = talk(max_tokens=30, stop=(whole[5:8],))
    assert "".join(conversation.ask("hello")) == whole[: whole.index(whole[5:8])] and conversation.finish_reason == "stop"
    kept = list(conversation.messages)
    with pytest.raises(RequestError, match="400"):
        "".join(conversation.ask("a" * 1000))
    assert conversation.messages == kept
    assert conversation._scheduler.num_active == 0
