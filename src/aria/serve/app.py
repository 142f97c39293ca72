"""`create_app`: the routes."""

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
from aria.serve import adapters, errors, tokens
from aria.serve.adapters import LoadAdapterRequest, UnloadAdapterRequest
from aria.serve.answers import respond
from aria.serve.exchange import CLIENT_GONE, ExchangeMiddleware
from aria.serve.limits import Gate
from aria.serve.page import Page
from aria.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from aria.serve.replies import (
    ChatCompletion,
    Completion,
    Detokenized,
    Error,
    ModelCard,
    ModelList,
    ResponseObject,
    Status,
    TokenizerInfo,
    Tokens,
    Version,
)
from aria.serve.responses_body import ResponsesRequest
from aria.serve.route import WorkRoute
from aria.serve.service import Service
from aria.serve.settings import ServerSettings
from aria.serve.streaming import ClientGoneError, until_gone
from aria.serve.traffic import Traffic

_MEANINGS = {
    400: "The body, or a medium it names, is not what was expected.",
    401: "The key is missing or wrong.",
    404: "There is no such model or adapter.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not application/json, or compressed in another way than gzip.",
    421: "The header Host has a name that is not the server's.",
    429: "Too many requests of this key at a time.",
    500: "The server failed.",
    503: "The queue is full, the server is about to end, or its model fails at every step or hangs in one.",
    504: "The request took longer than the server allows.",
}


def create_app(engine: AsyncEngine, settings: ServerSettings | None = None) -> FastAPI:
    """The server as an ASGI app.

    Args:
        engine: answers; whoever made it closes it, after the app.
        settings: limits, keys and names.

    ``app.state.traffic`` is its :class:`~aria.serve.traffic.Traffic`, ``app.state.service`` its
    :class:`~aria.serve.service.Service`.
    """
    settings = settings or ServerSettings()
    service = Service(engine, settings)
    service.processor.media = settings.media
    traffic = Traffic(engine.max_batch + settings.max_queue, settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="Aria", version="1", docs_url=None, redoc_url=None, lifespan=life, redirect_slashes=False)
    app.state.service, app.state.traffic = service, traffic
    for routes in (_answers(service), _tokens(service), _state(service, traffic)):
        app.include_router(routes)
    if settings.allow_adapter_updates:
        app.include_router(_adapters(service))
    app.router.default = Page()
    errors.install(app)
    described = app.openapi
    app.openapi = lambda: _without_422(described())  # type: ignore[method-assign]
    app.add_middleware(Gate, settings=settings, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            # OpenAI's JavaScript client describes itself in a dozen headers, and frameworks add their own.
            allow_headers=["*"],
            # The operator allowed the origin: also where the server's network is not the page's.
            allow_private_network=True,
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(ExchangeMiddleware)  # outside of all others: preflights are requests, too
    if settings.trusted_proxies:
        networks = [str(ip_network(proxy, strict=False)) for proxy in settings.trusted_proxies]
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=networks)
    return app


