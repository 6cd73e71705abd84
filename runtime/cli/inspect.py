"""``bilevel inspect``: what is in a bundle, and whether it is whole. Needs numpy only."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bilevel.bundle.engines import Engine, find_engines
from bilevel.bundle.format import Bundle, read_manifest
from bilevel.bundle.manifest import FORMAT_VERSION
from bilevel.errors import EngineError, MissingDependency, harmless, require

# Keys of config.json worth a line, with what they are called in a table.
GEOMETRY = {
    "model_type": "type",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "MLP size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head dim",
    "vocab_size": "vocabulary",
}
Section = tuple[str, list[tuple[str, str]]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by bilevel export")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the bundle; 1 when a file or an engine is missing or differs from its manifest."""
    bundle = read_manifest(args.bundle)
    facts = describe(bundle)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(f"{bundle.folder} (bundle format {FORMAT_VERSION})", _sections(facts))
    return 0 if all(each["status"] == "ok" for each in (*facts["files"].values(), *facts["engines"].values())) else 1


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that ``--json`` prints. Sizes in bytes; state_bytes is one row's share of the caches."""
    capacity = bundle.round_up(bundle.max_positions)
    block = bundle.state_bytes(1, bundle.block_size)
    return {
        "bundle": str(bundle.folder),
        "format_version": FORMAT_VERSION,
        "created_by": dict(bundle.created_by),
        "precision": bundle.precision,
        "weights": dict(bundle.weights),
        "caches": bundle.caches,
        "model": {key: bundle.config[key] for key in GEOMETRY if key in bundle.config},
        "routing": bundle.config.get("routing"),
        "experts": bundle.config.get("experts"),
        "limits": {
            "block_size": bundle.block_size,
            "max_positions": bundle.max_positions,
            "prefill_chunk": bundle.prefill_chunk,
        },
        "tokens": {"bos": bundle.bos, "eos": list(bundle.eos)},
        "eos_sources": {str(token): list(sources) for token, sources in bundle.eos_sources.items()},
        "graph": {"file": bundle.graph.file, "opset": bundle.opset, "num_states": len(bundle.graph.state)},
        "operators": dict(bundle.graph.operators),
        "state_bytes": {
            "per_1000_tokens": block * 1000 // bundle.block_size,
            "at_max_positions": bundle.state_bytes(1, capacity),
        },
        "files": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256, "status": bundle.file_problem(name) or "ok"}
            for name, record in bundle.files.items()
        },
        "engines": _engines(bundle.folder),
        "checks": list(bundle.checks),
    }


def _engines(folder: Path) -> dict[str, dict[str, Any]]:
    """Engine -> its manifest and status; of one whose manifest cannot be read, the status alone."""
    engines, problems = find_engines(folder)
    readable = {engine.name: _engine(engine) for engine in engines}
    return {**readable, **{f"unreadable {index}": {"status": str(problem)} for index, problem in enumerate(problems, 1)}}


def _engine(engine: Engine) -> dict[str, Any]:
    try:
        engine.read_plan()
        status = "ok"
    except EngineError as error:
        status = str(error)
    return {
        "backend": engine.backend,
        "version": engine.version,
        "platform": engine.platform,
        "architectures": list(engine.architectures),
        "precision": engine.precision,
        "capacity": engine.capacity,
        "batch": list(engine.batch),
        "new_tokens": [list(each) for each in engine.new_tokens],
        "plugins": engine.plugins,
        "weight_streaming": engine.weight_streaming,
        "memory_bytes": dict(engine.memory_bytes),
        "bytes": engine.num_bytes,
        "status": status,
    }


def _engine_row(engine: dict[str, Any]) -> str:
    if "backend" not in engine:
        return str(engine["status"])
    archs = ", ".join(f"sm_{arch}" for arch in engine["architectures"])
    rows = "-".join(str(rows) for rows in dict.fromkeys(engine["batch"]))
    nodes = f"{engine['plugins']['nodes']} plugin nodes" if engine["plugins"] else "no plugins"
    facts = f"{archs}, {engine['precision']}, capacity {engine['capacity']}, batch {rows}, {nodes}"
    if engine["weight_streaming"]:
        facts += ", weights may stream"
    return f"{engine['backend']} {engine['version']}, {facts}, {_size(engine['bytes'])}, {engine['status']}"


def _sections(facts: dict[str, Any]) -> list[Section]:
    """The facts as tables of two columns."""
    state = facts["state_bytes"]
    positions = facts["limits"]["max_positions"]
    graph = facts["graph"]
    sections: list[Section] = [
        (
            "model",
            [
                *((GEOMETRY[key], str(value)) for key, value in facts["model"].items()),
                ("precision", facts["precision"]),
                *([("keys and values", facts["caches"])] if facts["caches"] != "fp32" else []),
                *_rows(facts["limits"]),
                ("bos token", _text(facts["tokens"]["bos"])),
                ("eos token", _text(facts["tokens"]["eos"])),
                *((f"eos {token}", ", ".join(sources)) for token, sources in facts["eos_sources"].items() if sources),
            ],
        ),
        ("weights", _weight_rows(facts["weights"])),
        ("routing", _rows(facts["routing"] or {"preset": "dense"})),
        ("experts", _rows(facts["experts"] or {})),
        ("operators", [(name, f"version {version}") for name, version in facts["operators"].items()]),
        (
            "state memory per row",
            [
                ("per 1000 tokens", _size(state["per_1000_tokens"])),
                (f"at {positions} positions", _size(state["at_max_positions"])),
            ],
        ),
        ("files", [(name, f"{_size(file['bytes'])}, {file['status']}") for name, file in facts["files"].items()]),
        ("engines", [(name, _engine_row(engine)) for name, engine in facts["engines"].items()]),
        ("created by", [*_rows(facts["created_by"]), ("ONNX opset", str(graph["opset"]))]),
        (
            "checks",
            [(f"{index}", _text(check)) for index, check in enumerate(facts["checks"], 1)] or [("none", "run bilevel check")],
        ),
    ]
    shown = [(title, [(harmless(name), harmless(value)) for name, value in rows]) for title, rows in sections]
    return [(title, rows) for title, rows in shown if rows]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _text(value)) for key, value in values.items()]


def _weight_rows(weights: dict[str, Any]) -> list[tuple[str, str]]:
    """How the weights are stored; sizes of what stayed in fp32 in human units."""
    fp32_bytes = weights.get("kept_fp32", {})
    rows = _rows({key: value for key, value in weights.items() if key != "kept_fp32"})
    return [*rows, *((f"fp32: {name}", _size(num_bytes)) for name, num_bytes in fp32_bytes.items())]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."  # a SHA-256; --json gives all of it
    return "none" if value is None else str(value)


def _size(num_bytes: int) -> str:
    """A human size: 1234 -> 1.2 KiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def _print(title: str, sections: list[Section]) -> None:
    """Tables on a terminal where rich is installed, else lines that grep can use."""
    if sys.stdout.isatty():
        try:
            return _print_tables(title, sections)
        except MissingDependency:
            pass
    print(title)
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for heading, rows in sections:
        print(f"\n{heading}")
        for name, value in rows:
            print(f"  {name:{width}}  {value}")


def _print_tables(title: str, sections: list[Section]) -> None:
    require("rich")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(title, style="bold"))
    for heading, rows in sections:
        table = Table(title=heading, title_justify="left", show_header=False, min_width=44)
        for name, value in rows:
            table.add_row(Text(name), Text(value, style="" if "differs" not in value else "red"))
        console.print(table)
