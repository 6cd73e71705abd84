"""The model repository for Triton Inference Server: its configuration in Triton's schema, and its use by a server."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from bilevel.errors import ExportError
from bilevel.export.decoder.triton_repository import write_repository
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams

NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32}


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's schema alone: the package around it wants gRPC."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kind(schema: ModuleType, tensor: Any) -> type:
    return NUMPY[schema.DataType.Name(tensor.data_type)]


class Sequence:
    """What Triton does for one sequence: states from zeros, batch axis added, reshaped inputs, outputs kept as states."""

    def __init__(self, schema: ModuleType, config: Any, folder: Path) -> None:
        self._config = config
        self._session = onnxruntime.InferenceSession(
            folder / "1" / config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        self._states = {
            state.input_name: np.zeros((1, *state.initial_state[0].dims), kind(schema, state))
            for state in config.sequence_batching.state
        }

    def infer(self, **tensors: np.ndarray) -> np.ndarray:
        for port in self._config.input:
            given = tensors[port.name]
            assert given.shape[0] == 1 and len(given.shape) == 1 + len(port.dims)
            assert all(size in (-1, found) for size, found in zip(port.dims, given.shape[1:], strict=True))
            if port.HasField("reshape"):
                tensors[port.name] = given.reshape(1, *port.reshape.shape)
        states = self._config.sequence_batching.state
        wanted = ["logits", *(state.output_name for state in states)]
        logits, *present = self._session.run(wanted, {**tensors, **self._states})
        self._states = {state.input_name: array for state, array in zip(states, present, strict=True)}
        return logits[0]


@pytest.mark.parametrize("preset", ["two_level", "dense"])
def test_a_server_that_obeys_the_configuration_generates_the_same(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path, schema: ModuleType, preset: str
) -> None:
    bundle = exported(preset)[1]
    folder = write_repository(bundle, tmp_path / "models", capacity=48, sequences=3)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert folder.name == config.name == bundle.name and config.backend == "onnxruntime" and config.max_batch_size == 1
    assert config.sequence_batching.oldest.max_candidate_sequences == 3
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert len(config.sequence_batching.state) == len(manifest["graph"]["state"])
    kept = {each["output"] for each in manifest["graph"]["state"]}
    assert [port.name for port in config.output] == [p["name"] for p in manifest["graph"]["outputs"] if p["name"] not in kept]
    prompt = list(range(2, 25))
    sequence, tokens, past = Sequence(schema, config, folder), list(prompt), 0
    while len(tokens) < len(prompt) + 12:
        new = np.array([tokens[past : past + 16]])
        lengths = {"past_len": np.array([[past]], np.int32), "new_len": np.array([[new.size]], np.int32)}
        logits = sequence.infer(input_ids=new, **lengths)
        past += new.size
        if past == len(tokens):
            tokens.append(int(logits.argmax()))
    expected = Generator(OnnxSession.open(bundle), None).generate([prompt], SamplingParams(max_tokens=12)).finish()[0].token_ids
    assert tokens[len(prompt) :][: len(expected)] == expected


def test_an_earlier_model_is_replaced_and_a_foreign_folder_is_not(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle = exported("dense")[1]
    for _ in range(2):
        folder = write_repository(bundle, tmp_path)
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["model.data", "model.onnx"]
    (folder / "config.pbtxt").unlink()
    with pytest.raises(ExportError, match="exists and is no model of Triton's"):
        write_repository(bundle, tmp_path)
    for wrong in (6, 100):
        with pytest.raises(ExportError, match=f"capacity={wrong} must be a multiple of block_size=4, at most the model's 96"):
            write_repository(bundle, tmp_path / "new", capacity=wrong)
    with pytest.raises(ExportError, match="sequences=0"):
        write_repository(bundle, tmp_path / "new", sequences=0)
