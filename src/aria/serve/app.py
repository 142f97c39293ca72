"""`create_app`: the server's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version as version_of
from ipaddress import ip_network
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from aria.engine import AsyncEngine
from aria.serve import adapters, errors, tokenization
from aria.serve.active_requests import ActiveRequests
from aria.serve.adapters import LoadAdapterRequest, UnloadAdapterRequest
from aria.serve.admission import AdmissionMiddleware
from aria.serve.chat_page import ChatPage
from aria.serve.endpoints import respond
from aria.serve.limited_route import LimitedRoute
from aria.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from aria.serve.request_context import CLIENT_DISCONNECTED, RequestContextMiddleware
from aria.serve.response_models import (
    ChatCompletion,
    CompletionObject,
    Detokenized,
    ErrorObject,
    ModelCard,
    ModelList,
    ResponseObject,
    StatusObject,
    TokenizerInfo,
    Tokens,
    Version,
)
from aria.serve.responses_protocol import ResponsesRequest
from aria.serve.service import Service
from aria.serve.settings import ServerSettings
from aria.serve.streaming import ClientDisconnectError, until_disconnect

_DESCRIPTIONS = {
    400: "The body or one of its media is invalid.",
    401: "The API key is missing or wrong.",
    404: "No such model or adapter.",
    408: "The body was not received in time.",
    413: "The body is too large.",
    415: "The body is not application/json, or its encoding is not gzip.",
    421: "The host name in the Host header is not allowed.",
    429: "Too many concurrent requests for this API key.",
    500: "Internal server error.",
    503: "The queue is full, the server is shutting down, or the model fails or hangs.",
    504: "The request exceeded the time limit.",
}


def create_app(engine: AsyncEngine, settings: ServerSettings | None = None) -> FastAPI:
    """Create the server as an ASGI app.

    Args:
        engine: Runs the model. The caller closes it, after the app.
        settings: Names, keys and limits.

    ``app.state.active_requests`` is its :class:`~aria.serve.active_requests.ActiveRequests`, ``app.state.service`` its
    :class:`~aria.serve.service.Service`.
    """
    settings = settings or ServerSettings()
    service = Service(engine, settings)
    service.processor.media = settings.media
    active_requests = ActiveRequests(engine.max_batch + settings.max_queue, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="Aria", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service, app.state.active_requests = service, active_requests
    for routes in (_answers(service), _tokens(service), _state(service, active_requests)):
        app.include_router(routes)
    if settings.allow_adapter_updates:
        app.include_router(_adapters(service))
    app.router.default = ChatPage()
    errors.install(app)
    openapi = app.openapi
    app.openapi = lambda: _without_422(openapi())  # type: ignore[method-assign]
    app.add_middleware(AdmissionMiddleware, settings=settings, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            # OpenAI's JavaScript client sends a dozen headers of its own, and frameworks add more.
            allow_headers=["*"],
            # An allowed origin may also be outside the server's private network.
            allow_private_network=True,
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestContextMiddleware)  # outermost: preflights are requests, too
    if settings.trusted_proxies:
        networks = [str(ip_network(proxy, strict=False)) for proxy in settings.trusted_proxies]
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=networks)
    return app


def _without_422(description: dict[str, Any]) -> dict[str, Any]:
    """Remove FastAPI's response for invalid bodies; here it is a 400 in OpenAI's format."""
    for methods in description["paths"].values():
        for route in methods.values():
            route["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
    return description


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    every = sorted({400, 401, 421, 500, *statuses})
    return {status: {"model": ErrorObject, "description": _DESCRIPTIONS[status]} for status in every}


_WORK_RESPONSES = _error_responses(404, 408, 413, 415, 429, 503, 504)
_EVENT_STREAM = {"text/event-stream": {"schema": {"description": "Server-sent events."}}}
_ANSWER_RESPONSES = {
    **_WORK_RESPONSES,
    200: {"description": "The response; server-sent events with stream: true.", "content": _EVENT_STREAM},
}


def _answers(service: Service) -> APIRouter:
    """Routes that generate text."""
    routes = APIRouter(route_class=LimitedRoute)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ANSWER_RESPONSES)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Complete a conversation."""
        return await _unless_gone(request, respond(service, "/v1/chat/completions", body, request.state.context))

    @routes.post("/v1/completions", response_model=CompletionObject, responses=_ANSWER_RESPONSES)
    async def plain_completions(body: CompletionRequest, request: Request) -> Any:
        """Complete a prompt."""
        return await _unless_gone(request, respond(service, "/v1/completions", body, request.state.context))

    @routes.post("/v1/responses", response_model=ResponseObject, responses=_ANSWER_RESPONSES)
    async def responses(body: ResponsesRequest, request: Request) -> Any:
        """Complete a conversation, in OpenAI's newer interface. Nothing is stored."""
        return await _unless_gone(request, respond(service, "/v1/responses", body, request.state.context))

    return routes


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await until_disconnect(request, work)
    except ClientDisconnectError:
        return Response(status_code=CLIENT_DISCONNECTED)


