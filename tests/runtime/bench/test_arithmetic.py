"""What ``bilevel bench`` calculates: spreads and ratios, times by part, least times, which contexts fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.bundle.format import load_bundle
from bilevel.errors import RequestError
from bilevel.runtime.bench import plan as bench_plan
from bilevel.runtime.bench.measure import relative_error
from bilevel.runtime.bench.plan import DENSE, ROUTED, BenchPlan, Case, SideResult, Spread, choose_contexts
from bilevel.runtime.bench.profile import PARTS, read_profile, split_call
from bilevel.runtime.bench.report import decode_parts, save_plot
from bilevel.runtime.bench.roofline import READ_SIZES, Ceilings, Geometry, Work
from tests.doubles.bundle import write_bundle

Exported = Callable[..., tuple[Path, Path]]


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


def test_geometry_counts_packed_experts_and_gates_of_floats() -> None:
    experts = {"layers": [1], "intermediate_size": 6, "top_k": 2, "num_experts": 4, "n_group": 2, "group_score": "external"}
    with_experts, plain = ({**CONFIG, "experts": e} for e in (experts, {**experts, "top_k": 0}))
    for weights, each in (("fp32", 4), ("int8", 1 + 5 / 32), ("int4", 0.5 + 5 / 32)):
        more = Geometry(with_experts, weights).weight_bytes - Geometry(plain, weights).weight_bytes
        assert more == pytest.approx(CONFIG["hidden_size"] * 3 * 6 * 2 * each)


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
