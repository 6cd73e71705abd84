"""``bilevel run``: text from a bundle. Generated text goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilevel.bundle.engines import FOLDER
from bilevel.errors import RequestError, harmless
from bilevel.runtime.backend.select import ONNX, ONNX_CUDA, add_backend_options
from bilevel.runtime.cli.conversation import ChatEncoder, add_template_options, read_option
from bilevel.runtime.cli.sampling import add_sampling_options, add_speculation_option, read_sampling
from bilevel.runtime.generate.generator import Generation, Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import decode_utf8


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by bilevel export")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue; several are run as one batch")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="read one more prompt from a UTF-8 file, exactly as it is; - reads stdin"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a message, answered by the model's chat template")
    add_template_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--capacity", type=int, metavar="TOKENS", help="room per prompt and its text (default: what is needed)")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="TOKENS", help="prompt tokens per call (default: the bundle's limit)"
    )
    add_backend_options(parser)
    add_speculation_option(parser)
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: one per core (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of sizes and hashes")
    parser.add_argument("--json", action="store_true", help="print one JSON object: texts, ids, finish reasons, timings")


def main(args: argparse.Namespace) -> int:
    """Generate; 130 when Ctrl-C ended it (the text so far is kept)."""
    params = read_sampling(args)
    prompts = [_decode_argument(text, index) for index, text in enumerate(args.prompts)]
    if args.prompt_file is not None:
        prompts.append(_read_prompt(args.prompt_file))
    _check(args, prompts)
    generator = Generator.open(
        args.bundle,
        args.backend,
        library=args.library,
        verify=not args.no_verify,
        threads=args.threads,
        speculation=not args.no_speculation,
    )
    had_choice = args.backend == ONNX_CUDA or (args.backend != ONNX and any((args.bundle / FOLDER).glob("*.json")))
    if had_choice and not args.json:
        print(f"[{generator.backend_reason}]", file=sys.stderr)
    # A terminal that cannot show a character gets a question mark; the run goes on.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    cancel = threading.Event()
    with _set_on_interrupt(cancel):
        generation = generator.generate(
            _as_chats(args, generator, prompts) if args.chat else prompts,
            params,
            capacity=args.capacity,
            prefill_chunk=args.prefill_chunk,
            on_progress=_show_progress if sys.stderr.isatty() else None,
            cancel=cancel,
        )
        if args.json:
            generation.finish()
            print(json.dumps(_result(args, params, prompts, generation)))
        elif len(prompts) == 1:
            _stream(generation)
        else:
            _print_all(generation)
    if not args.json:
        print(_summary(generation), file=sys.stderr)
    return 130 if cancel.is_set() else 0


def _as_chats(args: argparse.Namespace, generator: Generator, prompts: list[str]) -> list[list[int]]:
    """Token ids of the prompts as the first messages of chats."""
    bundle, settings = generator.session.bundle, dict(map(read_option, args.template_option))
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    with closing(ChatEncoder(bundle, bundle.max_positions, args.template, settings)) as encoder:
        return [encoder.encode([*system, {"role": "user", "content": prompt}]) for prompt in prompts]


def _check(args: argparse.Namespace, prompts: list[str]) -> None:
    """What can be refused before the bundle is read, which may take a while."""
    if not prompts:
        raise RequestError('there is no prompt; give one, for example: bilevel run BUNDLE "Once upon a time"')
    if not all(prompts):
        raise RequestError(f"prompt {prompts.index('')} is empty; give at least one character")
    if not args.chat and (args.system is not None or args.template is not None or args.template_option):
        raise RequestError("--system, --template and --template-option are a chat's; give --chat too")
    for name, least in (("capacity", 1), ("prefill_chunk", 1), ("threads", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RequestError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def _decode_argument(text: str, index: int) -> str:
    """A command-line argument whose bytes were not text in this locale is judged by its bytes."""
    return decode_utf8(os.fsencode(text), f"prompt {index}")


def _read_prompt(name: str) -> str:
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return decode_utf8(data, "stdin" if name == "-" else name)


@contextmanager
def _set_on_interrupt(flag: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets ``flag``, a second one interrupts at once."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show_progress(num_read: int, num_all: int) -> None:
    """One line on stderr that removes itself."""
    line = f"reading the prompt: {num_read} of {num_all} tokens"
    sys.stderr.write(f"\r{line}" if num_read < num_all else "\r" + " " * len(line) + "\r")
    sys.stderr.flush()


def _stream(generation: Generation) -> None:
    for event in generation:
        sys.stdout.write(harmless(event.text) if sys.stdout.isatty() else event.text)
        sys.stdout.flush()
    print()


def _print_all(generation: Generation) -> None:
    for index, completion in enumerate(generation.finish()):
        text = harmless(completion.text) if sys.stdout.isatty() else completion.text
        print(f"--- prompt {index} ({completion.finish_reason}) ---\n{text}")


def _result(args: argparse.Namespace, params: SamplingParams, prompts: list[str], generation: Generation) -> dict[str, Any]:
    stats = generation.stats
    return {
        "bundle": str(args.bundle),
        "sampling": asdict(params),
        "completions": [
            {"prompt": prompt, **asdict(completion)} for prompt, completion in zip(prompts, generation.completions, strict=True)
        ],
        "timings": {
            **asdict(stats),
            "prefill_tokens_per_second": stats.prefill_tokens_per_second,
            "decode_tokens_per_second": stats.decode_tokens_per_second,
        },
    }


def _summary(generation: Generation) -> str:
    stats, reasons = generation.stats, sorted({str(each.finish_reason) for each in generation.completions})
    parts = [f"{stats.num_prompt_tokens} prompt tokens, {stats.num_new_tokens} new"]
    if stats.first_token_seconds is not None:
        parts.append(f"first after {stats.first_token_seconds:.2f} s")
    if stats.decode_tokens_per_second is not None:
        parts.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
    if stats.num_draft_tokens_taken:
        parts.append(f"{stats.num_draft_tokens_taken} of {stats.num_drafted_tokens} drafted tokens taken")
    return f"[{' · '.join([*parts, ', '.join(reasons)])}]"
