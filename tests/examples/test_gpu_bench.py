"""examples/gpu_bench.py on the CPU, with the kernels in Triton's interpreter: every side runs and is described."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bilevel import gpu_kernels
from tests import ROOT
from tests.support.triton_calls import triton_launch

EXAMPLES = ROOT / "examples"
SMALL = [
    "--device",
    "cpu",
    "--geometries",
    "2/1/16",
    "--block-size",
    "2",
    "--coarse-topk",
    "4",
    "--topk",
    "3",
    "--batches",
    "1",
    "--route-dim",
    "8",
    "--seconds",
    "0",
]
SMALL += ["--dtype", "float32"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    assert triton_launch  # Triton's interpreter is set up before a kernel is loaded
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cpu"}))
    gpu_kernels._load.cache_clear()
    import gpu_bench

    with torch.no_grad(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield gpu_bench
    gpu_kernels._load.cache_clear()
    for name in ("gpu_bench", "gpu_clock", "gpu_sides", "gpu_roofline"):
        sys.modules.pop(name, None)


@pytest.mark.thorough
def test_a_small_run(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "bench.json"
    assert bench.main([*SMALL, "--contexts", "6", "--correlations", "0.5", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    assert [row["phase"] for row in told["rows"]] == ["decode", "prefill"]
    for row in told["rows"]:
        assert all(row["times_ms"][side]["median"] > 0 for side in ("coarse", "fine", "attention", "all", "dense", "flex")), row
        assert row["error"] < 1e-5 and row["times_dense"] > 0 and row["roofline_share"] > 0
    decode = told["rows"][0]
    # Keys and values of 3 blocks of 2 tokens, the last one full; q and output of two heads; one route.
    assert decode["bytes"] == (2 * 6 * 16 + 2 * 2 * 16) * 4 + 3 * 4
    assert decode["flops"] == decode["dense_flops"] == 2 * (4 * 16 * 6)
    assert "16 tokens keep" in printed and "decode at 4k: all takes at most 1.2 times as long as dense: not measured" in printed


def test_the_block_mask_holds_what_tiles_keep(bench: ModuleType) -> None:
    case = next(
        bench.cases(
            bench.parse(
                [
                    *SMALL,
                    "--geometries",
                    "2/1/16",
                    "--batches",
                    "2",
                    "--block-size",
                    "4",
                    "--contexts",
                    "136",
                    "--phases",
                    "prefill",
                ]
            )
        )
    )
    tensors = bench.make_tensors(case, torch.device("cpu"))
    routes = torch.randint(-1, 34, (2, 2, 136, 3), dtype=torch.int32).sort(-1).values
    mask, _ = sys.modules["gpu_sides"].block_mask(case, tensors, routes)
    dense = mask.to_dense()
    assert dense.shape == (2, 4, 2, 34)
    for b, h, i in ((0, 0, 5), (1, 3, 127), (1, 1, 130)):
        kept = {int(j) for row in routes[b, h // 2, i // 128 * 128 : i // 128 * 128 + 128] for j in row if j >= 0}
        assert dense[b, h, i // 128].nonzero().flatten().tolist() == sorted(kept)
        seen = [bool(mask.mask_mod(*map(torch.tensor, (b, h, i, token)))) for token in range(136)]
        assert seen == [token // 4 in routes[b, h // 2, i].tolist() and token <= i for token in range(136)]


def test_correlation_is_that_of_neighbours(bench: ModuleType) -> None:
    for correlation in (0.0, 0.9):
        x = sys.modules["gpu_sides"].correlated((1, 1, 4000, 8), correlation, torch.Generator().manual_seed(0), torch.float32)[
            0, 0
        ]
        assert abs(float((x[1:] * x[:-1]).mean()) - correlation) < 0.05 and abs(float(x.square().mean()) - 1) < 0.1


def test_wrong_results_are_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton_launch.run
    monkeypatch.setattr(triton_launch, "run", lambda op, *rest: run(op, *rest) * (2 if op.name == "RoutedAttention" else 1))
    with pytest.raises(SystemExit, match="gives wrong results .error 1.0e.00 of the largest value.; run make gpu-test"):
        bench.main([*SMALL, "--contexts", "16", "--phases", "decode", "--no-flex"])


def test_competitors_that_fail_are_told(bench: ModuleType) -> None:
    clock = bench.Clock(torch.device("cpu"), 0.0)
    case = next(bench.cases(bench.parse([*SMALL, "--contexts", "16"])))

    def fails(error: Exception) -> str:
        def work() -> None:
            raise error

        found = bench.rival(clock, case, lambda: work)
        assert found.median is None
        return str(found.note)

    assert fails(torch.OutOfMemoryError("CUDA out of memory")) == "out of memory"
    assert fails(RuntimeError("No available kernel\nmore")) == "No available kernel"
    assert fails(ValueError()) == "ValueError"


def test_goals_are_judged_by_the_worst_case(bench: ModuleType) -> None:
    def row(phase: str, context: int, **values: float | None) -> dict[str, object]:
        return {
            "phase": phase,
            "context": context,
            "times_dense": 7.0,
            "attention_times_dense": 21.0,
            "roofline_share": 0.61,
            **values,
        }

    rows = [row("decode", 131072), row("prefill", 131072), row("decode", 4096, times_dense=0.84), row("prefill", 4096)]
    assert [met for *_, met in bench.goals(rows)] == [True] * 5
    rows += [row("decode", 131072, attention_times_dense=None), row("prefill", 131072, times_dense=5.9)]
    assert [met for *_, met in bench.goals(rows)] == [True, True, False, True, True]
    rows += [row("decode", 131072, roofline_share=0.5, attention_times_dense=19.0), row("prefill", 4096, times_dense=0.8)]
    assert [met for *_, met in bench.goals(rows)] == [False] * 4 + [True]
    assert next(iter(bench.goals(rows)))[1] == "19.00 to 21.00 times as fast in 2 cases"
    assert [met for *_, met in bench.goals([])] == [None] * 5


def test_rooflines(bench: ModuleType) -> None:
    find = sys.modules["gpu_roofline"].find_roofline
    device = torch.device("cpu")
    assert find("NVIDIA H100 80GB HBM3", None, device).bandwidth == 3.35e12
    assert find("NVIDIA H200", None, device).bandwidth == 4.8e12
    assert find("NVIDIA L40", None, device).flops > find("NVIDIA L4", None, device).flops
    measured = find("some GPU", lambda work: 0.5, device)
    assert measured.bandwidth == 2 * 2**22 / 0.5 and measured.source.startswith("measured")


def test_bad_options(bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--contexts", "100"], "100 tokens are no multiple of --block-size 64"),
        (["--phases", "training"], "--phases takes decode and prefill, not training"),
    ):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2 and "sees no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cuda"}))
    assert bench.main(["--device", "cpu"]) == 2 and "there are no kernels for cpu" in capsys.readouterr().err
