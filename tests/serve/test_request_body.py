"""Limits on bodies and requests in time and memory, until everything that they started has ended."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest

from aria.serve import active_requests, request_body
from aria.serve.settings import ServerSettings
from tests.helpers.raw_http import HEAD, dripping, refusal, response
from tests.helpers.serving import HELLO, LONG, Live, error_of, idle, running, until

CHAT = "/v1/chat/completions"
SECONDS = 60.0
"""That nothing here waits for."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running() as live:
        yield live


def begun(live: Live, size: int, sent: bytes = b"{", key: str = "none") -> socket.socket:
    """A request whose body has been sent in part."""
    keyed = HEAD + f"Authorization: Bearer {key}\r\nContent-Length: {size}\r\n\r\n".encode()
    return live.connect(keyed + sent)


def hold(live: Live, nbytes: int, key: str = "none") -> socket.socket:
    """The same, once it holds that many bytes."""
    before = live.app.state.active_requests.held_bytes
    connection = begun(live, nbytes + 1000, b'{"prompt": "' + b"a" * nbytes, key)
    until(lambda: live.app.state.active_requests.held_bytes >= before + nbytes * 0.9)
    return connection


# Time


@pytest.mark.slow
def test_slow_bodies_do_not_count_towards_capacity() -> None:
    with running(ServerSettings(max_queue=0, body_seconds=SECONDS)) as live, ExitStack() as stack:
        count = live.app.state.active_requests.capacity + 4
        slow = [stack.enter_context(begun(live, 13)) for _ in range(count)]
        until(lambda: live.app.state.active_requests.active == count)
        assert live.app.state.active_requests.running == 0
        assert live.chat(max_tokens=1).choices
        for one in slow:
            one.sendall(b'"prompt":""}')
            assert response(one)[0] in (200, 503)
        until(lambda: live.app.state.active_requests.active == live.app.state.active_requests.held_bytes == 0)


def test_a_slow_drip_does_not_extend_the_deadline_of_a_body() -> None:
    with running(ServerSettings(body_seconds=0.5)) as live:
        for head in (b"Content-Length: 100000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
            with live.connect(HEAD + head) as slow, dripping(slow, b"1\r\n \r\n"):
                assert refusal(slow) == (408, "body_timeout")
        until(lambda: live.app.state.active_requests.active == 0)


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "STALL_SECONDS", 0.3)
    with running() as live, begun(live, 9) as half:
        assert refusal(half) == (408, "body_timeout")
        assert live.app.state.active_requests.running == live.app.state.active_requests.held_bytes == 0


def test_other_content_types_are_refused_before_the_body_is_read() -> None:
    """Browsers send these for pages of any origin, without a preflight."""
    with running() as live:
        for kind in (b"text/plain", b"text/plain;application/json", b"multipart/form-data; boundary=a", b"", None):
            head = HEAD.replace(b"Content-Type: application/json\r\n", b"")
            head += b"" if kind is None else b"Content-Type: " + kind + b"\r\n"
            with live.connect(head + b"Origin: https://evil.example\r\nContent-Length: 100\r\n\r\n") as connection:
                status, headers, body = response(connection)
                assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
                assert "access-control-allow-origin" not in headers
        for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
            taken = live.http.post("/tokenize", content=b'{"prompt": ""}', headers={"content-type": kind})
            assert taken.status_code == 200


def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    """Closing a connection with unread input discards the output."""
    with running(ServerSettings(max_body=1000)) as live:
        for _ in range(5):
            response = live.http.post(
                "/tokenize", content=bytes(20 << 20), headers={"content-type": "application/json"}
            )
            assert error_of(response, 413)["code"] == "body_too_large"
            assert response.headers["connection"] == "close"


# Memory


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_requests, "MEMORY_WAIT_SECONDS", 0.3)


def keyed(**fields: Any) -> ServerSettings:
    return ServerSettings(api_keys=("one", "two"), held_body_bytes=2 << 20, max_body=1 << 20, **fields)


def tokenize(live: Live, key: str, size: int, **headers: str) -> httpx2.Response:
    content = json.dumps({"prompt": "a" * size}).encode()
    if headers:
        content = gzip.compress(content)
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"} | {
        name.replace("_", "-"): one for name, one in headers.items()
    }
    return httpx2.post(f"{live.address}/tokenize", content=content, headers=headers, timeout=60)


def test_bodies_share_one_budget(short_wait: None) -> None:
    with running(keyed(), key="one") as live:
        with hold(live, 700_000, "one"), hold(live, 700_000, "one"):
            for more in ({}, {"content_encoding": "gzip"}):
                response = tokenize(live, "two", 700_000, **more)
                assert error_of(response, 503)["code"] == "overloaded"
                assert int(response.headers["retry-after"]) > 0 and response.headers["connection"] == "close"
            assert tokenize(live, "two", 1000).status_code != 503, "small ones are accepted"
        until(lambda: live.app.state.active_requests.held_bytes == 0)
        assert tokenize(live, "two", 700_000).status_code != 503


def test_a_body_waits_for_others_to_free_their_memory() -> None:
    with running(keyed(), key="one") as live, hold(live, 700_000, "one") as one, hold(live, 700_000, "one") as other:
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(tokenize(live, "two", 700_000)))
        thread.start()
        until(lambda: live.app.state.active_requests.active == 3)
        time.sleep(0.2)
        one.close()
        thread.join()
        assert answers[0].status_code != 503
        other.close()
        until(lambda: live.app.state.active_requests.held_bytes == 0)


