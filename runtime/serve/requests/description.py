"""The OpenAPI description of a server."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import bilevel
from bilevel.runtime.serve.requests.responses import ResponseRequest
from bilevel.runtime.serve.requests.schemas import ChatRequest, CompletionRequest, InferRequest

_MODELS = (CompletionRequest, ChatRequest, ResponseRequest, InferRequest)
_ERRORS = {
    "400": "the request cannot be served as it is",
    "401": "the API key is missing or wrong",
    "404": "there is no such model",
    "408": "the body came too slowly",
    "413": "the body is too long",
    "415": "the content type or encoding is another than the one asked for",
    "429": "the queue is full; Retry-After says for how long to wait",
    "500": "the model failed on this request",
    "501": "this installation lacks a package that the request needs",
    "503": "the server is shutting down",
}


def describe_api(model: str) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of ``model``."""
    _, schemas = models_json_schema([(each, "validation") for each in _MODELS], ref_template="#/components/schemas/{model}")
    definitions = schemas["$defs"]
    for each in ("CompletionRequest", "ChatRequest", "ResponseRequest"):
        definitions[each]["properties"]["model"] = {"type": "string", "const": model}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "const": model}}
    paths = {
        "/v1/models": {"get": _operation("The model that is served")},
        "/v1/models/{model}": {"get": _operation("The model that is served", name)},
        "/v1/completions": {"post": _operation("Continue a prompt", body="CompletionRequest", stream=True)},
        "/v1/chat/completions": {"post": _operation("Answer a conversation", body="ChatRequest", stream=True)},
        "/v1/responses": {"post": _operation("Answer a conversation, as items", body="ResponseRequest", stream=True)},
        "/v2": {"get": _operation("The server and its protocol extensions")},
        "/v2/health/live": {"get": _operation("Whether the server works")},
        "/v2/health/ready": {"get": _operation("Whether the server takes requests")},
        "/v2/models/{model}": {"get": _operation("The model's tensors", name)},
        "/v2/models/{model}/ready": {"get": _operation("Whether the model takes requests", name)},
        "/v2/models/{model}/infer": {"post": _operation("Generate from text or token ids", name, body="InferRequest")},
        "/metrics": {"get": _operation("Numbers for Prometheus", kind="text/plain")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "bilevel serve", "version": bilevel.__version__},
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(
    summary: str, *parameters: dict[str, Any], body: str = "", stream: bool = False, kind: str = "application/json"
) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": {}}}
    if stream:
        content["text/event-stream"] = {
            "schema": {"description": "events; the data of each is a JSON object, of the last [DONE]"}
        }
    answer = {"description": "the answer", "content": content}
    codes = _ERRORS if body else {code: _ERRORS[code] for code in ("401", "404", "503")}
    error = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
    responses = {"200": answer, **{code: {"description": text, "content": error} for code, text in codes.items()}}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = list(parameters)
    if body:
        schema = {"schema": {"$ref": f"#/components/schemas/{body}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation
