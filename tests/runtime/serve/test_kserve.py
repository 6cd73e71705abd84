"""The Open Inference Protocol, judged by Triton's own HTTP client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tokenizers import Tokenizer

from tests.doubles.bundle import predict, write_bundle
from tests.support.http_server import NAME, RunningServer, running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata(NAME)
    assert [port["name"] for port in metadata["inputs"]] == ["text", "input_ids"]
    assert [port["name"] for port in metadata["outputs"]] == ["output_ids", "text", "finish_reason"]
    assert not client.is_model_ready("other")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", ["INT64", "INT32"])
def test_token_ids(client: triton.InferenceServerClient, binary: bool, datatype: str) -> None:
    """Rows of different lengths, as JSON and as bytes, in and out."""
    prompts = [[5, 6, 7, 8], [9]]
    ids = np.full((2, 4), -1, np.int64 if datatype == "INT64" else np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    tensor = triton.InferInput("input_ids", ids.shape, datatype)
    tensor.set_data_from_numpy(ids, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("output_ids", "finish_reason")]
    result = client.infer(NAME, [tensor], outputs=outputs, request_id="7", parameters={"max_tokens": 9})
    expected = [predict(prompt, 9) for prompt in prompts]
    found = result.as_numpy("output_ids")
    assert [[int(token) for token in row if token >= 0] for row in found] == expected
    assert {bytes(reason).decode() if binary else reason for reason in result.as_numpy("finish_reason")} <= {
        "length",
        "eos",
        b"length",
        b"eos",
    }
    assert result.get_response()["id"] == "7"
    assert result.as_numpy("text") is None


@pytest.mark.parametrize("binary", [True, False])
def test_texts(client: triton.InferenceServerClient, bundle: Path, binary: bool) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    prompts = ["def add(a, b):", "für 漢字 🦊"]
    tensor = triton.InferInput("text", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode() for prompt in prompts], np.object_), binary_data=binary)
    result = client.infer(NAME, [tensor], outputs=[triton.InferRequestedOutput("text", binary_data=binary)])
    found = [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("text")]
    assert found == [tokenizer.decode(predict(tokenizer.encode(prompt).ids, 128)) for prompt in prompts]


def test_all_outputs_as_bytes_by_one_parameter(client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("input_ids", [1, 2], "INT64")
    tensor.set_data_from_numpy(np.array([[5, 6]]))
    result = client.infer(NAME, [tensor], parameters={"max_tokens": 4})  # tritonclient then asks for all outputs as bytes
    assert result.as_numpy("output_ids").tolist() == [predict([5, 6], 4)]
    assert result.as_numpy("text").shape == (1,)


def ask(server: RunningServer, **changes: object) -> tuple[int, str]:
    tensor = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [5, 6], **changes}
    status, _, answer = server.request("POST", f"/v2/models/{NAME}/infer", {"inputs": [tensor]})
    return status, answer.get("error", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [1, 3]}, r"input_ids has the shape \[1, 3\], which is 3 values, and 2 were given"),
        ({"shape": [2]}, "input_ids has 1 axes; text has one, input_ids has two"),
        ({"shape": [2**30, 2**30]}, "are 1073741824 texts, this server takes 12"),
        ({"shape": [0, 2], "data": []}, "0 prompts with n=1 are 0 texts, this server takes 12; give between 1 and that"),
        ({"datatype": "FP32"}, "inputs.0.datatype='FP32'"),
        ({"name": "ids"}, "the inputs are ids INT64; give one: text BYTES"),
        ({"data": ["5", "6"]}, "input_ids holds '5', which is no token id"),
        ({"data": [5, True]}, "input_ids holds True"),
        ({"data": [5, 10**30]}, "input_ids holds 1000000000000000000000000000000"),
        ({"data": [[5], 6]}, "input_ids mixes lists and values"),
        ({"data": None}, "input_ids needs either data or a binary_data_size"),
        ({"parameters": {"binary_data_size": 16}}, "input_ids needs either data or a binary_data_size"),
        ({"data": [5, -2]}, "the prompt holds the token -2"),
        ({"data": [-1, -1]}, "the prompt is empty"),
    ],
)
def test_wrong_tensors_are_refused(server: RunningServer, changes: dict[str, object], message: str) -> None:
    status, error = ask(server, **changes)
    assert status == 400

    assert re.search(message, error), error
    assert server.scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("head", "tail", "length", "message"),
    [
        (16, b"\x05" + b"\0" * 15, "1" * 30, "must be the length of the JSON"),
        (16, b"\x05" + b"\0" * 15, "-3", "must be the length of the JSON"),
        (15, b"\x05" + b"\0" * 14, None, "are no whole numbers of 8 bytes"),
        (16, b"\x05", None, "needs either data or a binary_data_size that is the 1 bytes"),
    ],
)
def test_wrong_bytes_are_refused(server: RunningServer, head: int, tail: bytes, length: str | None, message: str) -> None:
    content = b'{"inputs":[{"name":"input_ids","shape":[1,2],"datatype":"INT64","parameters":{"binary_data_size":%d}}]}' % head
    headers = {"Inference-Header-Content-Length": length or str(len(content)), "Content-Type": "application/octet-stream"}
    status, _, answer = server.request("POST", f"/v2/models/{NAME}/infer", content + tail, headers)
    assert status == 400 and message in answer["error"], answer


def test_wrong_text_bytes_are_refused(server: RunningServer) -> None:
    for raw, message in (
        (b"\x09\0\0\0abc", "text 0 ends behind"),
        (b"\x01\0\0\0\xff", "text 0 is not UTF-8"),
        (b"\1", "text 0 ends"),
    ):
        content = b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":%d}}]}' % len(raw)
        headers = {"Inference-Header-Content-Length": str(len(content)), "Content-Type": "application/octet-stream"}
        status, _, answer = server.request("POST", f"/v2/models/{NAME}/infer", content + raw, headers)
        assert status == 400 and message in answer["error"], answer


def test_wrong_models_versions_and_outputs(server: RunningServer) -> None:
    assert server.request("GET", "/v2/models/other")[0] == 404
    assert server.request("GET", f"/v2/models/{NAME}/versions/2/ready")[2] == {"error": "the model has no version '2', only 1"}
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "outputs": [{"name": "logits"}]}
    status, _, answer = server.request("POST", f"/v2/models/{NAME}/infer", body)
    assert (status, answer["error"]) == (400, "there is no output 'logits'; the outputs are output_ids, text, finish_reason")
