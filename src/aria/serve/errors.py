"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}`` with a fitting status."""

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
"""Tags of union members in `protocol`, and pydantic's name of a key: not part of a field's path in the body."""

_STATELESS = "nothing is stored between requests"
_FILES = "no files are stored here; send media and documents in messages, and run batch files with `aria batch`"
_UPDATES = "adapters are loaded at startup; --allow-adapter-updates lets clients load them"
_TRAINING = "train with `aria train`"
_ELSEWHERE = {
    **dict.fromkeys(("/v1/embeddings", "/pooling", "/classify"), "the model makes no embeddings"),
    **dict.fromkeys(("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"), "the model makes no scores"),
    **dict.fromkeys(("/v1/images", "/v1/videos"), "the model generates no images or videos"),
    **dict.fromkeys(("/v1/audio", "/v1/realtime"), "the model has no audio input or output"),
    **dict.fromkeys(("/v1/files", "/v1/uploads", "/v1/batches"), _FILES),
    **dict.fromkeys(("/v1/fine_tuning", "/v1/evals"), _TRAINING),
    **dict.fromkeys(("/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/conversations"), _STATELESS),
    **dict.fromkeys(("/v1/responses/", "/v1/chat/completions/"), _STATELESS),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _UPDATES),
    "/v1/moderations": "nothing is moderated here",
    "/v1/messages": "use /v1/chat/completions",
    "/embeddings": "the model makes no embeddings",
    **dict.fromkeys(("/reranking", "/v1/reranking"), "the model makes no scores"),
    **dict.fromkeys(
        ("/invocations", "/completion", "/chat/completions"), "use /v1/chat/completions or /v1/completions"
    ),
    **dict.fromkeys(("/ping", "/server_info"), "use /health and /version"),
    **dict.fromkeys(("/sleep", "/wake_up", "/is_sleeping"), "weights stay in memory"),
    "/slots": "there are no slots; requests share the prefix cache",
    **dict.fromkeys(("/props", "/models"), "use /v1/models"),
    "/infill": "the model cannot fill in the middle",
    "/apply-template": "use /tokenize and /detokenize",
    "/lora-adapters": "name an adapter in the field model",
}
"""Path prefixes of OpenAI's, vLLM's and llama.cpp's servers, and why they do not exist here."""
_REPR = reprlib.Repr()
"""Shortens values of bodies in messages. They may be of any size, so they are cut before they are formatted."""
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80
_REPR.maxlevel = 2
_BY_NAME = ("unsupported_field", "unsupported_value", "invalid_value")
"""Errors of one field that a validator of the whole object raises; see `protocol_base.field_error`."""


class ApiError(HTTPException):
    """An error response.

    Args:
        status: HTTP status, 400 or more.
        message: A sentence for people.
        param: The field of the body at fault, such as ``messages[0].content``.
        code: A code for programs, such as ``model_not_found``; default: ``invalid_value`` for a 400.
        headers: Additional headers of the response.
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
        # While it reads a body, FastAPI only passes on exceptions of this type.
        super().__init__(status, message, headers)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else None)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        # ASCII with escapes: field names may hold lone surrogates, which cannot be encoded.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers=self.headers, media_type="application/json")


def unexpected(request_id: str) -> ApiError:
    """An internal error, which only reveals its request id in the log."""
    return ApiError(500, f"the server failed on this request; see its log under {request_id}", code="internal")


def overloaded(message: str, *, status: int = 503, wait: int = 1) -> ApiError:
    """A temporary refusal, with Retry-After."""
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, code=code, headers={"Retry-After": str(wait)})


def context_length(error: ContextLengthError, param: str | None) -> ApiError:
    """A prompt that is too long, with the code that clients look for to shorten a conversation."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")


def invalid_request(error: ValueError) -> ApiError:
    """An error of the engine's, with the field at fault if it names one."""
    return ApiError(400, str(error), param=error.name if isinstance(error, ParameterError) else None)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The most helpful of pydantic's errors about a body."""
    if not errors:
        return ApiError(400, "the body is not valid for this route")
    # An unknown field is the clearest of several errors about one object.
    error = next((one for one in errors if one["type"] in _BY_NAME), errors[0])
    place = (*error["loc"], error["ctx"]["field"]) if error["type"] in _BY_NAME else tuple(error["loc"])
    if place[:1] == ("body",):
        place = place[1:]
    if error["type"].startswith("union_tag") and isinstance(error.get("input"), dict):
        place = (*place, error["ctx"]["discriminator"].removesuffix("()"))  # the discriminating field
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
            return f"{field} is missing or not a string"
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
    """Install exception handlers that give all errors of the app this format."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 400 and error.__cause__ is not None:
            raise error.__cause__  # FastAPI reports every exception while a body is read as an invalid body
        if error.status_code == 404:
            return not_found(path).response()
        if error.status_code == 405:
            allowed = Headers(error.headers or {}).get("allow", "another method")
            message = f"{request.method} is not allowed for {path!r:.200}; allowed are {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def not_found(path: str) -> ApiError:
    """A 404; for routes of other servers, the message says what to use instead."""
    reason = next((reason for prefix, reason in _ELSEWHERE.items() if path.startswith(prefix)), None)
    more = f": {reason}" if reason else ""
    return ApiError(404, f"no route {path!r:.200}{more}", code="unknown_url")