def _tokens(service: Service) -> APIRouter:
    """Tokenization routes."""
    routes = APIRouter(route_class=LimitedRoute)

    @routes.post("/tokenize", response_model=Tokens, response_model_exclude_none=True, responses=_ANSWER_RESPONSES)
    async def tokenize(body: TokenizeRequest, request: Request) -> Any:
        """Tokenize a text or a conversation, with the token count of each medium."""
        service.model(body.model)
        answer = tokenization.stream if body.stream else tokenization.count
        return await _unless_gone(request, answer(service, body, request.state.context))

    @routes.post("/detokenize", response_model=Detokenized, responses=_WORK_RESPONSES)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """Decode tokens to text."""
        service.model(body.model)
        return await tokenization.text(service, body)

    return routes


def _adapters(service: Service) -> APIRouter:
    """Routes that load and unload adapters."""
    routes = APIRouter(route_class=LimitedRoute)
    options: dict[str, Any] = {"response_class": PlainTextResponse, "responses": _WORK_RESPONSES}

    @routes.post("/v1/load_lora_adapter", **options)
    async def load_adapter(body: LoadAdapterRequest) -> Any:
        """Load an adapter under a name."""
        return await adapters.load(service, body)

    @routes.post("/v1/unload_lora_adapter", **options)
    async def unload_adapter(body: UnloadAdapterRequest) -> Any:
        """Unload an adapter. Requests that use it are still finished."""
        return await adapters.unload(service, body)

    return routes


def _state(service: Service, active_requests: ActiveRequests) -> APIRouter:
    """Routes that report models, health and metrics."""
    routes = APIRouter()

    def card(name: str) -> ModelCard:
        root = service.settings.model_names[0]
        parent = None if service.adapter(name) is None else root
        length = service.defaults.max_model_len
        return ModelCard(id=name, created=service.created, root=root, parent=parent, max_model_len=length)

    @routes.get("/v1/models", response_model=ModelList, responses=_error_responses())
    async def models() -> Any:
        """List the model, under each of its names, and its adapters."""
        return ModelList(data=[card(name) for name in service.models])

    @routes.get("/v1/models/{name:path}", response_model=ModelCard, responses=_error_responses(404))
    async def model(name: str) -> Any:
        """Describe one model or adapter."""
        return card(service.model(name))

    @routes.get("/tokenizer_info", response_model=TokenizerInfo, responses=_error_responses())
    async def tokenizer_info() -> Any:
        """Special tokens and the chat template, as in vLLM."""
        return tokenization.info(service)

    @routes.get("/health", response_model=StatusObject, responses=_error_responses(503))
    async def health() -> Any:
        """Whether the server is alive and its model responds."""
        if not await service.healthy():
            raise errors.ApiError(503, service.unhealthy_reason, code="unhealthy")
        return StatusObject(status="ok")

    @routes.get("/version", response_model=Version, responses=_error_responses())
    async def version() -> Any:
        """The version of this package."""
        return Version(version=version_of("aria-moe"))

    @routes.get("/ready", response_model=StatusObject, responses=_error_responses(503))
    async def ready() -> Any:
        """Whether the server accepts new requests."""
        if active_requests.draining:
            raise errors.overloaded("the server is shutting down", wait=5)
        if service.hanging:
            raise errors.overloaded(service.unhealthy_reason, wait=5)
        return StatusObject(status="ready")

    @routes.get("/metrics", response_class=PlainTextResponse, responses=_error_responses())
    async def metrics() -> Any:
        """Metrics in Prometheus's format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
