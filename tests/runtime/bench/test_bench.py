"""``bilevel bench``: its arithmetic, its refusals, and one whole run on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bilevel.bundle.format import load_bundle
from bilevel.bundle.tensors import decode, encode
from bilevel.errors import BilevelError, RequestError
from bilevel.runtime.bench import plan as bench_plan
from bilevel.runtime.bench import report as bench_report
from bilevel.runtime.bench import roofline as bench_roofline
from bilevel.runtime.bench.measure import relative_error
from bilevel.runtime.bench.plan import DENSE, ROUTED, BenchPlan, Case, SideResult, Spread, choose_contexts
from bilevel.runtime.bench.profile import PARTS, read_profile, split_call
from bilevel.runtime.bench.report import decode_parts, save_plot
from bilevel.runtime.bench.roofline import READ_SIZES, CeilingMeter, Ceilings, Geometry, Work
from bilevel.runtime.bench.side import Side, SideSpec
from bilevel.runtime.bench.worker import Worker
from bilevel.runtime.cli import bench as cli_bench
from bilevel.runtime.cli.main import main
from tests.doubles.bundle import edit_manifest, file_record, write_bundle

Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine reaches is measured on a GiB otherwise, for seconds."""
    for module in (bench_roofline, bench_report):
        monkeypatch.setattr(module, "READ_SIZES", (2**16, 2**18, 2**20, 2**22))


