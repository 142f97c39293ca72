"""`LimitedRoute`: routes whose requests are limited from their headers to the last byte of the response."""

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
from aria.serve.request_body import receive_json
from aria.serve.streaming import ClientDisconnectError


class LimitedRoute(APIRoute):
    """A route whose requests have a JSON body. It needs ``service`` and ``active_requests`` in the state of the app."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        state = scope["app"].state
        settings = state.service.settings
        received = False
        try:
            with state.active_requests.admit(scope["state"]["context"].client) as request:
                async with request.deadline(settings.request_seconds):
                    reader = await receive_json(Headers(scope=scope), receive, settings, request)
                    received = True
                    request.start()
                    scope["state"]["reader"] = reader
                    await super().handle(scope, receive, send)
        except ClientDisconnectError:
            return
        except ApiError as error:
            if not received:
                # The rest of the body is not read.
                error.headers = {**(error.headers or {}), "Connection": "close"}
            raise

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a body that has already been received."""
        handler = super().get_route_handler()
        assert self.body_field is not None, "a limited route has a body"
        kind: Any = self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            return await handler(_Received(request, kind))

        return handle


class _Received(Request):
    """A request whose body was received by :meth:`LimitedRoute.handle`; its JSON is an instance of the model."""

    def __init__(self, request: Request, kind: type[BaseModel]):
        super().__init__(request.scope, request.receive)
        self._kind = kind

    async def body(self) -> bytes:
        """A placeholder for the body."""
        return b"{}"

    async def json(self) -> Any:
        """The body as an instance of its model."""
        reader: JsonReader = self.scope["state"].pop("reader")

        def read() -> BaseModel:
            try:
                return self._kind.model_validate(reader.parse())
            except ValidationError as error:
                raise from_validation(error.errors(include_url=False)) from None

        if reader.received == 0:
            raise ApiError(400, "the body is empty; expected a JSON object", code="missing_field")
        return await self.app.state.service.read(read)
