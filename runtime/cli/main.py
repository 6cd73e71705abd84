"""The ``bilevel`` command: finds the module of the command that was named and imports only that one.

A command module has ``configure(parser: argparse.ArgumentParser) -> None``, which must be cheap, and
``main(args: argparse.Namespace) -> int``, which does the work and returns the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

import bilevel
from bilevel.errors import BilevelError, MissingDependency, harmless, require

COMMANDS = {
    "export": ("bilevel.export.cli.export", "PyTorch checkpoint to ONNX bundle"),
    "import": ("bilevel.export.cli.import_gguf", "GGUF file to checkpoint: weights, tokenizer, chat template"),
    "route": ("bilevel.export.cli.route", "dense checkpoint to a routed one: calibration alone, or trained gates"),
    "check": ("bilevel.export.cli.check", "prove that a bundle computes what its checkpoint computes, routes included"),
    "quality": (
        "bilevel.runtime.cli.quality",
        "what routing costs: hidden facts, copies, loss, beside dense and sink + window",
    ),
    "kernels": ("bilevel.export.cli.kernels", "the library of GPU kernels for a bundle, for boards and GPUs; needs none"),
    "build": ("bilevel.export.cli.build", "an engine of TensorRT or TensorRT-RTX from a bundle"),
    "deploy": ("bilevel.export.cli.deploy", "a folder for a Jetson or another machine: bundle, packages, start script, unit"),
    "run": ("bilevel.runtime.cli.run", "generate text, streaming to the terminal"),
    "chat": ("bilevel.runtime.cli.chat", "talk with the model in the terminal"),
    "serve": ("bilevel.runtime.cli.serve", "text for many users over HTTP: OpenAI's API, KServe v2, a page to try it"),
    "bench": ("bilevel.runtime.cli.bench", "speed and memory against context length, with the dense twin beside it"),
    "doctor": ("bilevel.runtime.cli.doctor", "what this machine can run, and what to do about the rest"),
    "inspect": ("bilevel.runtime.cli.inspect", "what is in a bundle, and whether it is whole"),
}
DESCRIPTION = "Takes a trained two-level-routing Transformer from PyTorch to the device."
WALK_THROUGH = """\
from a checkpoint to text:
  bilevel export my-checkpoint my-bundle            PyTorch to one ONNX file, its tokenizer and a manifest
  bilevel check my-bundle --against my-checkpoint   the same routes, the same numbers, the same tokens?
  bilevel run my-bundle "Once upon a time"          text, on a machine that needs no PyTorch
  bilevel chat my-bundle                            a conversation, with models that were taught to talk
  bilevel serve my-bundle                           the same for many users, over HTTP
  bilevel bench my-bundle                           what it costs on this machine, and what a dense model would cost
  bilevel quality my-bundle                         what routing costs in quality on this model
  bilevel inspect my-bundle                         geometry, routing, files, memory per token

bilevel COMMAND --help explains a command. Exit status: 0 success, 1 a check failed, 2 bad input, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``argv`` excludes the program's name (None: the process's own)."""
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    parser = _parser()
    options = parser.parse_args(arguments[:first])
    if first == len(arguments):
        parser.print_help()
        return 0
    command, rest = arguments[first], arguments[first + 1 :]
    debug = options.debug or "--debug" in rest
    try:
        status = _run(command, rest)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("bilevel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has left
        return 141
    except (BilevelError, OSError, MemoryError, RecursionError) as error:
        if debug:
            raise
        _tell(_sentence(error))
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()  # it may have been the output that could not be written
        return 2


def _open_streams() -> None:
    """Give a process whose standard streams are closed some that lead nowhere: a file would take their place otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number


def _drop_output() -> None:
    """Python would complain again when it flushes stdout at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(sentence: str) -> None:
    """The error, in one line that a terminal shows and does not obey."""
    with contextlib.suppress(OSError):
        print(f"bilevel: error: {harmless(' '.join(sentence.splitlines()))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="bilevel",
        usage="bilevel COMMAND ...",
        description=DESCRIPTION,
        epilog=f"commands:\n{commands}\n\n{WALK_THROUGH}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bilevel {bilevel.__version__}")
    _add_debug(parser)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")


def _run(command: str, rest: list[str]) -> int:
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise BilevelError(f"there is no command {command!r}; {hint}")
    name, summary = COMMANDS[command]
    try:
        module = importlib.import_module(name)
        parser = argparse.ArgumentParser(prog=f"bilevel {command}", description=f"{summary[0].upper()}{summary[1:]}.")
        module.configure(parser)
        _add_debug(parser)
        # Intermixed: options may stand between positional arguments.
        return int(module.main(parser.parse_intermixed_args(rest)))
    except ModuleNotFoundError as error:
        if (missing := _missing(command, error)) is None:
            raise
        raise missing from None


def _missing(command: str, error: ModuleNotFoundError) -> MissingDependency | None:
    """The error as a sentence; None when the package is there but broken, which deserves its own stack trace."""
    package = (error.name or "").partition(".")[0]
    if package == "bilevel":
        return MissingDependency(f"bilevel {command}: this installation lacks {error.name}; reinstall bilevel")
    try:
        require(package)
    except MissingDependency as missing:
        return MissingDependency(f"bilevel {command}: {missing}")
    return None


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, RecursionError):
        return "a file is nested too deep to be read; make it anew"
    return str(error) or "out of memory; lower the capacity or the number of prompts"


if __name__ == "__main__":
    sys.exit(main())
