"""``bilevel bench``: whole runs on tiny models, the sides that it measures, its refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from bilevel.bundle.tensors import decode, encode
from bilevel.errors import BilevelError
from bilevel.runtime.bench import plan as bench_plan
from bilevel.runtime.bench import report as bench_report
from bilevel.runtime.bench import roofline as bench_roofline
from bilevel.runtime.bench.measure import relative_error
from bilevel.runtime.bench.plan import DENSE, ROUTED
from bilevel.runtime.bench.profile import PARTS
from bilevel.runtime.bench.roofline import CeilingMeter
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
@pytest.mark.thorough
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


def test_worker_reports_errors_and_death(tmp_path: Path) -> None:
    with pytest.raises(BilevelError, match="is not a bundle"):
        Worker(Side, SideSpec(tmp_path, False, 1, 8), threads=1)
    worker = Worker(CeilingMeter, 1, threads=1)
    worker._process.kill()
    with pytest.raises(BilevelError, match="ended with status -9 .*--contexts"):
        worker.call("measure")
    worker.close()


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
    """The second call finds the first one's bundle in the cache folder; other weights or caches are another bundle."""
    from bilevel.export.decoder import geometries

    exports = []

    def make_bundle(name: str, bundle: Path, weights: str, on_stage: Callable[[str], None], caches: str) -> None:
        exports.append((name, weights, caches))
        bundle.mkdir(parents=True)
        (bundle / "bundle.json").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(geometries, "make_bundle", make_bundle)
    first = cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None)
    assert cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None) == first and first.is_relative_to(tmp_path)
    other = cli_bench.geometry_bundle("tiny", "int4", lambda stage: None)
    packed = cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None, "int8")
    assert len({first, other, packed}) == 3
    assert exports == [("tiny", "fp32", "fp32"), ("tiny", "int4", "fp32"), ("tiny", "fp32", "int8")]
    monkeypatch.setattr(cli_bench, "_exporter_digest", lambda: "0123")
    assert cli_bench.geometry_bundle("tiny", "fp32", lambda stage: None).name == "tiny-fp32-0123"
    assert not first.exists() and other.exists() and packed.exists(), "what an earlier exporter wrote is of no use"


def test_geometries_of_both_sides_agree() -> None:
    from bilevel.export.decoder.geometries import GEOMETRIES

    assert tuple(GEOMETRIES) == cli_bench.GEOMETRIES
    assert GEOMETRIES["small"].max_position_embeddings >= 131072 + 1024
