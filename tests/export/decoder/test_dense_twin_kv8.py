"""The dense twin with an int8 cache: the fp32 twin's logits up to the rounding, written in place, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bilevel.bundle.tensors import DTYPES
from bilevel.errors import ExportError
from bilevel.export.decoder.dense_twin_kv8 import cache_ranges, save_int8_cache

Exported = Callable[..., tuple[Path, Path]]
CAPACITY = 32
IDS = np.random.default_rng(0).integers(2, 250, 24)
CALLS = [(0, 9), (9, 10), (10, 11), (11, 20), (20, 24)]


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("two_level")[1], tmp_path / "bundle"))


def run(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [calls, vocab] and the caches, whose inputs and outputs share a buffer."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {kind.ort_name: kind.numpy for kind in DTYPES.values()}
    caches = {
        port.name: np.zeros((1, port.shape[1], CAPACITY, port.shape[3]), kinds[port.type])
        for port in session.get_inputs()
        if port.name.startswith("past.")
    }
    logits = []
    for first, last in CALLS:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", IDS[None, first:last])
        binding.bind_cpu_input("past_len", np.array([first], np.int32))
        binding.bind_cpu_input("new_len", np.array([last - first], np.int32))
        for name, cache in caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past.", "present."), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits.append(binding.copy_outputs_to_cpu()[-1][0])
    return np.stack(logits), caches


def test_int8_cache_gives_the_twins_logits(folder: Path) -> None:
    source, target = folder / "dense.onnx", folder / "dense_kv8.onnx"
    ranges = cache_ranges(source, IDS)
    weights = (folder / "model.data").read_bytes()
    save_int8_cache(source, target, ranges)
    assert (folder / "model.data").read_bytes() == weights, "the weights are shared"
    expected, floats = run(source)
    got, codes = run(target)
    assert 0 < np.abs(got - expected).max() <= 0.05 * np.abs(expected).max()
    assert codes.keys() == floats.keys() == ranges.keys()
    # Layer 0 reads the same tokens on both sides, so its cache differs by half a step and what is behind the text is untouched.
    for name in ("past.key.0", "past.value.0"):
        assert codes[name].dtype == np.int8 and not codes[name][:, :, len(IDS) :].any()
        assert np.abs(codes[name] * (ranges[name] / 127) - floats[name]).max() <= 0.501 * ranges[name] / 127
        assert np.abs(floats[name]).max() == pytest.approx(ranges[name], rel=1e-5)


def test_int8_cache_refusals(folder: Path, tmp_path: Path) -> None:
    source = folder / "dense.onnx"
    ranges = cache_ranges(source, IDS)
    with pytest.raises(ExportError, match="must lie beside .*dense.onnx, whose weights it reads"):
        save_int8_cache(source, tmp_path / "elsewhere.onnx", ranges)
    with pytest.raises(ExportError, match="the range of past.value.1 is not known; measure it with cache_ranges"):
        save_int8_cache(source, folder / "new.onnx", {n: r for n, r in ranges.items() if n != "past.value.1"})
    with pytest.raises(ExportError, match="has no GroupQueryAttention node.*give a dense twin"):
        save_int8_cache(folder / "model.onnx", folder / "new.onnx", ranges)
    assert not (folder / "new.onnx").exists()


def test_int8_cache_of_nothing_but_zeros(folder: Path) -> None:
    """A range of 0 gives a usable scale."""
    source = folder / "dense.onnx"
    model = save_int8_cache(source, folder / "new.onnx", dict.fromkeys(cache_ranges(source, IDS), 0.0))
    scales = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("past.")]
    assert scales and all(scale == 1 for scale in scales)
