"""HTTP: methods, paths, encodings and origins, reasons for refused bodies, the access log."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx2
import pytest

from aria.serve import inflate
from aria.serve.request_context import ACCESS_LOG
from aria.serve.run import _log_config
from aria.serve.settings import ServerSettings
from tests.helpers.serving import Live, engine, error_of, running, until

HELLO = [{"role": "user", "content": "hello"}]
# Without the time, so that all processes collect tests of the same names.
gzipped = partial(gzip.compress, mtime=0)
BODY = json.dumps({"messages": HELLO, "max_tokens": 2, "temperature": 0}).encode()
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def test_unknown_paths_and_methods(live):
    assert "no route '/v1/nothing'" in error_of(live.http.get("/v1/nothing"), 404)["message"]
    error_of(live.http.post("/v1/nothing", json={}), 404)
    error_of(live.http.get("/../pyproject.toml"), 404)
    error_of(live.http.get("/%2e%2e/app.py"), 404)
    response = live.http.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    assert "allowed are POST" in response.json()["error"]["message"]
    error_of(live.http.delete("/v1/models"), 405)


@pytest.mark.parametrize(
    ("path", "says"),
    [("/v1/embeddings", "no embeddings"), ("/v1/files", "aria batch"), ("/v1/batches/b_1", "aria batch"),
     ("/v1/responses/resp_1", "nothing is stored"), ("/v1/images/generations", "generates no images"),
     ("/v1/audio/speech", "no audio"), ("/rerank", "no scores"), ("/v1/threads/t/runs", "nothing is stored")],
)  # fmt: skip
def test_routes_of_other_servers_are_refused_with_the_reason(live, path, says):
    for response in (live.http.get(path), live.http.post(path, json={})):
        error = error_of(response, 404)
        assert says in error["message"] and error["code"] == "unknown_url"


def test_head_is_answered_wherever_get_is(live):
    paths = live.http.get("/openapi.json").json()["paths"]
    readable = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    assert {"/health", "/ready", "/metrics", "/v1/models"} <= set(readable)
    for path in (*readable, "/v1/models/aria-nano", "/", "/openapi.json"):
        head, got = live.http.head(path), live.http.get(path)
        assert (head.status_code, head.content) == (got.status_code, b"") == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
    assert live.http.head("/v1/models/other").status_code == 404
    assert live.http.head(CHAT).status_code == 405


def test_a_trailing_slash_makes_no_difference(live):
    for path in ("/v1/models/", "/health/", "/v1/models/aria-nano/"):
        assert live.http.get(path).json() == live.http.get(path[:-1]).json()
    assert live.http.post(f"{CHAT}/", content=BODY, headers=JSON).json()["choices"]
    with running(ServerSettings(api_keys=("key",)), key="key") as locked:
        for path in ("/v1/models/", "/metrics/"):
            error_of(httpx2.get(locked.address + path), 401)
        assert httpx2.head(f"{locked.address}/v1/models").status_code == 401


# Bodies


@pytest.mark.parametrize(
    ("content", "kind", "status", "code", "says"),
    [
        (b"{", "application/json", 400, "bad_json", "not JSON: .* at character 1"),
        (b"[1, 2", "application/json", 400, "bad_json", "not JSON: .* at character 5"),
        (b"", "application/json", 400, "missing_field", "the body is empty; expected a JSON object"),
        (b"null", "application/json", 400, "invalid_value", "the body should be an object, but is None"),
        (b"[]", "application/json", 400, "invalid_value", "the body should be an object, but is"),
        (b"3", "application/json", 400, "invalid_value", "the body should be an object, but is 3"),
        (b"[" * 100_000, "application/json", 400, "bad_json", "nested too deeply"),
        (b"\xff\xfe\x00", "application/json", 400, "bad_json", "not valid utf-16"),
        (b'{"messages": "caf\xe9"}', "application/json", 400, "bad_json", "not valid utf-8: .* at byte 17"),
        (b'{"messages": "\\ud800"}', "application/json", 400, "invalid_value", "messages"),
        (b'{"\\ud800": 1, "messages": []}', "application/json", 400, "unsupported_field", "not supported"),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', "application/json", 400,
         "invalid_value", "temperature: .* finite"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json", 400, "bad_json", "a number that is too long"),
        (b"{}", "text/plain", 415, "unsupported_media_type", "text/plain; expected application/json"),
        (b"{}", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "expected application/json"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(live, content, kind, status, code, says):
    for sent, more in ((content, {}), (gzipped(content), {"content-encoding": "gzip"})):
        error = error_of(live.http.post(CHAT, content=sent, headers={"content-type": kind, **more}), status)
        assert error["code"] == code
        assert re.search(says, error["message"]), error["message"]


def compressed(encoding: str = "gzip") -> dict:
    return {**JSON, "content-encoding": encoding}


def test_gzip_bodies_are_inflated(live):
    def answer(content, headers) -> str:
        return live.http.post(CHAT, content=content, headers=headers).json()["choices"][0]["message"]["content"]

    plain, complete = answer(BODY, JSON), gzipped(BODY)
    for content, encoding in (
        (complete, "gzip"),
        (complete, "X-GZIP"),
        (complete, "identity, gzip"),
        (gzipped(BODY[:9]) + gzipped(BODY[9:]), "gzip"),
        ((complete[i : i + 7] for i in range(0, len(complete), 7)), "gzip"),
        (BODY, "identity"),
    ):
        assert answer(content, compressed(encoding)) == plain


@pytest.mark.parametrize(
    ("content", "encoding", "status", "code"),
    [
        (BODY, "br", 415, "unsupported_content_encoding"),
        (zlib.compress(BODY), "deflate", 415, "unsupported_content_encoding"),
        (gzipped(gzipped(BODY)), "gzip, gzip", 415, "unsupported_content_encoding"),
        (BODY, "gzip", 400, "bad_gzip"),
        (gzipped(BODY)[:-9], "gzip", 400, "bad_gzip"),
        (gzipped(BODY) + b"more", "gzip", 400, "bad_gzip"),
        (b"", "gzip", 400, "bad_gzip"),
    ],
)
def test_other_encodings_and_broken_ones_are_refused(live, content, encoding, status, code):
    response = live.http.post(CHAT, content=content, headers=compressed(encoding))
    assert error_of(response, status)["code"] == code
    assert (response.headers.get("accept-encoding") == "gzip, identity") == (status == 415)


def test_a_body_that_inflates_beyond_the_limit_is_refused():
    with running(ServerSettings(max_body=200_000)) as live:
        bomb, many = gzipped(bytes(50 << 20)), gzipped(b"") * 20_000
        assert len(bomb) < 200_000 < len(many)
        for content in (bomb, many):
            error = error_of(live.http.post("/tokenize", content=content, headers=compressed()), 413)
            assert error["code"] == "body_too_large"


@pytest.mark.parametrize("cut", [7, 1000, 10**9])
def test_bodies_are_inflated_in_small_pieces(cut):
    content = bytes(3 * inflate.PIECE) + BODY
    data = gzipped(content[: inflate.PIECE]) + gzipped(content[inflate.PIECE :])
    pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
    messages = iter([{"type": "http.request", "body": one, "more_body": one is not pieces[-1]} for one in pieces])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def read() -> list:
        inflated, got = inflate.inflated(receive), []
        while not got or got[-1]["more_body"]:
            got.append(await inflated())
        assert (await inflated())["type"] == "http.disconnect"
        return got

    got = asyncio.run(read())
    assert b"".join(one["body"] for one in got) == content
    assert max(len(one["body"]) for one in got) <= inflate.PIECE


# Prompts that are too long


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "long " * 5000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 5000}], "stream": True}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages"),
        ("/v1/completions", {"prompt": "long " * 5000}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 5000}, "prompt"),
        ("/v1/responses", {"input": "long " * 5000}, "input"),
        ("/v1/responses", {"input": "long " * 200_000}, "input"),
        ("/tokenize", {"prompt": "long " * 200_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages"),
    ],
)
def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(live, path, body, param):
    error = error_of(live.post(path, **body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    sizes = re.search(
        r"maximum context length is (\d+) tokens.* resulted in (?:at least )?(\d+) tokens", error["message"]
    )
    assert int(sizes[1]) == engine().engine.max_model_len <= int(sizes[2])


# Browsers


def test_pages_of_other_origins_must_be_allowed(live):
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in live.http.get("/health", headers=asks).headers
    with running(ServerSettings(cors_origins=("https://app.example",), api_keys=("key",)), key="key") as open_one:
        asked = httpx2.options(f"{open_one.address}/v1/chat/completions", headers=asks)
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx2.get(f"{open_one.address}/v1/models", headers=asks)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example", (
            "otherwise the page cannot read the reason"
        )
        other = {**asks, "Origin": "https://other.example"}
        assert "access-control-allow-origin" not in open_one.http.get("/health", headers=other).headers


def test_a_browser_may_send_the_headers_of_the_official_client():
    stainless = [f"x-stainless-{one}" for one in ("arch", "lang", "os", "package-version", "retry-count", "runtime")]
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": ",".join(["authorization", "content-type", *stainless, "x-my-own"]),
        "Access-Control-Request-Private-Network": "true",
    }
    with running(ServerSettings(cors_origins=("https://app.example",), api_keys=("key",)), key="key") as live:
        allowed = httpx2.options(live.address + CHAT, headers=asked)
        assert allowed.status_code == 200
        names = {one.strip().lower() for one in allowed.headers["access-control-allow-headers"].split(",")}
        assert {"authorization", "content-type", *stainless, "x-my-own"} <= names
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert allowed.headers["access-control-allow-private-network"] == "true"
        answer = live.http.post(CHAT, content=BODY, headers={**JSON, "Origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert "x-request-id" in exposed and "retry-after" in exposed
        other = httpx2.options(live.address + CHAT, headers={**asked, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# Names, and proxies


def named(live: Live, *hosts: str, path: str = "/version") -> httpx2.Response:
    """A request with given ``Host`` headers."""
    return live.http.get(path, headers=[("Host", host) for host in hosts])


def test_without_keys_only_local_host_names_are_accepted(live):
    """DNS rebinding: a page of another site points its own name at this server."""
    port = live.http.base_url.port
    for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", "localhost.", "aria.localhost", "[::1]:8000",
                 "192.168.1.5:8000", "[fe80::1%25eth0]"):  # fmt: skip
        assert named(live, host).status_code == 200, host
    for path in ("/version", "/", "/health", "/v1/models", "/metrics", "/openapi.json"):
        error = error_of(named(live, "evil.example", path=path), 421)
        assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]
    refused = live.http.post(CHAT, content=BODY, headers={**JSON, "Host": "127.0.0.1.evil.example"})
    error_of(refused, 421)
    for host in ("notlocalhost", "localhost.evil.example", "1.2.3.4.5", "2130706433x"):
        error_of(named(live, host), 421)
    for hosts in ((), ("localhost", "evil.example"), ("evil.example@localhost",), ("localhost/evil.example",)):
        with live.connect(b"GET /version HTTP/1.1\r\n" + b"".join(b"Host: %s\r\n" % one.encode() for one in hosts)
                          + b"\r\n") as bare:  # fmt: skip
            assert bare.recv(100).startswith(b"HTTP/1.1 400 ")


def test_host_names_can_be_allowed():
    with running(ServerSettings(allowed_hosts=("aria.example", "*.lan"))) as live:
        for host in ("aria.example:8000", "Aria.Example", "box.lan", "a.b.lan", "localhost", "10.0.0.1"):
            assert named(live, host).status_code == 200, host
        for host in ("lan", "sub.aria.example", "evil.example", "evillan"):
            error_of(named(live, host), 421)
    with running(ServerSettings(allowed_hosts=("*",))) as live:
        assert named(live, "evil.example").status_code == 200
    with running(ServerSettings(api_keys=("key",)), key="key") as live:
        assert named(live, "any.example").status_code == 200
    with running(ServerSettings(api_keys=("key",), allowed_hosts=("aria.example",)), key="key") as live:
        assert named(live, "aria.example").status_code == 200
        error_of(named(live, "any.example"), 421)


@pytest.mark.parametrize(
    ("proxies", "forwarded", "client"),
    [
        ((), "1.2.3.4", b"127.0.0.1"),
        (("10.0.0.0/8",), "1.2.3.4", b"127.0.0.1"),
        (("127.0.0.1",), "1.2.3.4", b"1.2.3.4"),
        (("127.0.0.0/8",), "1.2.3.4, 5.6.7.8", b"5.6.7.8"),
        (("127.0.0.1", "5.6.7.8"), "1.2.3.4, 5.6.7.8", b"1.2.3.4"),
        (("127.0.0.1",), "2001:db8:1:2:3::4", b"2001:db8:1:2::/64"),
        (("127.0.0.1",), "::10.0.0.1", b"::/64"),
        (("127.0.0.1",), None, b"127.0.0.1"),
    ],
)
def test_forwarded_headers_are_trusted_from_proxies_only(monkeypatch, proxies, forwarded, client):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own setting
    with running(ServerSettings(trusted_proxies=proxies)) as live:
        seen = []
        tokenize = live.app.state.active_requests.admit
        monkeypatch.setattr(
            live.app.state.active_requests, "admit", lambda client: seen.append(client) or tokenize(client)
        )
        headers = {} if forwarded is None else {"X-Forwarded-For": forwarded, "X-Forwarded-Proto": "https"}
        assert live.http.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 200
        assert seen == [client]


# The access log


@contextmanager
def access_lines() -> Iterator[list[str]]:
    """Collects the lines of the access log."""
    lines: list[str] = []
    logger, handler = logging.getLogger(ACCESS_LOG), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_each_request_is_logged_without_its_contents():
    settings = ServerSettings(api_keys=("secret-key",), cors_origins=("*",))
    with running(settings, key="secret-key") as live, access_lines() as lines:
        answer = live.post(CHAT, messages=[{"role": "user", "content": "private"}], max_tokens=2, ignore_eos=True)
        usage, name = answer.json()["usage"], answer.headers["x-request-id"]
        with live.http.stream(
            "POST", CHAT, json={"messages": HELLO, "max_tokens": 3, "ignore_eos": True, "stream": True}
        ) as stream:
            assert b"data:" in stream.read()
        live.post(CHAT, messages=[])
        httpx2.head(f"{live.address}/v1/models/?key=hidden", headers={"X-Request-Id": "mine"})
        live.http.get("/no%0Athing")
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "X-Request-Id": "before"}
        httpx2.options(live.address + CHAT, headers=asked)
        with socket.create_connection(("127.0.0.1", live.http.base_url.port)) as half:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret-key\r\nX-Request-Id: half"
            half.sendall(f"{head}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
        until(lambda: any("id=half" in line for line in lines))
    tokens = f"prompt={usage['prompt_tokens']} completion={usage['completion_tokens']}"
    expected = (
        rf"POST {CHAT} 200 \d+\.\d\d\ds {tokens} id={name}",
        rf"POST {CHAT} 200 \S+ prompt=\d+ completion=3 id=req-\w+",
        rf"POST {CHAT} 400 \S+ id=req-\w+",
        r"HEAD /v1/models/ 401 \S+ id=mine",
        r"GET /no%0Athing 404 \S+ id=req-\w+",
        rf"OPTIONS {CHAT} 200 \S+ id=before",
        rf"POST {CHAT} 499 \S+ id=half",
    )
    # In any order: a stream is logged after its client has read the last event.
    assert [sum(bool(re.fullmatch(one, line)) for line in lines) for one in expected] == [1] * len(lines)
    assert not [line for line in lines if "private" in line or "secret" in line or "hidden" in line]


def test_the_access_log_can_be_silenced():
    def level(name: str, access_log: bool) -> int:
        return _log_config(name, access_log)["loggers"][ACCESS_LOG]["level"]

    assert level("info", True) == logging.INFO
    assert level("info", False) > logging.ERROR
    assert level("warning", True) == logging.WARNING
    with pytest.raises(ValueError, match="'loud'; expected one of critical"):
        _log_config("loud", True)
