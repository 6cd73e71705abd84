"""What ``bilevel build`` makes of its arguments, for the tests of engines."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

from bilevel.export.cli import build as cli_build
from bilevel.export.engine.build import Plan
from bilevel.export.engine.versions import Flavour


def options(bundle: Path, *more: str) -> Namespace:
    parser = ArgumentParser()
    cli_build.configure(parser)
    return parser.parse_args([str(bundle), *more])


def plan_of(bundle: Path, *more: str) -> Plan:
    return cli_build.make_plan(options(bundle, "--sm", "89", "--plugins", "python", *more))[0]


def flavour(backend: str, *version: int) -> Flavour:
    """A version of TensorRT, as far as it is asked for its number."""
    return Flavour(backend, SimpleNamespace(__version__=".".join(map(str, version))), version)
