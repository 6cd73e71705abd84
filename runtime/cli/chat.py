"""``bilevel chat``: a conversation in the terminal. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError, RequestError, harmless
from bilevel.folders import read_json
from bilevel.runtime.backend.select import add_backend_options, open_session
from bilevel.runtime.cli.conversation import ChatEncoder, Conversation, add_template_options, read_option
from bilevel.runtime.cli.sampling import add_sampling_options, add_speculation_option, read_sampling
from bilevel.runtime.generate.text import BundleTokenizer

EPILOG = """\
Each line is a message; one that ends in a backslash goes on in the next line.
Ctrl-C ends an answer or drops what is being typed, Ctrl-D ends the chat.
Lines that begin with a slash are commands:
  /reset              forget the conversation
  /system TEXT        set the system message, and forget the conversation (without a text: no system message)
  /option NAME=VALUE  set what the chat template sees besides, such as enable_thinking=false
  /retry              answer the last message again
  /save FILE          write the messages as JSON, as OpenAI's API takes them
  /load FILE          go on with such messages
  /help, /exit
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by bilevel export")
    add_template_options(parser)
    parser.add_argument("--load", metavar="FILE", type=Path, help="go on with the messages that /save wrote")
    add_sampling_options(parser, max_tokens=1 << 30)
    parser.add_argument("--capacity", type=int, metavar="TOKENS", help="room for the conversation (default: as bilevel serve)")
    add_backend_options(parser)
    add_speculation_option(parser)
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: one per core (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of sizes and hashes")


def main(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    params = read_sampling(args)
    settings = dict(map(read_option, args.template_option))
    session, why = open_session(
        args.bundle, args.backend, verify=not args.no_verify, threads=args.threads, library=args.library
    )
    from bilevel.runtime.serve.limits import choose_limits

    limits = replace(choose_limits(session, 1, args.capacity, 1), speculation=not args.no_speculation)
    most = limits.row_tokens or session.bundle.max_positions
    with contextlib.closing(ChatEncoder(session.bundle, most, args.template, settings)) as encoder:
        tokenizer = BundleTokenizer(session.bundle.tokenizer_path)
        conversation = Conversation(session, tokenizer, encoder, limits, params)
        terminal = Terminal(conversation)
        if args.load is not None:
            terminal.load(str(args.load))
        if args.system is not None:
            conversation.system = args.system
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a question mark
        if terminal.is_interactive:
            print(f"[{why} · {most} tokens · /help]", file=sys.stderr)
        return terminal.talk()


class Terminal:
    """Lines in, answers out. is_interactive: somebody types; else the first error ends the chat."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.is_interactive = sys.stdin.isatty()
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - which lets lines be edited and called back

    def talk(self) -> int:
        """Until the input ends; the exit status."""
        while True:
            try:
                line = self._read()
                if line is None or line == "/exit":
                    return 0
                if line.startswith("/"):
                    self._obey(line)
                elif line.strip():
                    self._answer(line)
            except (BilevelError, OSError) as error:
                if not self.is_interactive:
                    raise
                print(f"bilevel: {harmless(str(error))}", file=sys.stderr)

    def _read(self) -> str | None:
        """A message, empty where it was dropped, None at the end of the input. Raises RequestError for what is not text."""
        lines: list[str] = []
        try:
            while True:
                lines.append(self._ask(("> ", "  ")[bool(lines)]))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            print(file=sys.stderr)
            return ""

    def _ask(self, prompt: str) -> str:
        """A line. Raises EOFError at the end, RequestError where it is not text."""
        if self.is_interactive and not sys.stdout.isatty():  # stdout is somebody's file: answers only
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if self.is_interactive and sys.stdout.isatty() else "")
            line.encode("utf-8")  # some locales let foreign bytes pass as surrogates
        except UnicodeError:
            raise RequestError("stdin is not UTF-8; convert it, for example with iconv") from None
        return line

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        rest, talk = rest.strip(), self._conversation
        if command == "/reset":
            talk.messages.clear()
        elif command == "/system":
            talk.messages.clear()
            talk.system = rest or None
        elif command == "/option":
            talk.encoder.settings.update([read_option(rest)])
        elif command == "/retry":
            while talk.messages and talk.messages[-1]["role"] != "user":
                talk.messages.pop()
            if not talk.messages:
                raise RequestError("there is no message to answer again")
            self._answer(talk.messages.pop()["content"])
        elif command == "/save" and rest:
            Path(rest).write_text(json.dumps({"messages": talk.whole}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        elif command == "/load" and rest:
            self.load(rest)
        elif command == "/help":
            print(EPILOG, file=sys.stderr)
        else:
            raise RequestError(f"{line[:60]!r} is no command with what it needs; /help lists them")

    def load(self, name: str) -> None:
        """Go on with saved messages. Raises RequestError for a file that holds none."""
        try:
            content: Any = read_json(Path(name))
        except ValueError as error:
            raise RequestError(f"{name} {error}; give a file that /save wrote") from None
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(
            isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
            for each in messages
        ):
            raise RequestError(f"{name} holds no list of messages with role and content; give a file that /save wrote")
        talk = self._conversation
        if messages and messages[0]["role"] == "system":
            talk.system, messages = messages[0]["content"], messages[1:]
        talk.messages[:] = messages

    def _answer(self, text: str) -> None:
        talk, start = self._conversation, time.perf_counter()
        pieces = talk.ask(text)
        try:
            for piece in pieces:
                sys.stdout.write(harmless(piece) if sys.stdout.isatty() else piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
        print(flush=True)
        if self.is_interactive and talk.job is not None:
            seconds, job = time.perf_counter() - start, talk.job
            told = f"{len(job.prompt)} tokens read, {job.num_reused} of them before · {talk.num_new_tokens} new"
            print(f"[{told} · {talk.num_new_tokens / seconds:.1f} tokens/s · {talk.finish_reason}]", file=sys.stderr)