def _without_422(description: dict[str, Any]) -> dict[str, Any]:
    """FastAPI describes answers that it would give to wrong bodies; here they are 400s of OpenAI's shape."""
    for methods in description["paths"].values():
        for route in methods.values():
            route["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
    return description


def _said(*statuses: int) -> dict[int | str, dict[str, Any]]:
    every = sorted({400, 401, 421, 500, *statuses})
    return {status: {"model": Error, "description": _MEANINGS[status]} for status in every}


_WORK = _said(404, 408, 413, 415, 429, 503, 504)
_EVENTS = {"text/event-stream": {"schema": {"description": "Server-sent events."}}}
_ANSWERS = {**_WORK, 200: {"description": "The answer; a stream of events with stream: true.", "content": _EVENTS}}


def _answers(service: Service) -> APIRouter:
    """What the model writes."""
    routes = APIRouter(route_class=WorkRoute)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        return await _unless_gone(request, respond(service, "/v1/chat/completions", body, request.state.exchange))

    @routes.post("/v1/completions", response_model=Completion, responses=_ANSWERS)
    async def plain_completions(body: CompletionRequest, request: Request) -> Any:
        """Go on with a text."""
        return await _unless_gone(request, respond(service, "/v1/completions", body, request.state.exchange))

    @routes.post("/v1/responses", response_model=ResponseObject, responses=_ANSWERS)
    async def responses(body: ResponsesRequest, request: Request) -> Any:
        """Answer a conversation, in OpenAI's newer form. Nothing is kept."""
        return await _unless_gone(request, respond(service, "/v1/responses", body, request.state.exchange))

    return routes


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await until_gone(request, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)


def _tokens(service: Service) -> APIRouter:
    """What prompts cost."""
    routes = APIRouter(route_class=WorkRoute)

    @routes.post("/tokenize", response_model=Tokens, response_model_exclude_none=True, responses=_ANSWERS)
    async def tokenize(body: TokenizeRequest, request: Request) -> Any:
        """Tokens of a text or a conversation, with the cost of every medium in it."""
        service.model(body.model)
        answer = tokens.stream if body.stream else tokens.count
        return await _unless_gone(request, answer(service, body, request.state.exchange))

    @routes.post("/detokenize", response_model=Detokenized, responses=_WORK)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of tokens."""
        service.model(body.model)
        return await tokens.text(service, body)

    return routes


def _adapters(service: Service) -> APIRouter:
    """Adapters while the server runs."""
    routes = APIRouter(route_class=WorkRoute)
    options: dict[str, Any] = {"response_class": PlainTextResponse, "responses": _WORK}

    @routes.post("/v1/load_lora_adapter", **options)
    async def load_adapter(body: LoadAdapterRequest) -> Any:
        """Load an adapter under a name."""
        return await adapters.load(service, body)

    @routes.post("/v1/unload_lora_adapter", **options)
    async def unload_adapter(body: UnloadAdapterRequest) -> Any:
        """Unload an adapter. Requests that have it are answered to their end."""
        return await adapters.unload(service, body)

    return routes


def _state(service: Service, traffic: Traffic) -> APIRouter:
    """What is here, and how it is doing."""
    routes = APIRouter()

    def card(name: str) -> ModelCard:
        root = service.settings.model_names[0]
        parent = None if service.adapter(name) is None else root
        length = service.defaults.max_model_len
        return ModelCard(id=name, created=service.created, root=root, parent=parent, max_model_len=length)

    @routes.get("/v1/models", response_model=ModelList, responses=_said())
    async def models() -> Any:
        """The models that answer here: the model by its names, then its adapters."""
        return ModelList(data=[card(name) for name in service.models])

    @routes.get("/v1/models/{name:path}", response_model=ModelCard, responses=_said(404))
    async def model(name: str) -> Any:
        """One of them."""
        return card(service.model(name))

    @routes.get("/tokenizer_info", response_model=TokenizerInfo, responses=_said())
    async def tokenizer_info() -> Any:
        """Special tokens and the chat template, as in vLLM."""
        return tokens.info(service)

    @routes.get("/health", response_model=Status, responses=_said(503))
    async def health() -> Any:
        """Whether the server lives and its model answers."""
        if not await service.healthy():
            raise errors.ApiError(503, service.ailment, code="unhealthy")
        return Status(status="ok")

    @routes.get("/version", response_model=Version, responses=_said())
    async def version() -> Any:
        """The version of this package."""
        return Version(version=version_of("aria-moe"))

    @routes.get("/ready", response_model=Status, responses=_said(503))
    async def ready() -> Any:
        """Whether it takes new work."""
        if traffic.draining:
            raise errors.overloaded("the server is about to end", wait=5)
        if service.hanging:
            raise errors.overloaded(service.ailment, wait=5)
        return Status(status="ready")

    @routes.get("/metrics", response_class=PlainTextResponse, responses=_said())
    async def metrics() -> Any:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
