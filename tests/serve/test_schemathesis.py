"""Malformed bodies, almost valid ones, and bodies generated from the OpenAPI description never cause a 5xx.

``ARIA_FUZZ`` sets how many malformed bodies and media are sent, ``ARIA_SCHEMA_EXAMPLES`` how many a route's description
makes.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.serving import PICTURES, data_uri, engine, idle, running, until

FUZZ = int(os.environ.get("ARIA_FUZZ", "150"))
EXAMPLES = int(os.environ.get("ARIA_SCHEMA_EXAMPLES", "6"))

HELLO = [{"role": "user", "content": "hello"}]
GOOD = {
    "/v1/chat/completions": {
        "model": "aria-nano",
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "stream": False,
    },
    "/v1/completions": {"prompt": ["hello", "you"], "max_tokens": 2, "n": 2, "logprobs": 1},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "max_output_tokens": 2,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    },
    "/tokenize": {"messages": HELLO},
    "/detokenize": {"tokens": [5, 6, 7]},
}
LENGTHS = ("max_tokens", "max_output_tokens")
ODD = [
    None, True, 0, -1, 2**63, 10**400, 1e308, -0.0, "", "\x00", "\ud800", "x" * 5000, "💥" * 50, "<|img|>", [], {},
    [[]], [None], {"": None}, {"type": "text"}, {"$ref": "#"}, [{"type": "image_url"}], "data:", "data:;base64,!",
    "file:///etc",
]  # fmt: skip


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def spoiled(body, chance: random.Random):
    """A body with something invalid in it; a response to it is short all the same."""
    lengths = {name: body[name] for name in LENGTHS if name in body}
    body = json.loads(json.dumps(body))
    places = [(body, key) for key in body]
    for parent, key in places:
        child = parent[key]
        places += (
            [(child, k) for k in (child if isinstance(child, dict) else range(len(child)))]
            if isinstance(child, dict | list)
            else []
        )
    parent, key = chance.choice(places)
    odd = chance.choice(ODD)
    match chance.randrange(4 if isinstance(parent, dict) else 3):
        case 0:
            parent[key] = odd
        case 1:
            parent[key] = [parent[key], odd]
        case 2:
            del parent[key]
        case _:
            parent[chance.choice(["", "x", "content", "type", "stream", "n", "\ud800"])] = odd
    return {**lengths, **body}


def cut(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a part removed, added or changed."""
    at, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    match chance.randrange(3):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case _:
            return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]


def bomb(side: int) -> bytes:
    """A PNG whose header declares a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "JPEG")
    return file.getvalue()


def media(chance: random.Random) -> dict:
    """A content part whose medium is broken or of another type."""
    sound = [(PICTURES / "word.png").read_bytes(), jpeg(), bomb(60_000), b"%PDF-1.4\n1 0 obj\n<<>>", b"GIF89a", b"RIFF"]
    data = chance.choice(sound)
    if chance.random() < 0.8:
        data = cut(data, chance)
    uri = data_uri(data, chance.choice(["image/png", "video/mp4", "application/pdf", "", "x" * 50]))
    if chance.random() < 0.2:
        uri = cut(uri.encode(), chance).decode("latin-1")
    return chance.choice(
        [
            {"type": "image_url", "image_url": {"url": uri, "split": chance.random() < 0.3}},
            {"type": "video_url", "video_url": {"url": uri, "num_frames": chance.choice([1, 10**9])}},
            {"type": "file", "file": {"file_data": uri, "pages": chance.choice([None, "1", "9-1", "x"])}},
            {
                "type": "image_url",
                "image_url": {"url": chance.choice(["/etc/passwd", "http://127.0.0.1:1/a", "x", ""])},
            },
        ]
    )


def test_malformed_bodies_never_cause_a_server_error(live):
    answered = 0
    for seed in range(FUZZ):
        chance = random.Random(seed)
        path = chance.choice(list(GOOD))
        kind = {"content-type": "application/json"}
        match chance.randrange(3):
            case 0:
                content = json.dumps(spoiled(GOOD[path], chance)).encode()
            case 1:
                content = cut(json.dumps(GOOD[path]).encode(), chance)
            case _:
                path = chance.choice(["/v1/chat/completions", "/tokenize"])
                said = [{"role": "user", "content": [media(chance), {"type": "text", "text": "what?"}]}]
                more = {"max_tokens": 1} if path == "/v1/chat/completions" else {}
                content = json.dumps({"messages": said, **more}).encode()
        response = live.http.post(path, content=content, headers=kind)
        assert response.status_code < 500, (seed, path, content[:300], response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        else:
            answered += 1
    assert answered < FUZZ / 2, "most bodies are malformed"
    until(idle)
    assert live.chat().choices[0].message.content
    assert engine().engine.core.pool.used == 0


@pytest.fixture(scope="module")
def description(live):
    return schemathesis.openapi.from_url(f"{live.address}/openapi.json")


CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
OTHERS = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics")


@pytest.mark.slow
@pytest.mark.parametrize("path", [*GOOD, *OTHERS])
def test_responses_match_the_openapi_description(description, path):
    bodies = description[path]["POST" if path in GOOD else "GET"].as_strategy()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def check(case):
        if isinstance(case.body, dict):
            case.body.pop("max_completion_tokens", None)
            case.body.update({name: 2 for name in LENGTHS if name in GOOD[path]})
        case.call_and_validate(checks=CHECKS)

    check()


def test_the_openapi_description_has_every_route(live):
    described = live.http.get("/openapi.json").json()["paths"]
    assert {*GOOD, "/v1/models", "/health", "/ready", "/metrics"} <= described.keys()
    for path in GOOD:
        statuses = {"200", "400", "401", "404", "408", "413", "415", "421", "429", "500", "503", "504"}
        assert described[path]["post"]["responses"].keys() == statuses
        assert "requestBody" in described[path]["post"]
