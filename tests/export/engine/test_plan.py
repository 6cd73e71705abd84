"""What ``bilevel build`` decides before it builds: what it refuses, which plugins, how much memory, how versions differ."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("there is no TensorRT-RTX for this machine", allow_module_level=True)

from bilevel import machine
from bilevel.bundle.engines import find_engines
from bilevel.bundle.format import read_manifest
from bilevel.errors import BilevelError, EngineError, KernelError
from bilevel.export.cli import build as cli_build
from bilevel.export.engine import build as engine
from bilevel.export.engine.build import Plan
from bilevel.export.engine.memory import Estimate, check_volumes, memory_problem
from bilevel.export.engine.network import Limits
from bilevel.export.engine.plugins import choose_plugins
from bilevel.export.engine.versions import (
    compute_capabilities,
    crashes_on_keys_of_blocks,
    has_cache_layer,
    is_weakly_typed,
    load_flavour,
    must_strip_functions,
)
from bilevel.machine import Gpu
from bilevel.plugins.library.gpu import trust
from bilevel.runtime.cli import main as cli
from tests.export.engine.plans import flavour, options, plan_of
from tests.support.tiny_models import BLOCK_SIZE

Exported = Callable[..., tuple[Path, Path]]
MIB = 2**20


@pytest.fixture
def bundle(copied: Exported) -> Path:
    return copied("two_level")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--sm", "87"],
            "builds for sm_75, .*, not for sm_87; for other GPUs run bilevel build --backend tensorrt on the device",
        ),
        (["--sm", "old"], "--sm old must list GPU architectures"),
        ([], r"--sm \(nothing\) must list"),
        (["--backend", "tensorrt", "--sm", "89"], "--sm goes with --backend tensorrt-rtx"),
        (["--sm", "89", "--batch", "3-2"], "--batch 3-2 must be a number of rows"),
        (["--sm", "89", "--batch", "0"], "--batch 0 must be"),
        (["--sm", "89", "--capacity", "97"], "--capacity 97 must lie between 1 and the model's 96 positions"),
        (["--sm", "89", "--prefill-chunk", "0"], "--prefill-chunk 0 must be at least 1"),
        (["--sm", "89", "--plugins", "/nowhere.so"], "/nowhere.so is no file; give a kernel library, python or none"),
    ],
)
def test_options_that_are_refused(arguments: list[str], message: str, exported: Exported) -> None:
    with pytest.raises(EngineError, match=message):
        cli_build.make_plan(options(exported("two_level")[1], *arguments))


def test_bundles_that_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BilevelError, match="is not a bundle"):
        cli_build.make_plan(options(tmp_path, "--sm", "89"))
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    for changes, message in (
        ({"weights": {"format": "int4"}}, "int4 weights .* TensorRT cannot read; export another"),
        ({"format_version": 2}, "it has format bilevel-bundle version 2, this bilevel reads bilevel-bundle version 1"),
    ):
        path.write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(BilevelError, match=message):
            cli_build.make_plan(options(bundle, "--sm", "89"))
    path.write_text("{")
    with pytest.raises(BilevelError, match="is not valid JSON"):
        cli_build.make_plan(options(bundle, "--sm", "89"))


def test_which_plugins(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = bundle / "kernels" / engine.platform.machine() / "libbilevel_kernels.so"
    assert "there is no" in choose_plugins(bundle, None, (89,)).why
    library.parent.mkdir(parents=True)
    info: dict[str, Any] = {"library": "bilevel kernels", "abi": 1, "target": engine.platform.machine(), "tensorrt": "10.3.0"}
    for held, changes, problem in (
        ({"80": "12.8"}, {}, ""),
        ({"87": "12.8"}, {}, "has no kernels for sm_89; build it anew: bilevel kernels build --geometry BUNDLE --arch sm_89"),
        ({"89": "12.8"}, {"tensorrt": None}, "has no TensorRT plugins; install NVIDIA's headers"),
        ({"89": "12.8"}, {"target": "vax"}, "is for vax, this machine is"),
    ):
        library.write_bytes(b"..." + json.dumps({**info, "architectures": held, **changes}).encode() + b"\0...")
        assert "is native code that came with the bundle" in choose_plugins(bundle, None, (89,)).why
        trust(library)
        chosen = choose_plugins(bundle, None, (89,))
        assert (chosen.source == str(library)) == (not problem) and problem in chosen.why
        assert (chosen.sha256 is None) == bool(problem)
        if problem:
            with pytest.raises(EngineError, match=problem):
                choose_plugins(bundle, str(library), (89,))
    with pytest.raises(KernelError, match="is no kernel library"):
        choose_plugins(bundle, str(bundle / "config.json"), (89,))


def test_memory_is_estimated_before(bundle: Path) -> None:
    small, large = plan_of(bundle, "--capacity", "48"), plan_of(bundle, "--capacity", "96", "--batch", "3")
    manifest = json.loads((bundle / "bundle.json").read_text())
    states = [s for s in manifest["graph"]["inputs"] if s["name"].startswith("past.")]
    widths = {"batch": 3, "capacity": 96, "num_blocks": 96 // BLOCK_SIZE}
    bytes_of = {"float32": 4, "int64": 8}
    expected = 0
    for state in states:
        size = bytes_of[state["dtype"]]
        for axis in state["shape"]:
            size *= widths.get(axis, axis)
        expected += size
    assert large.estimate.caches == expected == 6 * small.estimate.caches
    assert large.estimate.activations > 2 * small.estimate.activations
    weights = sum(p.stat().st_size for p in (bundle / "model.data",))
    assert 0.5 * weights < small.estimate.weights < 2 * weights + 100_000


@pytest.mark.parametrize(
    "available, gpu, problem",
    [
        (None, None, ""),
        (700 * MIB, None, ""),
        (500 * MIB, None, "building takes about 600.0 MiB, 500.0 MiB are free here"),
        (700 * MIB, Gpu("GPU", 89, 100 * MIB, False), ""),
        (
            700 * MIB,
            Gpu("GPU", 89, 50 * MIB, False),
            r"running takes about 60.0 MiB \(weights 10.0 MiB, .*lower --capacity or --batch",
        ),
        (700 * MIB, Gpu("GPU", 87, 900 * MIB, True), ""),
        (50 * MIB, Gpu("GPU", 87, 900 * MIB, True), "building takes"),
    ],
)
def test_what_does_not_fit(available: int | None, gpu: Gpu | None, problem: str) -> None:
    estimate = Estimate(10 * MIB, 20 * MIB, 30 * MIB, 600 * MIB)
    sentence = memory_problem(estimate, available, gpu)
    assert sentence == "" if not problem else re.search(problem, sentence)


def test_a_build_that_does_not_fit_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: MIB)
    command = ["build", str(bundle), "--sm", "89", "--plugins", "python"]
    assert cli.main(command) == 2
    assert "1.0 MiB are free here; build on a machine with more memory, or go on with --yes" in capsys.readouterr().err
    assert not (bundle / "engines").exists()
    built: list[Plan] = []
    real = plan_of(bundle)

    def pretend(plan: Plan, on_progress: Any) -> Path:
        built.append(plan)
        (bundle / "engines").mkdir()
        (bundle / "plan").touch()
        return engine.describe_engine(real, 7, bundle / "plan", "1.7").write()

    monkeypatch.setattr(engine, "build_engine", pretend)
    assert cli.main([*command, "--yes"]) == 0 and len(built) == 1
    assert "7 plugin layers" in capsys.readouterr().out
    assert find_engines(bundle)[0][0].backend == "tensorrt-rtx"


def test_versions_differ() -> None:
    assert [v for v in ((10, 3), (10, 6, 9), (10, 7), (11, 1)) if must_strip_functions(flavour("tensorrt", *v))] == [
        (10, 3),
        (10, 6, 9),
    ]
    assert not must_strip_functions(flavour("tensorrt-rtx", 1, 7))
    assert [v for v in ((10, 14), (10, 15), (11, 0)) if has_cache_layer(flavour("tensorrt", *v))] == [(10, 15), (11, 0)]
    assert has_cache_layer(flavour("tensorrt-rtx", 1, 7))
    assert [f.backend for f in (flavour("tensorrt", 11, 1), flavour("tensorrt-rtx", 1, 7)) if crashes_on_keys_of_blocks(f)] == [
        "tensorrt-rtx"
    ]
    assert [v for v in ((10, 3), (10, 16), (11, 0)) if is_weakly_typed(flavour("tensorrt", *v))] == [(10, 3), (10, 16)]
    assert compute_capabilities(flavour("tensorrt", 10, 3)) == {}
    assert {80, 86, 89, 120} <= set(compute_capabilities(load_flavour("tensorrt-rtx")))


def test_flavours_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="there is no backend 'openvino'; engines are built by tensorrt or tensorrt-rtx"):
        load_flavour("openvino")
    monkeypatch.setitem(engine.sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt cannot be loaded .*; install it: JetPack brings it"):
        load_flavour("tensorrt")
    monkeypatch.setitem(engine.sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"tensorrt 8.6.1 is too old; install 10.3 or newer"):
        load_flavour("tensorrt")


def test_what_goes_with_one_backend_only(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported("two_level")[1]
    with pytest.raises(EngineError, match="--timing-cache goes with --backend tensorrt; tensorrt-rtx measures nothing"):
        plan_of(bundle, "--timing-cache", "timings")
    assert plan_of(bundle).timings is None
    monkeypatch.setitem(engine.sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))  # type: ignore[arg-type]
    arguments = ("--backend", "tensorrt", "--plugins", "python")
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("GPU", 87, 8 * 2**30, True))
    plan, _ = cli_build.make_plan(options(bundle, *arguments))
    assert plan.timings == bundle / "engines" / "timings"
    assert cli_build.make_plan(options(bundle, *arguments, "--timing-cache", "mine"))[0].timings == Path("mine")
    with pytest.raises(EngineError, match="--weight-streaming is of no use here: this GPU's memory is the host's"):
        cli_build.make_plan(options(bundle, *arguments, "--weight-streaming"))
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("GPU", 86, 8 * 2**30, False))
    plan, _ = cli_build.make_plan(options(bundle, *arguments, "--weight-streaming"))
    assert plan.weight_streaming and plan.name.endswith("-streaming")


def test_a_device_without_a_gpu_is_told(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))  # type: ignore[arg-type]
    arguments = options(exported("two_level")[1], "--backend", "tensorrt", "--plugins", "python")
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match="builds for the GPU at hand, and there is none"):
        cli_build.make_plan(arguments)
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("GPU", 87, 8 * 2**30, True))
    plan, gpu = cli_build.make_plan(arguments)
    assert plan.archs == (87,) and plan.name.startswith("tensorrt-sm87-float32-") and gpu is not None and gpu.is_integrated


@pytest.mark.parametrize("rows", [1, 16])
def test_tensors_that_tensorrt_cannot_have(rows: int, exported: Exported) -> None:
    """2^31 elements of a cache are refused before anything is built, with the cache's name; fewer are not."""
    bundle = read_manifest(exported("two_level")[1])
    block = bundle.block_size
    (spec, _), *_ = bundle.graph.state
    elements = math.prod(spec.resolve(bundle.sizes(1, 1024 * block))) // 1024  # of one row and block
    blocks = -(-(2**31) // (elements * rows))
    check_volumes(bundle, Limits(rows, (blocks - 1) * block, 1, block))
    with pytest.raises(EngineError, match="past.* would have .* elements, .* at most 2,147,483,647; lower --batch"):
        check_volumes(bundle, Limits(rows, blocks * block, 1, block))
