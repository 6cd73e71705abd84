"""The web application: which address leads where, keys, errors, metrics, the page. A thin skin over the scheduler."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bilevel.errors import BilevelError
from bilevel.runtime.serve import kserve, openai, responses
from bilevel.runtime.serve.errors import as_api_error, error_body, respond_with_error
from bilevel.runtime.serve.http import HeldBodies
from bilevel.runtime.serve.metrics import Metrics
from bilevel.runtime.serve.page.files import FILES, POLICY, page_routes
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.description import describe_api
from bilevel.runtime.serve.service import Service

MOST_BODIES = 16  # of the greatest length, that are received or answered at once
# Open without a key: they tell nothing but that a server is here. The page asks its user for the key.
_OPEN = (*FILES, "/openapi.json", "/v2/health/live", "/v2/health/ready")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Outermost: asks for the key before anything of a request is read, adds the headers, counts the answers."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics) -> None:
        self._app, self._service, self._metrics = app, service, metrics
        self._bodies = HeldBodies(MOST_BODIES * service.limits.max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_started = False

        async def send_more(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message["headers"], *_HEADERS]
                self._metrics.responded(message["status"])
            await send(message)

        receive, forget = self._bodies.counted(receive)
        try:
            self._service.access.check(Request(scope), asks_key=scope["path"] not in _OPEN)
            await self._app(scope, receive, send_more)
        except ClientDisconnect:
            pass  # the client has gone
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
            answer = as_api_error(error)
            if not is_started:
                await JSONResponse(error_body(answer, scope["path"]), answer.status, answer.headers)(scope, receive, send_more)
        finally:
            forget()


def create_app(service: Service, metrics: Metrics) -> ASGIApp:
    """The application that serves ``service``."""
    description = describe_api(service.name)

    async def show_api(request: Request) -> Response:
        return JSONResponse(description)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    model = "/v2/models/{model}"
    routes = [
        *page_routes(),
        Route("/openapi.json", show_api),
        Route("/metrics", show_metrics),
        Route("/v1/models", openai.list_models),
        Route("/v1/models/{model}", openai.show_model),
        Route("/v1/completions", openai.complete, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/responses", responses.respond, methods=["POST"]),
        Route("/v2", kserve.describe_server),
        Route("/v2/health/live", kserve.live),
        Route("/v2/health/ready", kserve.ready),
        *(
            route
            for prefix in (model, model + "/versions/{version}")
            for route in (
                Route(prefix, kserve.describe_model),
                Route(prefix + "/ready", kserve.model_ready),
                Route(prefix + "/infer", kserve.infer, methods=["POST"]),
            )
        ),
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    # Starlette's own stack would answer everything else as plain text; here Guard does, in the API's form.
    handlers = dict.fromkeys((ApiError, BilevelError, HTTPException), respond_with_error)
    app.middleware_stack = ExceptionMiddleware(app.router, handlers=handlers)
    app.state.service = service
    guard: ASGIApp = Guard(app, service, metrics)
    if not service.access.origins:
        return guard
    # What a browser asks before it lets a page of another origin in.
    return CORSMiddleware(
        guard,
        allow_origins=service.access.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # clients of the API send headers of their own
    )
