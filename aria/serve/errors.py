"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the status that fits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_TAG = re.compile(r"<.*>|\[key\]")
"""What the unions of `protocol` call their members, and pydantic a key: no part of a field's place in the body."""

_UNSUPPORTED = ("unsupported_field", "unsupported_value")
"""Errors of a field by its name, which bodies raise as a whole; see `protocol.Body`."""


class ApiError(Exception):
    """Something to tell a client, with the HTTP status that goes with it.

    Args:
        status: HTTP status, 400 or more.
        message: a sentence for people.
        param: the field of the body that it is about, such as ``messages[0].content``.
        code: a word for programs, such as ``model_not_found``.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as an HTTP response."""
        # Escapes keep half a surrogate pair of somebody's field name from becoming an error of ours.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers=self.headers, media_type="application/json")


def unexpected(request_id: str) -> ApiError:
    """What a client is told of an error of ours: nothing but where to find it in the log."""
    return ApiError(500, f"the server failed on this request; its log tells why under {request_id}", code="internal")


def overloaded(message: str, *, status: int = 503, wait: int = 1) -> ApiError:
    """A refusal that holds for now only."""
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, code=code, headers={"Retry-After": str(wait)})


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What pydantic found wrong with a body, told by the name of the first field."""
    if not errors:
        return ApiError(400, "the body is not what this route takes")
    # A field that nobody knows is the clearest of several complaints about one place.
    error = next((one for one in errors if one["type"] in _UNSUPPORTED), errors[0])
    place = (*error["loc"], error["ctx"]["field"]) if error["type"] in _UNSUPPORTED else tuple(error["loc"])
    if place[:1] == ("body",):
        place = place[1:]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']} at character {place[0]}", code="bad_json")
    param = _name(tuple(part for part in place if not (isinstance(part, str) and _TAG.fullmatch(part))))
    return ApiError(400, _sentence(error, param or "the body"), param=param or None, code=_code(error["type"]))


def _code(kind: str) -> str:
    return kind if kind in _UNSUPPORTED else "missing_field" if kind == "missing" else "invalid_value"


def _sentence(error: Mapping[str, Any], field: str) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _UNSUPPORTED:
        return f"{field} {context['message']}"
    if kind == "missing":
        return f"{field} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = context.get("expected_tags", "").replace("<", "").replace(">", "")
        got = str(context.get("tag", "")).strip("<>")
        if not expected:
            return f"{field} is not of a kind that is known; expected an object that says it"
        return f"{field} is of a kind that is not supported{f', {got!r}' if got else ''}; expected one of {expected}"
    if kind == "value_error":
        return f"{field}: {context.get('error', error['msg'])}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{field} should be an object, but is {error.get('input')!r:.80}"
    got = "" if isinstance(error.get("input"), dict | list) else f", but is {error.get('input')!r:.80}"
    return f"{field}: {error['msg'][:1].lower()}{error['msg'][1:]}{got}"


def _name(place: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``."""
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def install(app: FastAPI) -> None:
    """Give every error of the app this shape."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes) and error.body:
            kind = request.headers.get("content-type", "none")
            return ApiError(
                415, f"the content type is {kind}; expected application/json", code="unsupported_media_type"
            ).response()
        return from_validation(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {
            404: f"there is nothing at {request.url.path!r:.200}",
            405: f"{request.method} is not what {request.url.path!r:.200} takes",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, said, headers=error.headers).response()
