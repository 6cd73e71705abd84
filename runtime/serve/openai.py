"""The endpoints that OpenAI's clients speak to: models, completions, chat; whole answers or events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bilevel.runtime.grammar.compiler import Compiled
from bilevel.runtime.schedule.jobs import TextJob
from bilevel.runtime.serve.answers import AnswerChoice, Answers, Piece
from bilevel.runtime.serve.errors import as_api_error, error_body
from bilevel.runtime.serve.format import ChatFormat, CompletionFormat, Format, prompt_blocks, usage
from bilevel.runtime.serve.http import EventStream, unless_gone
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.schemas import ChatRequest, CompletionRequest, Sampling, check_budget
from bilevel.runtime.serve.requests.structured import ToolUse, asks_for_structure, read_tools, read_wish
from bilevel.runtime.serve.service import Service
from bilevel.runtime.serve.tools.layouts import Layout
from bilevel.runtime.serve.tools.parser import CallParser

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each event


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [service.model_card()]})


async def show_model(request: Request) -> Response:
    """GET /v1/models/{model}."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    return JSONResponse(service.model_card())


async def complete(request: Request) -> Response:
    """POST /v1/completions."""
    service: Service = request.app.state.service
    asked = await service.read(CompletionRequest, await service.body(request))
    service.check_model(asked.model)
    prompts = await service.encode(_prompts(asked.prompt), asked.n or 1)
    compiled = await service.grammars.compile(lambda: read_wish(asked)) if asks_for_structure(asked) else None
    most = 16 if asked.max_tokens is None else None if asked.max_tokens == -1 else asked.max_tokens
    answers = _submit(service, request, asked, prompts, most, asked.logprobs, compiled)
    form = CompletionFormat(service.tokenizer, _header("cmpl", "text_completion", service), echo=bool(asked.echo))
    return await _answer(service, request, asked, answers, form)


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.app.state.service
    asked = await service.read(ChatRequest, await service.body(request))
    service.check_model(asked.model)
    answers, open_parser = await start_chat(service, request, asked)
    kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    form = ChatFormat(service.tokenizer, _header("chatcmpl", kind, service), open_parser)
    return await _answer(service, request, asked, answers, form)


