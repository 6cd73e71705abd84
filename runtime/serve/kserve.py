"""The Open Inference Protocol, version 2 (KServe, Triton): text or token ids in, token ids and text out; JSON or bytes.

Inputs, one of:  text BYTES [batch] · input_ids INT64 or INT32 [batch, tokens], padded on the right with -1
Outputs:         output_ids INT64 [batch, tokens], padded with -1 · text BYTES [batch] · finish_reason BYTES [batch]
How to generate stands in the request's parameters, with the names and defaults of ``bilevel run``.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import bilevel
from bilevel.errors import ContextTooLong
from bilevel.runtime.schedule.jobs import TextJob
from bilevel.runtime.serve.answers import AnswerChoice, Answers
from bilevel.runtime.serve.http import unless_gone
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.schemas import InferRequest, InputTensor
from bilevel.runtime.serve.service import Service

VERSION, LENGTH_HEADER = "1", "Inference-Header-Content-Length"
OUTPUTS = {"output_ids": "INT64", "text": "BYTES", "finish_reason": "BYTES"}
_WHOLE: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}


async def describe_server(request: Request) -> Response:
    """GET /v2."""
    return JSONResponse({"name": "bilevel", "version": bilevel.__version__, "extensions": ["binary_tensor_data"]})


async def live(request: Request) -> Response:
    """GET /v2/health/live."""
    service: Service = request.app.state.service
    return JSONResponse({"live": service.scheduler.is_alive}, 200 if service.scheduler.is_alive else 503)


async def ready(request: Request) -> Response:
    """GET /v2/health/ready: not while the server shuts down."""
    scheduler = request.app.state.service.scheduler
    is_ready = scheduler.is_alive and not scheduler.is_closing
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


async def model_ready(request: Request) -> Response:
    """GET /v2/models/{model}/ready."""
    _check(request)
    return await ready(request)


async def describe_model(request: Request) -> Response:
    """GET /v2/models/{model}."""
    service = _check(request)
    inputs = [("text", "BYTES", [-1]), ("input_ids", "INT64", [-1, -1])]
    outputs = [(name, kind, [-1, -1] if name == "output_ids" else [-1]) for name, kind in OUTPUTS.items()]
    ports = [[{"name": name, "datatype": kind, "shape": shape} for name, kind, shape in each] for each in (inputs, outputs)]
    content = {"name": service.name, "versions": [VERSION], "platform": f"bilevel_{service.backend}"}
    return JSONResponse({**content, "inputs": ports[0], "outputs": ports[1]})


async def infer(request: Request) -> Response:
    """POST /v2/models/{model}/infer."""
    service = _check(request)
    body = await service.body(request, "application/json", "application/octet-stream", "")  # Triton's client names none
    head, data = _split(body, request.headers.get(LENGTH_HEADER))
    asked = await service.read(InferRequest, head)
    wanted = _wanted(asked)
    prompts = await service.encode(_prompts(service, asked, data))
    client, room = service.access.client(request), service.scheduler.row_tokens
    jobs = [
        TextJob(prompt, asked.parameters.params(len(prompt), room), client=client, stream=stream)
        for stream, prompt in enumerate(prompts)
    ]
    choices = await unless_gone(request, Answers(service.scheduler, jobs, service.tokenizer).finish())
    return _respond(service, asked, wanted, choices)


def _check(request: Request) -> Service:
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    if (version := request.path_params.get("version", VERSION)) != VERSION:
        raise ApiError(404, f"the model has no version {version[:20]!r}, only {VERSION}")
    return service


def _split(body: bytes, length: str | None) -> tuple[bytes, bytes]:
    """The JSON and the tensors' bytes behind it."""
    if length is None:
        return body, b""
    if not (length.isascii() and length.isdecimal()) or len(length) > 12 or int(length) > len(body):
        raise ApiError(
            400, f"{LENGTH_HEADER}={length[:20]} must be the length of the JSON at the start of a body of {len(body)} bytes"
        )
    return body[: int(length)], body[int(length) :]


def _wanted(asked: InferRequest) -> dict[str, bool]:
    """{output: whether as bytes}."""
    default = asked.parameters.binary_data_output
    if asked.outputs is None:
        return dict.fromkeys(OUTPUTS, default)
    for each in asked.outputs:
        if each.name not in OUTPUTS:
            raise ApiError(400, f"there is no output {each.name[:60]!r}; the outputs are {', '.join(OUTPUTS)}")
    chosen = {each.name: each.parameters.binary_data for each in asked.outputs}
    return {name: default if is_binary is None else is_binary for name, is_binary in chosen.items()}