def test_one_client_gets_a_share_of_the_budget(short_wait: None) -> None:
    settings = ServerSettings(api_keys=("one", "two"), held_body_bytes=4 << 20, max_body=1 << 20)
    with running(settings, key="one") as live, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(hold(live, 900_000, "one"))
        assert tokenize(live, "one", 700_000).status_code == 503
        assert tokenize(live, "two", 700_000).status_code != 503


def test_a_body_that_can_never_be_held_is_too_large() -> None:
    with running(ServerSettings(held_body_bytes=100_000)) as live:
        assert error_of(tokenize(live, "none", 200_000), 413)["code"] == "body_too_large"
        # Non-ASCII text takes up to four times its size.
        content = '{"prompt": "' + "a" * 40_000 + '💥"}'
        response = live.http.post("/tokenize", content=content.encode(), headers={"content-type": "application/json"})
        error_of(response, 413)
        assert live.post("/tokenize", prompt="a" * 1000).status_code == 200
        until(lambda: live.app.state.active_requests.held_bytes == 0)


def test_memory_is_held_until_the_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as live:
        entered, released, held = threading.Event(), threading.Event(), live.app.state.active_requests
        encode = live.app.state.service.processor.tokenizer.encode

        def slow(text: str) -> list[int]:
            entered.set()
            assert released.wait(SECONDS)
            return encode(text)

        monkeypatch.setattr(live.app.state.service.processor.tokenizer, "encode", slow)
        body = json.dumps({"prompt": "a" * 5000}).encode()
        with begun(live, len(body), body):
            assert entered.wait(SECONDS)
            assert held.held_bytes > 5000
        # The client has disconnected; the thread still runs.
        until(lambda: held.active == 0)
        assert held.held_bytes > 5000 and held.running == 1
        released.set()
        until(lambda: held.held_bytes == held.running == 0)


# Requests


def test_requests_of_disconnected_clients_count_until_their_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ServerSettings(max_concurrency_per_key=1)) as live:
        entered, released = threading.Event(), threading.Event()

        def stuck(*_: Any, **__: Any) -> None:
            entered.set()
            assert released.wait(SECONDS)

        monkeypatch.setattr(live.app.state.service.processor, "prepare", stuck)
        body = json.dumps({"messages": HELLO}).encode()
        with begun(live, len(body), body):
            assert entered.wait(SECONDS)
        until(lambda: live.app.state.active_requests.active == 0)
        error_of(live.post("/tokenize", prompt="hello"), 429)
        released.set()
        until(lambda: live.app.state.active_requests.running == 0)
        assert live.post("/tokenize", prompt="hello").status_code == 200


@pytest.mark.slow
def test_a_request_has_a_deadline() -> None:
    with running(ServerSettings(request_seconds=0.5)) as live:
        error = error_of(live.post(CHAT, **LONG), 504)
        assert error["code"] == "request_timeout" and "--request-seconds" in error["message"]
        with live.http.stream("POST", CHAT, json={**LONG, "stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert len(events) > 1
        with pytest.raises(openai.APIError, match="request-seconds"):
            list(live.openai.responses.create(model="aria-nano", input="hello", stream=True, extra_body={
                "ignore_eos": True, "max_output_tokens": 3000}))  # fmt: skip
        # A late body has its own error, if that comes first.
        with begun(live, 9) as slow:
            assert refusal(slow)[0] == 504
        until(idle)
        until(lambda: live.app.state.active_requests.active == live.app.state.active_requests.running == 0)


def test_the_number_of_media_per_request_is_limited() -> None:
    word = {"type": "image_url", "image_url": {"url": "data:,x"}}
    with running(ServerSettings(max_media=3)) as live:
        body = {"messages": [{"role": "user", "content": [word] * 2}] * 2}
        for path in (CHAT, "/tokenize"):
            error = error_of(live.post(path, **body), 400)
            assert error["param"] == "messages" and "4 images, videos and documents" in error["message"]
        shown = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}] * 4}]
        assert error_of(live.post("/v1/responses", input=shown), 400)["param"] == "input"


def test_parts_and_texts_of_a_message_are_limited(live: Live) -> None:
    many = [{"type": "text", "text": "a"}] * 20_000
    for path, fields, param in (
        (CHAT, {"messages": [{"role": "user", "content": many}]}, "messages[0].content"),
        (CHAT, {"messages": HELLO, "metadata": {str(i): "a" for i in range(65)}}, "metadata"),
        (CHAT, {"messages": HELLO, "metadata": {"a": "a" * 5000}}, "metadata.a"),
        (CHAT, {"messages": HELLO, "structured_outputs": {"json": f"[{'0,' * 600_000}0]"}}, "structured_outputs.json"),
        (CHAT, {"messages": HELLO, "structured_outputs": {"regex": "a" * 2_000_000}}, "structured_outputs.regex"),
        ("/v1/responses", {"input": "a" * 20_000_000}, "input"),
    ):
        error = error_of(live.post(path, **fields), 400)
        assert error["param"] == param and len(error["message"]) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "a" * 3_000_000},
        {"model": "a" * 3_000_000},
        {"messages": "a" * 3_000_000},
        {"messages": [["a" * 3_000_000]]},
        {"a" * 3_000_000: 1},
        {"tool_choice": {"type": "a" * 3_000_000}},
    ],
    ids=["number", "name", "text", "list", "key", "tag"],
)
def test_errors_quote_only_a_little_of_the_body(live: Live, fields: dict[str, Any]) -> None:
    response = live.post(CHAT, **{"messages": HELLO, **fields})
    assert response.status_code == 400
    assert len(response.content) < 2000
