"""Request bodies: parsed into an engine request, or rejected with an error that names a field."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from aria.engine import SamplingParams
from aria.processor import AriaTokenizer
from aria.processor.chat import Prompt
from aria.serve.adapters import LoadAdapterRequest
from aria.serve.endpoints import ENDPOINTS
from aria.serve.errors import ApiError, from_validation, invalid_request
from aria.serve.generation_request import Defaults, GenerationRequest
from aria.serve.protocol import DetokenizeRequest, TokenizeRequest
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.made_bodies import BODIES, WORDS

LONGEST = 512
DEFAULTS = Defaults(sizes=(224, 448), max_model_len=1000)
_MODELS = {path: route.body for path, route in ENDPOINTS.items()} | {
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/load_lora_adapter": LoadAdapterRequest,
}


@cache
def _tokenizer() -> AriaTokenizer:
    return AriaTokenizer.from_pretrained()


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    path = draw.one(list(BODIES))
    body = spoiled(draw, json.loads(json.dumps(draw.one(BODIES[path]))), WORDS)
    try:
        asked = _read(path, body)
    except ApiError as error:
        _check_error(error)
        return
    if not isinstance(asked, GenerationRequest):
        return
    assert isinstance(asked.params, SamplingParams)
    assert asked.prompts
    for prompt in asked.prompts:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            _render(prompt)


def _read(path: str, body: Any) -> Any:
    """As routes do."""
    try:
        read = _MODELS[path].model_validate(body)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from error
    if path not in ENDPOINTS:
        return read
    try:
        return ENDPOINTS[path].parse(read, DEFAULTS)
    except ApiError:
        raise
    except ValueError as error:
        raise invalid_request(error) from error


def _check_error(error: ApiError) -> None:
    assert 400 <= error.status < 500, f"status {error.status}"
    body = json.loads(bytes(error.response().body))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] and len(body["message"]) < 4000, "a message as long as the body"
    assert body["param"] is None or isinstance(body["param"], str)


def _render(messages: list[dict[str, Any]]) -> None:
    """Messages that were read are written with a place for each of their media, or refused."""
    media = sum(
        part["type"] != "text" for one in messages if isinstance(one["content"], list) for part in one["content"]
    )
    messages_read = [{**one, "content": _without_uuid(one["content"])} for one in messages]
    try:
        prompt = _tokenizer().render(messages_read)
    except ValueError:
        return
    assert isinstance(prompt, Prompt)
    assert len(prompt.slots) == media, f"{len(prompt.slots)} places for {media} media"


def _without_uuid(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{key: value for key, value in part.items() if key != "uuid"} | _source(part) for part in content]


def _source(part: dict[str, Any]) -> dict[str, Any]:
    return {"url": "data:,x"} if part["type"] != "text" and "url" not in part else {}


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (bytes([number % len(BODIES)]) + chance.randbytes(30) for number in range(40))
