"""The sampling options that commands share."""

from __future__ import annotations

import argparse
import secrets

from bilevel.runtime.generate.sampling import SamplingParams


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int | None = None) -> None:
    """--max-tokens, --temperature and so on, --seed, --stop. max_tokens: its default (None: that of ``SamplingParams``)."""
    defaults = SamplingParams()
    for name, kind, text in (
        ("max_tokens", int, "most tokens to generate"),
        ("temperature", float, "0 takes the best token always; higher is more varied"),
        ("top_k", int, "draw from the k best tokens; 0: all"),
        ("top_p", float, "draw from the fewest best tokens whose probabilities reach p"),
        ("min_p", float, "draw from tokens with at least this share of the best one's probability"),
        ("repetition_penalty", float, "above 1 weakens tokens already used"),
        ("presence_penalty", float, "taken from the logits of tokens that the text holds"),
        ("frequency_penalty", float, "the same, for each time that it holds them"),
    ):
        is_open = name == "max_tokens" and max_tokens is not None
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=max_tokens if is_open else getattr(defaults, name),
            metavar="N",
            help=f"{text} (default: {'as many as there is room for' if is_open else '%(default)s'})",
        )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a fresh one)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")


def add_speculation_option(parser: argparse.ArgumentParser) -> None:
    """``--no-speculation``."""
    parser.add_argument(
        "--no-speculation",
        action="store_true",
        help="one token a call, even where the text repeats what stood before; the text is the same",
    )


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling settings; a seed is drawn where it matters and none was given, so that it can be reported."""
    seed = secrets.randbits(32) if args.seed is None and args.temperature > 0 else args.seed
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=seed,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
    )
