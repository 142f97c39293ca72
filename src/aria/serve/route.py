"""`WorkRoute`: routes that do work, each request within its limits from its headers to the last byte of its answer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from aria.serve.errors import ApiError, from_validation
from aria.serve.json_reader import JsonReader
from aria.serve.receive import receive_json
from aria.serve.streaming import ClientGoneError


class WorkRoute(APIRoute):
    """A route whose requests have a JSON body. The state of the app has its settings, traffic and service."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        state = scope["app"].state
        settings = state.service.settings
        received = False
        try:
            with state.traffic.work(scope["state"]["exchange"].client) as work:
                async with work.within(settings.request_seconds):
                    reader = await receive_json(Headers(scope=scope), receive, settings, work)
                    received = True
                    work.start()
                    scope["state"]["reader"] = reader
                    await super().handle(scope, receive, send)
        except ClientGoneError:
            return
        except ApiError as error:
            if not received:
                # Nobody reads the rest of it.
                error.headers = {**(error.headers or {}), "Connection": "close"}
            raise

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, for a body that has been received."""
        handler = super().get_route_handler()
        assert self.body_field is not None, "a route of work has a body"
        kind: Any = self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            return await handler(_Received(request, kind))

        return handle


class _Received(Request):
    """A request whose body was received by :meth:`WorkRoute.handle`; it is given as the model that it is read as."""

    def __init__(self, request: Request, kind: type[BaseModel]):
        super().__init__(request.scope, request.receive)
        self._kind = kind

    async def body(self) -> bytes:
        """Stands for the body."""
        return b"{}"

    async def json(self) -> Any:
        """The body, read as its model."""
        reader: JsonReader = self.scope["state"].pop("reader")

        def read() -> BaseModel:
            try:
                return self._kind.model_validate(reader.parse())
            except ValidationError as error:
                raise from_validation(error.errors(include_url=False)) from None

        if reader.received == 0:
            raise ApiError(400, "the body is empty; expected a JSON object", code="missing_field")
        return await self.app.state.service.read(read)