@pytest.mark.usefixtures("few_bytes")
def test_one_run(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number is there for both sides, the last line is JSON, and the plot is written."""
    _, bundle = exported("two_level")
    plot = tmp_path / "cost.png"
    arguments = ["bench", str(bundle), "--contexts", "16,40", "--decode-steps", "3", "--prefill-runs", "1", "--threads", "1"]
    assert main([*arguments, "--max-prefill", "16", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert "Decode and memory" in output and "Prefill" in output and "by part" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [case["context"] for case in result["cases"]] == [16, 40]
    assert result["machine"]["threads"] == 1 and result["weights"] == "fp32"
    for case in result["cases"]:
        assert len(case["checks"]) >= 3 and max(case["checks"].values()) < 1e-3
        for name, side in case["sides"].items():
            assert 0 < side["decode"]["low"] <= side["decode"]["median"] <= side["decode"]["high"]
            assert side["decode"]["count"] == bench_plan.BURST, "whole bursts"
            assert 0 < side["outside_engine"] < 1
            assert side["peak_bytes"] > side["state_bytes"] > 0
            assert side["decode_roofline"] > 0 and (side["prefill_roofline"] is None) == (side["prefill"] is None)
            assert side["decode_tokens_per_second"] == pytest.approx(1 / side["decode"]["median"])
            assert set(side["parts"]) == set(PARTS)
            assert side["parts"]["attention"] > 0 and side["parts"]["experts"] > 0 and side["parts"]["matmuls"] > 0
            assert (side["parts"]["level 2"] > 0) == (name == ROUTED)
            assert (side["prefill"] is not None) == (case["context"] == 16), "longer than --max-prefill is left out"
        ratio = case["sides"][DENSE]["decode"]["median"] / case["sides"][ROUTED]["decode"]["median"]
        assert case["ratio"]["decode"] == pytest.approx(ratio)
    assert result["cases"][1]["sides"][ROUTED]["attended"] == pytest.approx(9 / 41), "two whole blocks of 4 and one token"
    assert result["cases"][1]["ratio"]["prefill"] is None


@pytest.mark.usefixtures("few_bytes")
def test_quantised_bundle(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    """Its twin has int8 caches, which are a quarter as large; outputs may differ by the rounding.

    --no-profile, --no-prefill.
    """
    _, bundle = exported("moba", "int8")
    assert (
        main(["bench", str(bundle), "--contexts", "16", "--decode-steps", "2", "--no-prefill", "--no-profile", "--json"]) == 0
    )
    output = capsys.readouterr().out
    result = json.loads(output)
    assert result["weights"] == "int8" and "Decode" not in output
    (case,) = result["cases"]
    keys_and_values = 2 * 2 * 2 * 8 * 32
    assert case["sides"][DENSE]["state_bytes"] == keys_and_values
    assert case["sides"][ROUTED]["state_bytes"] == 4 * (keys_and_values + 2 * 2 * 8 * 8)
    assert case["sides"][ROUTED]["parts"] == {} and case["sides"][ROUTED]["prefill"] is None


@pytest.mark.usefixtures("few_bytes")
def test_fp16_bundle(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides have fp16 caches; the least time counts two bytes a number."""
    _, bundle = exported("two_level", precision="fp16")
    assert (
        main(["bench", str(bundle), "--contexts", "16", "--decode-steps", "1", "--no-prefill", "--no-profile", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["precision"] == "float16" and result["weights"] == "fp32"
    (case,) = result["cases"]
    assert case["sides"][DENSE]["state_bytes"] == 2 * 2 * 2 * 2 * 8 * 32
    assert max(case["checks"].values()) < 0.05


def test_bfloat16_bundle_is_refused(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = exported("two_level", precision="bf16")
    assert main(["bench", str(bundle), "--contexts", "16"]) == 2
    message = capsys.readouterr().err
    assert "is in bfloat16, for which ONNX Runtime's GroupQueryAttention has no CPU kernel, so it has no dense twin" in message
    assert message.endswith("to measure on a CPU, export with --precision fp16 or fp32\n")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_filled_caches_in_16_bits(tmp_path: Path, precision: str) -> None:
    """Normal numbers of the caches' own type, block keys their fp32 means rounded to it."""
    side = Side(SideSpec(write_bundle(tmp_path, precision=precision), False, 1, 64))
    side.fill(48, seed=0)
    state = side._caches.state
    keys = decode(state["past.key.0"], precision)[0, 0, :, 0]
    assert not keys[48:].any() and 0.7 < keys[:48].std() < 1.3 and len(set(keys[:48])) > 40
    means = encode(keys.reshape(-1, 8).mean(1), precision)
    assert np.array_equal(state["past.block_key.0"][0, 0, :, 0], means)


def _damaged(bundle: Path, target: Path) -> Path:
    """A copy whose routed graph scales attention otherwise."""
    shutil.copytree(bundle, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "RoutedAttention" and attribute.name == "scale":
                attribute.f *= 1.5
    onnx.save(model, target / "model.onnx")
    edit_manifest(target, lambda m: m["files"].update({"model.onnx": file_record(target / "model.onnx")}))
    return target


def test_wrong_outputs_are_refused(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = _damaged(exported("moba")[1], tmp_path / "damaged")
    assert main(["bench", str(bundle), "--contexts", "16", "--decode-steps", "8", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "", "no numbers"
    assert "refused: the routed graph's logits after 12 tokens differ from the dense twin's" in captured.err


def test_a_chunk_that_differs_from_single_tokens_is_noticed(exported: Exported) -> None:
    """What the check on filled caches compares: another token gives other logits, another cut the same ones."""
    _, bundle = exported("moba")
    for is_twin in (False, True):
        side = Side(SideSpec(bundle, is_twin, 1, 64))
        side.fill(32, seed=0)
        single = side.logits([5, 6, 7, 8], 32, 1)
        assert relative_error(side.logits([5, 6, 7, 8], 32, 4), single) < 1e-4
        assert relative_error(side.logits([5, 6, 9, 8], 32, 4), single) > 1e-3


def test_filled_caches_are_consistent(exported: Exported) -> None:
    """Block keys are the means of the keys; level 1's descriptors have length 1; every cache is filled as far as asked."""
    _, folder = exported("two_level")
    side = Side(SideSpec(folder, False, 1, 48))
    side.fill(40, seed=3)
    state = side._caches.state
    for layer in (0, 1):
        keys = state[f"past.key.{layer}"]
        means = keys.reshape(1, 2, 12, 4, 8).mean(3)
        np.testing.assert_allclose(state[f"past.block_key.{layer}"], means, atol=1e-6)
        assert keys[:, :, :40].std() == pytest.approx(1, abs=0.1) and not keys[:, :, 40:].any()
    np.testing.assert_allclose(np.linalg.norm(state["past.word_block_key"], axis=-1), 1, atol=1e-5)
    assert len(set(state["past.token_ids"][0, :40].tolist())) > 20
    first, second = side.decode(1), side.decode(2)
    assert len(first) == 1 and len(second) == 2 and all(0 < engine <= total for total, engine in first + second)
    assert side._generation is not None and side._generation._rows[0].num_cached == 43


def test_unknown_cache_is_refused(exported: Exported, tmp_path: Path) -> None:
    side = Side(SideSpec(exported("moba")[1], False, 1, 16))
    side._caches.state["past.other.0"] = np.zeros(1)
    with pytest.raises(BilevelError, match="cannot fill the cache past.other.0"):
        side.fill(8, seed=0)


def _result(decode: float, prefill: float | None = None, **values: Any) -> SideResult:
    def spread(seconds: float) -> Spread:
        return Spread(seconds, seconds * 0.9, seconds * 1.1, 5)

    defaults: dict[str, Any] = {"outside_engine": 0.1, "peak_bytes": 100, "state_bytes": 10, "decode_roofline": decode / 2}
    prefill_spread = None if prefill is None else spread(prefill)
    return SideResult(
        decode=spread(decode), attended=0.5, prefill=prefill_spread, prefill_roofline=prefill, **{**defaults, **values}
    )


def test_ratios() -> None:
    case = Case(64, {ROUTED: _result(0.01, 2.0, peak_bytes=100), DENSE: _result(0.04, 3.0, peak_bytes=150)}, {})
    assert case.ratio("decode") == pytest.approx(4) and case.ratio("prefill") == pytest.approx(1.5)
    assert case.ratio("peak_bytes") == pytest.approx(1.5)
    assert Case(64, {ROUTED: _result(0.01)}, {}).ratio("decode") is None
    assert Case(64, {ROUTED: _result(0.01), DENSE: _result(0.02, 1.0)}, {}).ratio("prefill") is None


def test_parts_add_up_to_the_measured_step() -> None:
    """A profiled run is slower; its shares are scaled to the median step, of which the runtime has its own part."""
    side = _result(0.01, outside_engine=0.2, parts={**dict.fromkeys(PARTS, 0.0), "matmuls": 0.03, "attention": 0.01})
    parts = decode_parts(side)
    assert parts["runtime"] == pytest.approx(0.002) and parts["matmuls"] == pytest.approx(0.006)
    assert sum(parts.values()) == pytest.approx(0.01)


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_relative_error() -> None:
    right = np.array([3.0, 4.0], np.float32)
    assert relative_error(right, right) == 0
    assert relative_error(right + np.array([0, 0.5], np.float32), right) == pytest.approx(0.1)
    assert relative_error(np.array([3.0, np.nan], np.float32), right) == math.inf
    assert relative_error(right, np.array([np.inf, 4.0], np.float32)) == math.inf


@pytest.mark.parametrize("suffix, start", [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_plot(tmp_path: Path, suffix: str, start: bytes) -> None:
    cases = [Case(n, {ROUTED: _result(0.01, n / 1e3), DENSE: _result(n / 1e5, n / 5e2)}, {}) for n in (1024, 4096)]
    path = tmp_path / f"plot{suffix}"
    save_plot(path, cases, "a title")
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_geometry_counts_the_weights_of_the_model(exported: Exported, preset: str) -> None:
    """The roofline's weights are those that PyTorch's modules multiply with; of the experts, those that are chosen."""
    from bilevel.checkpoint import load_model

    checkpoint, folder = exported(preset)
    model, config = load_model(checkpoint), load_bundle(folder).config
    expected = model.lm_head.weight.numel()
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            expected += parameter.numel()
        elif parameter.dim() == 3:
            expected += parameter.numel() * config["experts"]["top_k"] // config["experts"]["num_experts"]
    assert Geometry(config, "fp32").num_weights == expected


CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 5,
    "vocab_size": 10,
    "routing": {"preset": "two_level", "block_size": 4, "coarse_topk": 5, "topk": 3, "route_dim": 0},
}


def test_geometry_counts_what_a_token_reads() -> None:
    geometry = Geometry(CONFIG, "fp32")
    assert [geometry.attended(length, False) for length in (1, 8, 12, 13, 16, 17)] == [1, 8, 12, 9, 12, 9]
    assert geometry.attended(17, True) == 17
    assert (
        geometry.scored(17, False) == (4, 4) and geometry.scored(100, False) == (24, 5) and geometry.scored(100, True) == (0, 0)
    )
    weights = 2 * (8 * 3 * (4 + 4 + 2 + 2) + 3 * 8 * 5) + 8 * 10
    assert geometry.num_weights == weights
    # Behind 99 tokens: 12 tokens' keys and values and 5 block keys a layer and head, 24 descriptors of level 1.
    routed, dense = geometry.decode(99, False), geometry.decode(99, True)
    assert routed.bytes == 4 * (weights + 2 * (2 * 3 * 2 * 12 + 2 * 3 * 5) + 24 * 8)
    assert dense.bytes == 4 * (weights + 2 * 2 * 3 * 2 * 100)
    assert dense.flops == 2 * (weights + 2 * 4 * 3 * 2 * 100)
    assert Geometry(CONFIG, "int4").decode(99, True).bytes == pytest.approx(dense.bytes - weights * (4 - 0.640625))
    half = Geometry(CONFIG, "fp32", twin_cache_bytes=2, float_bytes=2)
    for side, full in ((False, routed), (True, dense)):
        assert (half.decode(99, side).bytes, half.decode(99, side).flops) == (full.bytes / 2, full.flops)


def test_prefill_work_is_that_of_its_tokens() -> None:
    geometry = Geometry(CONFIG, "fp32")
    head = 8 * 10
    work = geometry.prefill(20, 8, True)
    attended = sum(range(1, 21))
    assert work.flops == 2 * (20 * (geometry.num_weights - head) + 3 * head + 2 * 4 * 3 * 2 * attended)
    assert work.bytes == 4 * (3 * geometry.num_weights + (8 + 16 + 20) * 2 * 2 * 3 * 2)
    assert geometry.prefill(20, 8, False).flops < work.flops


def test_ceilings() -> None:
    """The slower of reading and computing bounds a call; the rate belongs to what one call reads."""
    ceilings = Ceilings(100.0, (40.0, 30.0, 20.0, 10.0))
    assert ceilings.seconds(Work(80.0, 100.0)) == pytest.approx(2) and ceilings.seconds(Work(80.0, 900.0)) == pytest.approx(9)
    assert ceilings.read_rate(READ_SIZES[1]) == pytest.approx(30) and ceilings.read_rate(10 * READ_SIZES[-1]) == pytest.approx(
        10
    )
    assert 20 < ceilings.read_rate(READ_SIZES[1] * 2) < 30
    assert ceilings.best(Ceilings(90.0, (50.0, 1.0, 1.0, 11.0))) == Ceilings(100.0, (50.0, 30.0, 20.0, 11.0))
    assert ceilings.seconds(Work(READ_SIZES[-1], 0), calls=64) == pytest.approx(READ_SIZES[-1] / 40)


def _node(name: str, op: str, start: int, duration: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}


def test_profile_by_part(tmp_path: Path) -> None:
    """Kernels of the library and nodes of inlined bodies alike; an If counts once; calls are kept apart."""
    nodes = [
        _node("node_embedding", "Gather", 0, 1_000),
        _node("node_linear", "MatMul", 1_000, 2_000),
        _node("_inlfunc_CoarseRoute_n1", "TopK", 3_000, 4_000),
        _node("node_write_cache", "ScatterND", 7_000, 8_000),
        _node("node_fine_route", "FineRoute", 15_000, 16_000),
        _node("_inlfunc_RoutedAttention_n3", "If", 31_000, 32_000),
        _node("_inlfunc_RoutedAttention_n4", "MatMul", 32_000, 10_000),
        _node("node_mean", "ReduceMean", 63_000, 500),
        _node("node_routed_experts", "RoutedExperts", 64_000, 100),
        _node("node_add", "Add", 65_000, 200),
    ]
    second = _node("node_linear", "Gemm", 80_000, 700)
    runs = [
        {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}} for ts, dur in ((79_000, 2_000), (0, 70_000))
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([second, *runs, *nodes[::-1]]))
    first, last = read_profile(path)
    expected = {"level 1": 5, "level 2": 16.5, "attention": 32, "experts": 0.1, "matmuls": 2, "other": 8.2}
    assert {part: seconds * 1e3 for part, seconds in first.items() if part != "engine"} == pytest.approx(expected)
    assert first["engine"] * 1e3 == pytest.approx(70 - sum(expected.values()))
    assert last["matmuls"] * 1e3 == pytest.approx(0.7) and last["engine"] * 1e3 == pytest.approx(1.3)


def test_profile_of_one_level() -> None:
    """Where there is no FineRoute, CoarseRoute is level 2, and nothing before it is level 1."""
    nodes = [_node("node_cast", "Cast", 0, 3), _node("node_coarse_route", "CoarseRoute", 5, 4)]
    parts = split_call(nodes, 20, has_fine=False)
    assert (parts["level 1"], parts["level 2"], parts["other"]) == (0, pytest.approx(4e-6), pytest.approx(3e-6))


def test_busy_share_counts_what_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 ticks, 60 idle and 10 waiting for the disk: 30 % busy. The tick counts of a guest are not counted twice."""
    stat = tmp_path / "stat"
    contents = iter(["cpu 10 0 0 100 0 0 0 0 9 9\ncpu0 1", "cpu 25 5 5 160 10 0 0 5 99 9\ncpu0 1"])
    monkeypatch.setattr(bench_plan, "Path", lambda name: stat if stat.write_text(next(contents)) else None)
    assert bench_plan.busy_share(0) == pytest.approx(0.3)
    monkeypatch.setattr(bench_plan, "Path", lambda name: tmp_path / "missing")
    assert bench_plan.busy_share(0) is None


def test_worker_reports_errors_and_death(tmp_path: Path) -> None:
    with pytest.raises(BilevelError, match="is not a bundle"):
        Worker(Side, SideSpec(tmp_path, False, 1, 8), threads=1)
    worker = Worker(CeilingMeter, 1, threads=1)
    worker._process.kill()
    with pytest.raises(BilevelError, match="ended with status -9 .*--contexts"):
        worker.call("measure")
    worker.close()


def test_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 positions, 20 of them for two bursts and 4 for the check: 72 whole-block tokens are the most."""
    plan = BenchPlan(load_bundle(write_bundle(tmp_path)), (), decode_steps=16, has_twin=False)
    assert plan.longest == 72
    assert choose_contexts(plan, None)[0] == (72,), "no default fits, so the longest that does"
    assert set(choose_contexts(plan, None)[1]) == {2048, 8192, 32768, 131072}
    assert choose_contexts(plan, (8, 72)) == ((8, 72), {})
    with pytest.raises(RequestError, match="80 tokens cannot be measured: the model's 100 positions leave room for 72"):
        choose_contexts(plan, (80,))
    monkeypatch.setattr(bench_plan, "available_memory", lambda: 1000)
    with pytest.raises(RequestError, match="it needs about 0.3 GiB and 0.0 GiB are free"):
        choose_contexts(plan, (8,))
    with pytest.raises(RequestError, match="100 positions leave no room .* lower --decode-steps"):
        choose_contexts(BenchPlan(plan.bundle, (), decode_steps=96, has_twin=False), None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either a BUNDLE or --geometry"),
        (["b", "--geometry", "small"], "give either a BUNDLE or --geometry"),
        (["b", "--weights", "int4"], "--weights int4 goes with --geometry"),
        (["b", "--no-prefill", "--max-prefill", "4k"], "--max-prefill 4096 contradicts --no-prefill"),
        (["b", "--decode-steps", "0"], "--decode-steps 0 must be at least 1"),
        (["b", "--threads", "-1"], "--threads -1 must be at least 0"),
        (["b", "--plot", "x.pdf"], "must end in .png or .svg"),
        (["b", "--plot", "/nowhere/x.png"], "the folder /nowhere does not exist"),
        (["b"], "b is not a bundle"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_lengths() -> None:
    assert cli_bench.parse_length("2k") == 2048 and cli_bench.parse_length("100") == 100
    for text in ("0", "k", "2m", "-1", ""):
        with pytest.raises(cli_bench.argparse.ArgumentTypeError, match="is no number of tokens"):
            cli_bench.parse_length(text)


def test_dense_bundle_is_measured_alone(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = exported("dense")
    assert main(["bench", str(bundle)]) == 2
    assert "holds a dense model, which has no dense twin; measure it alone with --no-twin" in capsys.readouterr().err


def test_bundle_without_twin_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(write_bundle(tmp_path))]) == 2
    assert "has no dense twin" in capsys.readouterr().err


def test_geometry_needs_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert main(["bench", "--geometry", "small"]) == 2
    assert "takes the exporter" in capsys.readouterr().err


def test_geometry_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call finds the first one's bundle in the cache folder; other weights are another bundle."""
    from bilevel.export.decoder import geometries

    made = []

    def make_bundle(name: str, bundle: Path, weights: str, on_stage: Callable[[str], None]) -> None:
        made.append((name, weights))
        bundle.mkdir(parents=True)
        (bundle / "bundle.json").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(geometries, "make_bundle", make_bundle)
    first = cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None)
    assert cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None) == first and first.is_relative_to(tmp_path)
    other = cli_bench.geometry_bundle("tiny", "int4", lambda stage: None)
    assert other != first and made == [("tiny", "fp32"), ("tiny", "int4")]
    monkeypatch.setattr(cli_bench, "_exporter_digest", lambda: "0123")
    assert cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None).name == "tiny-fp32-0123"
    assert not first.exists() and other.exists(), "what an earlier exporter wrote is of no use"


def test_geometries_of_both_sides_agree() -> None:
    from bilevel.export.decoder.geometries import GEOMETRIES

    assert tuple(GEOMETRIES) == cli_bench.GEOMETRIES
    assert GEOMETRIES["small"].max_position_embeddings >= 131072 + 1024
