"""What a client is told when something is wrong: a status, one sentence, and nothing about the machine."""

from __future__ import annotations

import logging
import reprlib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bilevel.errors import ContextTooLong, MissingDependency, Overloaded, RequestError, ShuttingDown
from bilevel.runtime.serve.refusal import ApiError

Validated = TypeVar("Validated", bound=BaseModel)
# Of a value of megabytes only the beginning is written.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_LOG = logging.getLogger("bilevel.serve")
# Fields that may have several types, and what to give.
ALTERNATIVES = {
    "prompt": "a text, a list of token ids, or a list of texts or of such lists, and not empty",
    "stop": "a text of 1 to 200 characters, or a list of at most 16 such texts",
    "content": 'a text, or a list of {"type": "text", "text": ...}',
    "tool_choice": 'none, auto, required or {"type": "function", "function": {"name": ...}}',
}
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def as_api_error(error: Exception) -> ApiError:
    """Any exception as the client sees it. A fault of the server's own is logged, and the client learns no more of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        refused = ApiError(429, str(error), code="queue_full")
        refused.headers["Retry-After"] = str(error.retry_after)
        return refused
    if isinstance(error, ShuttingDown):
        refused = ApiError(503, str(error), code="shutting_down")
        refused.headers["Retry-After"] = "10"
        return refused
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="context_length_exceeded" if isinstance(error, ContextTooLong) else None)
    if isinstance(error, MissingDependency):
        return ApiError(501, str(error))
    if isinstance(error, HTTPException):
        known = {
            404: "there is nothing at this address; /openapi.json lists what there is",
            405: "this address takes no such method",
        }
        refused = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
        refused.headers.update(error.headers or {})
        return refused
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON of an error, in the shape that clients of the protocol at ``path`` read."""
    if path.startswith("/v2"):
        return {"error": error.message}
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


async def respond_with_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler."""
    answer = as_api_error(error)
    return JSONResponse(error_body(answer, request.url.path), answer.status, answer.headers)


def validated(model: type[Validated], body: bytes) -> Validated:
    """``body`` as a ``model``. Raises ApiError naming the first field that is wrong, and its value."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise first_problem(error) from None


def first_problem(error: ValidationError) -> ApiError:
    """The first field that is wrong, and its value."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2] or first['msg']}")
    places = [str(part) for part in first["loc"]]
    if not places:
        return ApiError(400, "the body must be one JSON object")
    # Of a field that may have several types, the errors say what each of them lacks; the reader needs the choice.
    union = next((index for index, place in enumerate(places) if place in ALTERNATIVES and index + 1 < len(places)), None)
    if union is not None:
        name = ".".join(places[: union + 1])
        return ApiError(400, f"{name} must be {ALTERNATIVES[places[union]]}", param=name)
    name = ".".join(places)
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing; give it", param=name)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is nothing that this server knows; leave it out", param=name)
    return ApiError(400, f"{name}={_shown(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=name)


def _shown(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
