"""Building an engine: for absent GPUs, as often as it is asked for, and never half done."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests import ROOT

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("there is no TensorRT-RTX for this machine", allow_module_level=True)

from bilevel.bundle.engines import read_engine
from bilevel.errors import EngineError
from bilevel.export.cli import build as cli_build
from bilevel.export.decoder import bundle as bundle_module
from bilevel.export.engine import build as engine
from bilevel.export.engine import worker as engine_worker
from bilevel.export.engine.build import build_engine
from bilevel.export.engine.network import parse_graph
from bilevel.export.engine.plugins import Plugins
from bilevel.export.engine.versions import Flavour, builder_flags, load_flavour
from bilevel.export.graph.nodes import routed_nodes
from bilevel.runtime.cli import main as cli
from tests.export.engine.plans import flavour, options, plan_of

EXAMPLE = ROOT / "examples" / "model"
Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture
def bundle(copied: Exported) -> Path:
    return copied("two_level")[1]


@pytest.mark.parametrize(
    ("precision", "archs", "times", "capacity", "chunk"),
    [("fp32", "80", 1, 768, 512), ("fp16", "89", 1, 500, 512), ("bf16", "120,86", 2, 1024, 513)],
)
def test_the_example_models_engine(
    precision: str, archs: str, times: int, capacity: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of a whole model in every precision; a second one, for two architectures, is the same byte for byte."""
    bundle = tmp_path / "bundle"
    monkeypatch.setattr(bundle_module, "TWIN_PRECISIONS", ())  # no engine is built from the twin
    bundle_module.export_bundle(EXAMPLE, bundle, precision=precision)
    sizes = ("--sm", archs, "--batch", "2", "--reproducible")
    sizes = (*sizes, "--capacity", str(capacity), "--prefill-chunk", str(chunk))
    phases: set[str] = set()
    manifests, plans = set(), set()
    for _ in range(times):
        path = build_engine(cli_build.make_plan(options(bundle, *sizes))[0], lambda phase, done, total: phases.add(phase))
        manifests.add(path.read_bytes())
        plans.add(read_engine(path).read_plan())
    assert len(plans) == len(manifests) == 1, "byte for byte"
    assert "Building engine" in phases
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.stem}.plan"]
    built, version = read_engine(path), load_flavour("tensorrt-rtx").trt.__version__
    assert (built.backend, built.version, built.platform) == ("tensorrt-rtx", version, None)
    assert (built.capacity, built.batch) == (-(-capacity // 32) * 32, (1, 2)), "a whole number of blocks"
    assert list(built.architectures) == sorted(map(int, archs.split(",")))
    assert built.new_tokens == ((1, min(chunk, built.capacity)), (1, 1))
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert built.precision == manifest["precision"] and built.graph_sha256 == manifest["files"]["model.onnx"]["sha256"]
    nodes = len(routed_nodes(onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph))
    keys = sum("block_key" in each["input"] for each in manifest["graph"]["state"])  # plugins write these
    assert built.plugins == {"nodes": nodes + keys, "library": None} and (nodes, keys) == (17, 7)
    for text in (b"RoutedAttention", b"format_version", b"num_selection_heads"):
        assert text in built.read_plan(), "the plan names the plugins and their fields"


@pytest.mark.parametrize("plugins, capacity, chunk", [("python", 64, 64), ("python", 96, 65), ("none", 32, 32)])
def test_chunks_as_long_as_the_caches(plugins: str, capacity: int, chunk: int, bundle: Path) -> None:
    """Level 1's keys of a whole chunk are written where the cache has no room for more."""
    path = build_engine(plan_of(bundle, "--plugins", plugins, "--capacity", str(capacity), "--prefill-chunk", str(chunk)))
    built = read_engine(path)
    assert (built.capacity, built.new_tokens) == (capacity, ((1, chunk), (1, 1)))


def test_the_command_builds_and_inspect_shows(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(
        ["build", str(bundle), "--sm", "89", "--plugins", "none", "--prefill-chunk", "1", "--capacity", "9", "--json"]
    )
    out, err = capsys.readouterr()
    built = json.loads(out)
    assert status == 0 and built["plugins"] is None and built["capacity"] == 12, "a whole number of blocks"
    assert "building takes about" in err and "running takes about" in err
    assert cli.main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "sm_89, float32, capacity 12, batch 1, no plugins" in shown
    assert cli.main(["inspect", str(bundle), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["engines"].values()
    assert facts["status"] == "ok" and facts["new_tokens"] == [[1, 1], [1, 1]]
    plan = Path(built["manifest"]).with_name(built["plan"]["file"])
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    Path(built["manifest"]).with_name("other.json").write_text("{}")
    assert cli.main(["inspect", str(bundle)]) == 1
    shown = capsys.readouterr().out
    assert "is damaged" in shown and "other.json is no engine's manifest" in shown


def test_an_interruption_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays; the process that builds is gone."""
    folder = bundle / "engines"
    folder.mkdir()
    plan = plan_of(bundle)
    for name in (plan.name, "another"):
        (folder / f".{name}.building").mkdir()  # what killed builds left
    (folder / f"{plan.name}.json").write_text("the old one")

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "Building engine":
            raise KeyboardInterrupt

    started: list[subprocess.Popen[str]] = []

    def start(*arguments: Any, **settings: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(engine, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    with pytest.raises(KeyboardInterrupt):
        build_engine(plan, interrupt)
    assert [path.name for path in folder.iterdir()] == [f"{plan.name}.json"]
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_build_is_not_disturbed_by_another(bundle: Path) -> None:
    plan = plan_of(bundle)

    def build_again(phase: str, done: int, total: int) -> None:
        with pytest.raises(EngineError, match=f"another process is building {plan.name} in .*engines now; wait for it"):
            build_engine(plan)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(plan, build_again)
    assert list((bundle / "engines").iterdir()) == []


def test_a_builder_that_dies_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(bundle)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(script))
    with pytest.raises(EngineError, match="was killed by SIGKILL .*it may have run out of memory.*try a smaller --capacity"):
        build_engine(plan)
    script.write_text("#!/bin/sh\necho something broke >&2\nexit 7\n")
    with pytest.raises(EngineError, match=r"ended with status 7 \(something broke\)"):
        build_engine(plan)
    assert list((bundle / "engines").iterdir()) == []


def test_a_library_that_is_none(bundle: Path) -> None:
    """TensorRT's own refusal, from the process that builds."""
    plan = replace(plan_of(bundle), plugins=Plugins(str(bundle / "config.json")))
    with pytest.raises(EngineError, match="cannot load the plugins of .*config.json; build the library anew"):
        build_engine(plan)


def test_a_graph_that_is_none(bundle: Path) -> None:
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    model.graph.node[0].op_type = "Unheard"
    plan = plan_of(bundle)
    onnx.save(model, str(bundle / "model.onnx"))
    with pytest.raises(EngineError, match=r"cannot read model.onnx .*Unheard.*; export the bundle anew"):
        build_engine(plan)


def test_functions_are_stripped_where_they_would_win(bundle: Path, tmp_path: Path) -> None:
    plan = replace(plan_of(bundle), flavour=flavour("tensorrt", 10, 3))
    path, nodes = engine._prepare_model(plan, tmp_path)
    stripped = onnx.load(str(path), load_external_data=False)
    written = 7  # caches: two layers of three, and level 1's keys
    assert len(stripped.functions) == 0 and len(routed_nodes(stripped.graph)) == nodes == 7 + written
    for version, count in ((10, 7), 7 + written), ((10, 15), 7):
        newer = replace(plan, flavour=flavour("tensorrt", *version))
        path, nodes = engine._prepare_model(newer, tmp_path)
        assert nodes == count and len(onnx.load(str(path), load_external_data=False).functions) == 5


class Timings:
    """A builder's configuration, as far as timings go: it takes those of its own device only."""

    def __init__(self) -> None:
        self.taken: bytes | None = None

    def create_timing_cache(self, known: bytes) -> Any:
        return None if known.startswith(b"damaged") else SimpleNamespace(known=known, serialize=lambda: known + b"+new")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.known.startswith(b"other device") and not ignore_mismatch:
            return False
        self.taken = cache.known
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


@pytest.mark.parametrize(("before", "taken"), [(None, b""), (b"mine", b"mine"), (b"other device", b""), (b"damaged", b"")])
def test_timings_are_kept_from_build_to_build(before: bytes | None, taken: bytes, tmp_path: Path) -> None:
    file, config = tmp_path / "timings", Timings()
    if before is not None:
        file.write_bytes(before)
    engine_worker.take_timings(config, file)
    assert config.taken == taken
    engine_worker.keep_timings(config, file)
    assert file.read_bytes() == taken + b"+new" and list(tmp_path.iterdir()) == [file]


def test_an_engine_whose_weights_may_stream(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build_engine(plan_of(bundle, "--weight-streaming", "--capacity", "16", "--prefill-chunk", "1"))
    assert read_engine(path).weight_streaming and path.stem.endswith("-streaming")
    assert cli.main(["inspect", str(bundle)]) == 0 and "weights may stream" in capsys.readouterr().out


@pytest.mark.parametrize("weight_streaming", [False, True])
def test_what_is_captured_allocates_nothing(weight_streaming: bool, bundle: Path) -> None:
    """TensorRT-RTX is told so when it builds; a TensorRT without that flag is not."""
    rtx = load_flavour("tensorrt-rtx")
    graph = bundle / "model.onnx"
    parsed = parse_graph(rtx, graph.read_bytes(), graph, 0)
    configs = []

    class Builder:
        create_optimization_profile = parsed.builder.create_optimization_profile

        def create_builder_config(self) -> Any:
            configs.append(parsed.builder.create_builder_config())
            return configs[-1]

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return b"plan"

    plan = plan_of(bundle, "--capacity", "32")
    job = engine_worker.Job("", "", 0, "tensorrt-rtx", (89,), plan.limits, "none", "", weight_streaming=weight_streaming)
    engine_worker.build_plan(replace(parsed, builder=Builder()), job, lambda **event: None)
    assert configs[0].get_flag(rtx.trt.BuilderFlag.REQUIRE_USER_ALLOCATION) != weight_streaming
    assert configs[0].get_flag(rtx.trt.BuilderFlag.WEIGHT_STREAMING) == weight_streaming
    jetpack = Flavour("tensorrt", SimpleNamespace(BuilderFlag=SimpleNamespace(__members__={"WEIGHT_STREAMING": 17})), (10, 3))
    assert builder_flags(jetpack, weight_streaming) == [17] * weight_streaming