def _prompts(service: Service, asked: InferRequest, data: bytes) -> list[str | list[int]]:
    """The prompts of the one input; nothing is made of a shape before its sizes are known to be in bounds."""
    tensor, others = asked.inputs[0], asked.inputs[1:]
    if others or (tensor.name, tensor.datatype == "BYTES") not in (("text", True), ("input_ids", False)):
        given = ", ".join(f"{each.name[:40]} {each.datatype}" for each in asked.inputs[:4])
        raise ApiError(
            400, f"the inputs are {given}; give one: text BYTES [batch], or input_ids INT64 or INT32 [batch, tokens]"
        )
    if (rank := len(tensor.shape)) != (1 if tensor.name == "text" else 2):
        raise ApiError(400, f"{tensor.name} has {rank} axes; text has one, input_ids has two")
    service.check_count(tensor.shape[0])
    if rank == 2 and tensor.shape[1] > service.scheduler.row_tokens:
        raise ContextTooLong(
            f"{tensor.name} is {tensor.shape[1]} tokens wide, but this server holds {service.scheduler.row_tokens}; cut it"
        )
    values = _values(tensor, data)
    if (count := math.prod(tensor.shape)) != len(values):
        raise ApiError(
            400, f"{tensor.name} has the shape {tensor.shape}, which is {count} values, and {len(values)} were given"
        )
    if tensor.name == "text":
        return values
    width = tensor.shape[1]
    return [_unpadded(values[line * width : (line + 1) * width]) for line in range(tensor.shape[0])]


def _unpadded(ids: list[int]) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == -1:
        end -= 1
    return ids[:end]


def _values(tensor: InputTensor, data: bytes) -> list[Any]:
    """A tensor's values, flat, from JSON or from the bytes behind it."""
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None) or (size or 0) != len(data):
        raise ApiError(
            400, f"{tensor.name} needs either data or a binary_data_size that is the {len(data)} bytes behind the JSON"
        )
    if tensor.data is not None:
        return _flat(tensor)
    if tensor.datatype == "BYTES":
        return _texts(data, tensor.shape[0])
    kind = _WHOLE[tensor.datatype]
    if len(data) % kind.itemsize:
        raise ApiError(400, f"{tensor.name} has {len(data)} bytes, which are no whole numbers of {kind.itemsize} bytes")
    ids: list[int] = np.frombuffer(data, kind).tolist()
    return list(ids)


def _flat(tensor: InputTensor) -> list[Any]:
    """The values of nested or flat JSON data, checked."""
    values: list[Any] = tensor.data or []
    if values and isinstance(values[0], list):
        if not all(isinstance(line, list) for line in values):
            raise ApiError(400, f"{tensor.name} mixes lists and values; nest all rows or none")
        values = [value for line in values for value in line]
    kind = str if tensor.datatype == "BYTES" else int
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**31):
            raise ApiError(400, f"{tensor.name} holds {repr(value)[:60]}, which is no {'text' if kind is str else 'token id'}")
    return values


def _texts(data: bytes, count: int) -> list[str]:
    """Texts, each behind its length in 4 bytes, the lowest first; at most one more than ``count``, which there should be."""
    texts: list[str] = []
    place = 0
    try:
        while place < len(data) and len(texts) <= count:
            end = place + 4 + int.from_bytes(data[place : place + 4], "little")
            if place + 4 > len(data) or end > len(data):
                raise ApiError(400, f"text {len(texts)} ends behind the last of {len(data)} bytes")
            texts.append(data[place + 4 : end].decode("utf-8"))
            place = end
    except UnicodeDecodeError:
        raise ApiError(400, f"text {len(texts)} is not UTF-8; encode it so") from None
    return texts


def _respond(service: Service, asked: InferRequest, wanted: dict[str, bool], choices: list[AnswerChoice]) -> Response:
    ids: NDArray[np.int64] = np.full((len(choices), max(len(choice.token_ids) for choice in choices)), -1, "<i8")
    for line, choice in zip(ids, choices, strict=True):
        line[: len(choice.token_ids)] = choice.token_ids
    texts = {"text": [c.text for c in choices], "finish_reason": [str(c.finish_reason) for c in choices]}
    outputs, tail = [], b""
    for name, is_binary in wanted.items():
        shape = list(ids.shape) if name == "output_ids" else [len(choices)]
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape}
        if is_binary:
            raw = ids.tobytes() if name == "output_ids" else b"".join(map(_packed, texts[name]))
            output["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            output["data"] = ids.ravel().tolist() if name == "output_ids" else texts[name]
        outputs.append(output)
    head = {"model_name": service.name, "model_version": VERSION, **({} if asked.id is None else {"id": asked.id})}
    content = json.dumps({**head, "outputs": outputs}, ensure_ascii=False).encode()
    if not tail:
        return Response(content, media_type="application/json")
    return Response(content + tail, media_type="application/octet-stream", headers={LENGTH_HEADER: str(len(content))})


def _packed(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(4, "little") + raw