async def start_chat(service: Service, request: Request, asked: ChatRequest) -> tuple[Answers, Callable[[], CallParser] | None]:
    """The answers to a chat, and what gives the reader of one answer's calls (None: there are none to read)."""
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, f"top_logprobs={asked.top_logprobs} goes with logprobs=true; give both", param="top_logprobs")
    for place, message in enumerate(asked.messages):
        if message.problem is not None:
            raise ApiError(400, f"messages.{place}: {message.problem}", param=f"messages.{place}")
    messages = [message.as_template_input() for message in asked.messages]
    use = read_tools(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    settings = _with_effort(service, asked)
    prompt = await service.encode_chat(messages, asked.chat_template, settings, use.tools)
    layout = service.tool_layout(asked.chat_template) if use.tools else None
    compiled = await _constrain(service, asked, use, layout)
    num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if most == 0:
        raise ApiError(400, "max_tokens=0 leaves no room for an answer; give at least 1", param="max_tokens")
    most = None if most == -1 else most
    answers = _submit(service, request, asked, [prompt], most, num_logprobs, compiled)
    names = [tool.name for tool in use.functions]
    return answers, None if layout is None else partial(CallParser, layout, names, service.tokenizer.special.values())


def _with_effort(service: Service, asked: ChatRequest) -> dict[str, Any] | None:
    """What the template sees besides the messages. Raises ApiError for a reasoning_effort that it does not know."""
    effort, settings = asked.reasoning_effort, dict(asked.chat_template_kwargs or {})
    if effort is None:
        return settings
    if service.template_knows(asked.chat_template, "reasoning_effort"):
        return {"reasoning_effort": effort, **settings}
    if effort != "none":
        message = f"reasoning_effort={effort}: this model's template knows of none; leave it out"
        raise ApiError(400, message, param="reasoning_effort")
    return {"enable_thinking": False, **settings}


async def _constrain(service: Service, asked: ChatRequest, use: ToolUse, layout: Layout | None) -> Compiled | None:
    """What the answers have to follow, None for nothing."""
    if layout is None:
        return await service.grammars.compile(lambda: read_wish(asked)) if asks_for_structure(asked) else None
    given, special = layout, service.tokenizer.special
    return await service.grammars.compile(
        lambda: use.wish(given, special, read_wish(asked) if asks_for_structure(asked) else None)
    )


def _prompts(prompt: str | list[Any]) -> Sequence[str | list[int]]:
    """One text, one list of token ids, or several of either."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _header(prefix: str, kind: str, service: Service) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": service.name}


def _submit(
    service: Service,
    request: Request,
    asked: Sampling,
    prompts: list[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
    compiled: Compiled | None,
) -> Answers:
    """Queue ``asked.n`` jobs for each prompt, choices in the order of the prompts."""
    count = asked.n or 1
    if asked.routes and not service.scheduler.gives_routes:
        why = "the engine" if service.scheduler.bundle.graph.routes is not None else "the graph"
        raise ApiError(
            400, f"routes=true: {why} that runs this model does not give its routes; leave routes out", param="routes"
        )
    client, echo = service.access.client(request), isinstance(asked, CompletionRequest) and bool(asked.echo)
    jobs = [
        TextJob(
            prompt,
            asked.params(check_budget(len(prompt), max_tokens or None, service.scheduler.row_tokens)),
            client=client,
            stream=stream,
            num_logprobs=logprobs,
            wants_routes=asked.routes,
            scores_prompt=echo and logprobs is not None,
            generates=max_tokens != 0,
            constraint=None if compiled is None else compiled.follow(),
        )
        for prompt in prompts
        for stream in range(count)
    ]
    return Answers(service.scheduler, jobs, service.tokenizer, asked.stops)


async def _answer(service: Service, request: Request, asked: Sampling, answers: Answers, form: Format) -> Response:
    if asked.stream:
        return EventStream(_events(service, request, asked, answers, form), answers.cancel)
    pieces: dict[AnswerChoice, list[Piece]] = {choice: [] for choice in answers.choices}

    async def collect() -> None:
        async for news in answers:
            for piece in news:
                pieces[piece.choice].append(piece)

    await unless_gone(request, collect())
    choices = [form.choice(choice, pieces[choice], asked.routes) for choice in answers.choices]
    content = {**form.header, "choices": choices, "usage": usage(answers.choices, asked.n or 1)}
    return JSONResponse(content)


def _event(content: Any) -> bytes:
    return b"data: " + _ENCODER.encode(content).encode() + b"\n\n"


async def _events(service: Service, request: Request, asked: Sampling, answers: Answers, form: Format) -> AsyncIterator[bytes]:
    """The chunks of a streamed answer."""
    wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
    extra = {"usage": None} if wants_usage else {}
    # What is the same in the event of every token is written once: a fast model makes a thousand a second.
    head, _, tail = _event({**form.header, "choices": [0], **extra}).rpartition(b"0")
    if asked.routes:
        bundle = service.scheduler.bundle
        size, routes = bundle.block_size, bundle.graph.routes
        blocks = [prompt_blocks(service.tokenizer, choice.job.prompt, size) for choice in answers.choices]
        layers = list(routes.layers) if routes else []
        yield _event({**form.header, "choices": [], "block_size": size, "prompt_blocks": blocks, "routed_layers": layers})
    for choice in answers.choices:
        if (opening := form.opening(choice)) is not None:
            yield _event({**form.header, "choices": [opening], **extra})
    try:
        async for pieces in answers:
            yield b"".join(head + _ENCODER.encode(form.chunk(piece)).encode() + tail for piece in pieces)
    except Exception as error:  # noqa: BLE001 - the status is out, so the error is an event
        yield _event(error_body(as_api_error(error), request.url.path))
        return
    if wants_usage:
        yield _event({**form.header, "choices": [], "usage": usage(answers.choices, asked.n or 1)})
    yield b"data: [DONE]\n\n"
