"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the status that fits."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from aria.engine import ContextLengthError, ParameterError
from aria.serve import field_rules

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

_STATELESS = "nothing is kept between requests"
_FILES = "no files are kept here; send media and documents in messages, and run batch files with `aria batch`"
_UPDATES = "adapters are loaded at the start; allow clients to load them with --allow-adapter-updates"
_TRAINING = "train with `aria train`"
_ELSEWHERE = {
    **dict.fromkeys(("/v1/embeddings", "/pooling", "/classify"), "the model answers, it makes no embeddings"),
    **dict.fromkeys(("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"), "the model makes no scores"),
    **dict.fromkeys(("/v1/images", "/v1/videos"), "the model draws nothing"),
    **dict.fromkeys(("/v1/audio", "/v1/realtime"), "the model neither hears nor speaks"),
    **dict.fromkeys(("/v1/files", "/v1/uploads", "/v1/batches"), _FILES),
    **dict.fromkeys(("/v1/fine_tuning", "/v1/evals"), _TRAINING),
    **dict.fromkeys(("/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/conversations"), _STATELESS),
    **dict.fromkeys(("/v1/responses/", "/v1/chat/completions/"), _STATELESS),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _UPDATES),
    "/v1/moderations": "nothing is moderated here",
    "/v1/messages": "use /v1/chat/completions",
    "/embeddings": "the model answers, it makes no embeddings",
    **dict.fromkeys(("/reranking", "/v1/reranking"), "the model makes no scores"),
    **dict.fromkeys(
        ("/invocations", "/completion", "/chat/completions"), "use /v1/chat/completions or /v1/completions"
    ),
    **dict.fromkeys(("/ping", "/server_info"), "use /health and /version"),
    **dict.fromkeys(("/sleep", "/wake_up", "/is_sleeping"), "weights stay in memory"),
    "/slots": "requests share the prefix cache, there are no slots",
    **dict.fromkeys(("/props", "/models"), "use /v1/models"),
    "/infill": "the model cannot fill in the middle",
    "/apply-template": "use /tokenize and /detokenize",
    "/lora-adapters": "name an adapter in the field model",
}
"""Beginnings of paths that OpenAI's, vLLM's or llama.cpp's servers have, and why they are not here."""
_REPR = reprlib.Repr()
"""Of values in bodies, which may be of any size: they are cut before they are written, not after."""
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80
_REPR.maxlevel = 2
_BY_NAME = ("unsupported_field", "unsupported_value", "invalid_value")
"""Errors of a field by its name, which bodies raise as a whole; see `base.misfit`."""


class ApiError(HTTPException):
    """Something to tell a client, with the HTTP status that goes with it.

    Args:
        status: HTTP status, 400 or more.
        message: a sentence for people.
        param: the field of the body that it is about, such as ``messages[0].content``.
        code: a word for programs, such as ``model_not_found``; without it a 400 has ``invalid_value``.
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
        # FastAPI lets its own kind of error alone through while it reads a body.
        super().__init__(status, message, headers)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else None)

    def __str__(self) -> str:
        return self.message

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


def context_length(error: ContextLengthError, param: str | None) -> ApiError:
    """A prompt that is too long, by the code that clients look for before they shorten a conversation."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")


def invalid_request(error: ValueError) -> ApiError:
    """What the engine found wrong with a request, by the name of the field if it knows that."""
    return ApiError(400, str(error), param=error.name if isinstance(error, ParameterError) else None)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a body, by the name of the first field."""
    if not errors:
        return ApiError(400, "the body is not what this route takes")
    # A field that nobody knows is the clearest of several complaints about one place.
    error = next((one for one in errors if one["type"] in _BY_NAME), errors[0])
    place = (*error["loc"], error["ctx"]["field"]) if error["type"] in _BY_NAME else tuple(error["loc"])
    if place[:1] == ("body",):
        place = place[1:]
    if error["type"].startswith("union_tag") and isinstance(error.get("input"), dict):
        place = (*place, error["ctx"]["discriminator"].removesuffix("()"))  # the field that tells
    param = _name(tuple(part for part in place if not (isinstance(part, str) and _TAG.fullmatch(part))))
    return ApiError(400, _sentence(error, param or "the body"), param=param or None, code=_code(error["type"]))


def _code(kind: str) -> str:
    return kind if kind in _BY_NAME else "missing_field" if kind == "missing" else "invalid_value"


def _sentence(error: Mapping[str, Any], field: str) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _BY_NAME:
        return f"{field} {context['message']}"
    if kind == "missing":
        return f"{field} is missing" if error["loc"] != ("body",) else "the body is empty; expected a JSON object"
    if kind == "union_tag_invalid":
        expected = context["expected_tags"].replace("<", "").replace(">", "")
        got = context["tag"].strip("<>")
        why = f" ({field_rules.KINDS[got]})" if got in field_rules.KINDS else ""
        return f"{field} is {got!r}, which is not supported{why}; expected one of {expected}"
    if kind == "union_tag_not_found":
        if isinstance(error.get("input"), dict):
            return f"{field} is missing, or is no string"
        return f"{field} should be an object, but is {_REPR.repr(error.get('input'))}"
    if kind == "wrong_type":
        return f"{field} {error['msg']}, but is {_REPR.repr(error.get('input'))}"
    if kind == "value_error":
        return f"{field}: {context.get('error', error['msg'])}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{field} should be an object, but is {_REPR.repr(error.get('input'))}"
    got = "" if isinstance(error.get("input"), dict | list) else f", but is {_REPR.repr(error.get('input'))}"
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
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 400 and error.__cause__ is not None:
            raise error.__cause__  # FastAPI takes all that goes wrong while a body is read for a fault of the body
        if error.status_code == 404:
            return not_found(path).response()
        if error.status_code == 405:
            allowed = Headers(error.headers or {}).get("allow", "another method")
            message = f"{request.method} is not what {path!r:.200} takes; it takes {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def not_found(path: str) -> ApiError:
    """There is no such path; of routes that other servers have, the message says what to do instead."""
    reason = next((reason for prefix, reason in _ELSEWHERE.items() if path.startswith(prefix)), None)
    more = f": {reason}" if reason else ""
    return ApiError(404, f"there is nothing at {path!r:.200}{more}", code="unknown_url")
