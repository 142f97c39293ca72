"""What the server refuses, and its messages: fields, values, keys, sizes, numbers, shutdown."""

from __future__ import annotations

import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import pytest
from pydantic import ValidationError
from typer.main import get_command

from aria.cli import app
from aria.serve import json_reader
from aria.serve.admission import allows_anonymous_access
from aria.serve.chat_page import FOLDER
from aria.serve.endpoints import ENDPOINTS
from aria.serve.protocol import DetokenizeRequest
from aria.serve.settings import ServerSettings
from tests.helpers.serving import HELLO, LONG, engine, error_of, idle, running, until

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def loose(live, path: str, body: dict):
    """Sent in Python's JSON, which allows NaN and lone surrogates."""
    return live.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def part(**fields) -> dict:
    return {"messages": [{"role": "user", "content": [fields]}]}


def _function(parameters: dict, choice: str = "auto") -> dict:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}


NESTED: dict = {"type": "string"}
for _ in range(400):
    NESTED = {"type": "object", "properties": {"a": NESTED}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "temprature is not supported; did you mean temperature"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported.*use tools"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "not supported.*minimal"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2.*2.1"),
        ({"temperature": "1"}, "temperature", "valid number.*'1'"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "129 choices.*at most 128 are allowed"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "mean the same but differ"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs requires logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", 1]}, "stop[1]", "valid string"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        # It overflows float32, which would fail the whole step in the engine.
        ({"repetition_penalty": 1e308}, "repetition_penalty", "less than or equal to 100"),
        ({"stop": "a" * 1025}, "stop", "at most 1024"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", "ignore_eos"),
        (_function(NESTED, choice="required"), "tools[0].function.parameters", "nested too deeply"),
        (_function({"type": "array"}), "tools[0].function.parameters", "'f' are of the type 'array'; expected object"),
        ({"tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": {"x": said}}}}
                    for name, said in (("good", {}), ("bad", {"not": {}}))], "tool_choice": "required"},
         "tools[1].function.parameters", "parameters of 'bad' cannot be followed: not is not supported, at #/prop"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of json, regex, choice"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "give one of json, regex, choice"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "followed(.|\n)*unclosed group"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar", "nowhere"),
        ({"structured_outputs": {"grammar": "\n".join(f"a{i}: a{i + 1}" for i in range(5000))}},
         "structured_outputs.grammar", "5,000 rules; expected at most 1,000"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": {"type": "cow"}}}, "structured_outputs.json", "Invalid type: cow"),
        ({"structured_outputs": {"structural_tag": {"format": {"type": "x"}}}}, "structured_outputs.structural_tag",
         "expected const_string"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern",
         "not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs",
         "not both"),
        ({**_function({}), "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "combined with tools"),
        ({"guided_regex": "a"}, "guided_regex", 'use structured_outputs: {"regex"'),
        (_function({"maximum": math.nan}), "tools[0].function.parameters", "not JSON"),
        (_function({"title": "\ud800"}), "tools[0].function.parameters", "not JSON"),
        ({f"x{i}": 1 for i in range(100)}, None, "an object of 102 fields"),
        ({"messages": [[]]}, "messages[0]", "should be an object"),
        ({"messages": [1] * 20_000}, "messages[0]", "should be an object, but is 1"),
        ({"messages": HELLO * 16_385}, "messages", "at most 16384"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "the vocabulary ends"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'.*json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cow"}}}},
         "response_format.json_schema.schema", "Invalid type: cow"),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'wizard'.*'developer'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content",
         "should be a string or a list of parts, but is None"),
        ({"stop": 5}, "stop", "should be a string or a list of strings, but is 5"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "'custom'.*use tools of the type"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "a"}}}, "tool_choice.type", "'custom'.*'allowed_tools'"),
        ({**_function({}), "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"function": {"name": "g"}}]}}}, "tool_choice", "names 'g', which is not in"),
        ({"tools": [{"type": "\ud800", "function": {"name": "a"}}]}, "tools[0].type", "is '?'"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role", "is '?'"),
        ({"response_format": {"type": "\ud800"}}, "response_format.type", "is '?'"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "at most max_tokens"),
        ({"stop_token_ids": [999_999]}, "stop_token_ids", "the vocabulary ends"),
        ({"max_output_tokens": 3}, "max_output_tokens", "use max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x", "nam": "Ann"}]}, "messages[0].nam", "did you mean name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
        (part(type="input_audio", input_audio={}), "messages[0].content[0].type", "'input_audio'.*'image_url'"),
        (part(type="text"), "messages[0].content[0].text", "missing"),
        (part(type="image_url", image_url="x"), "messages[0].content[0].image_url", "should be an object, but is 'x'"),
        (part(type="image_url", image_url={"url": "x", "detail": "ultra"}), "messages[0].content[0].image_url.detail",
         "'auto', 'low', 'high' or 'original'"),
        (part(type="image_url", image_url={"url": "data:image/png;base64,AAAA"}), "messages", "not an image"),
        (part(type="image_url", image_url={"url": "ftp://example.org/a.png"}), "messages", "ftp"),
        (part(type="file", file={"file_id": "file-1", "file_data": "x"}), "messages[0].content[0].file.file_id",
         "not supported"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, "messages", "max_model_len"),
    ],
)  # fmt: skip
def test_errors_name_the_field(live, fields, param, says):
    error = error_of(loose(live, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(says, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "echo": "yes"}, "echo"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/completions", {"messages": HELLO}, "messages"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [999_999]}, "prompt"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ["x", "long " * 200_000]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages"),
        ("/tokenize", {"prompt": "long " * 200_000}, "prompt"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": "\ud800"}}]},
         "tools[0].parameters"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, None),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_errors_of_other_routes_name_the_field(live, path, body, param):
    assert error_of(loose(live, path, body), 400)["param"] == param


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_an_unknown_model_is_not_found(live, path):
    said = {"messages": HELLO, "prompt": "x", "input": "x", "tokens": [1]}
    key = {"/v1/completions": "prompt", "/v1/responses": "input", "/detokenize": "tokens"}.get(path, "messages")
    error = error_of(live.post(path, model="gpt-4o", **{key: said[key]}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "aria-nano" in error["message"]


def test_fields_without_effect_are_accepted(live):
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"}
    body = {"messages": HELLO, "max_tokens": 1, **fields, "prompt_cache_key": "k", "modalities": ["text"]}
    assert live.post("/v1/chat/completions", **body).status_code == 200


def test_the_page_is_served_with_a_strict_policy(live):
    page = live.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert files
    for file in files:
        got = live.http.get(f"/{file.relative_to(FOLDER).as_posix()}")
        assert got.content == file.read_bytes()
        expected = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
        assert got.headers["content-type"] == expected.get(file.suffix, got.headers["content-type"])
    error_of(live.http.post("/", json={}), 404)


def test_errors_become_the_clients_own_exceptions(live):
    with pytest.raises(openai.BadRequestError) as caught:
        live.chat(temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


def test_keys_protect_routes_that_run_the_model():
    with running(ServerSettings(api_keys=("first", "second")), key="second") as live:
        for path in ("/health", "/ready", "/openapi.json"):
            assert httpx2.get(live.address + path).status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert live.http.get(path).status_code == 200
            error = error_of(httpx2.get(live.address + path), 401)
            assert error["code"] == "invalid_api_key"
        for header in ("Bearer third", "Bearer", "Basic second", "second", "Bearer first second", "Bearer s\xe9cond"):
            response = httpx2.get(f"{live.address}/v1/models", headers=[(b"Authorization", header.encode("latin-1"))])
            error_of(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        # The key is checked before the body is read.
        error_of(httpx2.post(f"{live.address}/v1/chat/completions", content=b"{"), 401)
        assert live.chat().choices[0].message.content


def test_the_size_of_a_body_is_limited():
    with running(ServerSettings(max_body=5000)) as live:
        error = error_of(live.post("/tokenize", prompt="x" * 5000), 413)
        assert error["code"] == "body_too_large"

        def pieces():
            for _ in range(100):
                yield b"x" * 100

        error_of(live.http.post("/tokenize", content=pieces(), headers={"content-type": "application/json"}), 413)
        assert live.post("/tokenize", prompt="x" * 4000).status_code == 200


def test_the_number_of_values_in_a_body_is_limited(live):
    values = {"tokens": [1] * (json_reader.MAX_VALUES + 1)}
    error = error_of(live.post("/detokenize", **values), 413)
    assert "commas and brackets" in error["message"]
    assert live.post("/detokenize", tokens=[1] * 5000).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [1] * 1000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 1000}]}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [1] * 1000}),
        ("/v1/completions", {"prompt": [1, *[-1] * 1000]}),
        ("/v1/completions", {"prompt": ["a", *[1] * 1000]}),
        ("/v1/responses", {"input": [1] * 1000}),
        ("/v1/responses", {"input": [{"role": "user", "content": [1] * 1000}]}),
        ("/detokenize", {"tokens": [-1] * 1000}),
    ],
)
def test_only_the_first_of_many_errors_is_searched_for(path, body):
    kinds = {path: route.body for path, route in ENDPOINTS.items()} | {"/detokenize": DetokenizeRequest}
    with pytest.raises(ValidationError) as caught:
        kinds[path].model_validate(body)
    assert caught.value.error_count() == 1


def test_the_documentation_names_existing_options_and_metrics(live):
    live.chat()
    reported = live.http.get("/metrics").text
    for name in ("serving.md", "grafana.json"):
        text = (DOCS / name).read_text(encoding="utf-8")
        assert not [one for one in re.findall(r"aria_[a-z_]+", text) if one not in reported]
    parameters = get_command(app).commands["serve"].params
    known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    named = set(re.findall(r"--[a-z][a-z-]+", (DOCS / "serving.md").read_text(encoding="utf-8")))
    assert named - known == {"--gpus", "--help"}, "one is docker's, the other belongs to every command"
    assert set(re.findall(r"--[a-z-]+", (DOCS / "aria.service").read_text(encoding="utf-8"))) - known == {"--now"}


class Busy:
    """Long responses that run until the block ends."""

    def __init__(self, live, count: int):
        self._streams = [live.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True})
                         for _ in range(count)]  # fmt: skip

    def __enter__(self):
        for stream in self._streams:
            assert stream.__enter__().status_code == 200

    def __exit__(self, *error):
        for stream in self._streams:
            stream.__exit__(*error)
        until(idle)


def test_concurrent_requests_per_key_are_limited():
    settings = ServerSettings(api_keys=("one", "two"), max_concurrency_per_key=2)
    with running(settings, key="one") as live:
        with Busy(live, 2):
            response = live.post("/v1/chat/completions", messages=HELLO)
            assert error_of(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
            other = httpx2.post(
                f"{live.address}/v1/chat/completions",
                json={"messages": HELLO, "max_tokens": 1},
                headers={"Authorization": "Bearer two"},
                timeout=30,
            )
            assert other.status_code == 200
            assert live.http.get("/v1/models").status_code == 200, "only requests to the model are counted"
        assert live.chat().choices


def test_the_queue_is_limited():
    with running(ServerSettings(max_queue=0)) as live:
        places = live.app.state.active_requests.capacity
        with Busy(live, places):
            response = live.post("/v1/chat/completions", messages=HELLO)
            assert error_of(response, 503)["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
            assert live.http.get("/health").json() == {"status": "ok"}
        assert live.app.state.active_requests.running == 0
        assert live.chat().choices


def test_a_server_that_shuts_down_refuses_new_requests(live):
    traffic = live.app.state.active_requests
    assert live.http.get("/ready").json() == {"status": "ready"}
    traffic.draining = True
    try:
        error_of(live.http.get("/ready"), 503)
        response = live.post("/v1/chat/completions", messages=HELLO)
        error_of(response, 503)
        assert response.headers["retry-after"]
        assert live.http.get("/health").status_code == 200
    finally:
        traffic.draining = False


def test_metrics_count_what_happened(live):
    def read() -> dict[str, float]:
        lines = [line for line in live.http.get("/metrics").text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    usage = live.chat().usage
    live.post("/v1/chat/completions", messages=HELLO, temperature=3)
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("aria_prompt_tokens_total") == usage.prompt_tokens
    assert grown("aria_completion_tokens_total") == usage.completion_tokens
    assert grown("aria_time_to_first_token_seconds_count") == 1
    assert grown("aria_request_duration_seconds_count") == 1
    assert grown('aria_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert grown('aria_requests_total{route="/v1/chat/completions",status="400"}') == 1
    assert after["aria_requests_running"] == after["aria_requests_waiting"] == 0
    assert 0 <= after["aria_cache_usage_ratio"] <= 1
    assert after["aria_prefix_cache_hits_total"] <= after["aria_prefix_cache_queries_total"]


def test_well_formed_request_ids_of_clients_are_kept(live):
    assert live.http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert live.http.get("/health", headers={"X-Request-Id": "no good"}).headers["x-request-id"].startswith("req-")


def test_an_internal_error_is_a_500_without_details(live, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(live.app.state.service.processor, "prepare", broken)
    response = live.post("/v1/chat/completions", messages=HELLO)
    error = error_of(response, 500)
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


def test_a_failed_step_is_reported_and_the_server_continues(live, monkeypatch, caplog):
    failing = threading.Event()
    step = engine().engine.step

    def fails():
        if failing.is_set() and not idle():
            raise RuntimeError("secret")
        return step()

    monkeypatch.setattr(engine().engine, "step", fails)
    stream = iter(live.chat(stream=True, max_tokens=3000, extra_body={"ignore_eos": True}))
    next(stream)
    failing.set()
    with pytest.raises(openai.APIError, match="the server failed on this request"):
        list(stream)
    assert "secret" in caplog.text
    until(idle)
    error_of(live.post("/v1/chat/completions", messages=HELLO), 500)
    failing.clear()
    assert live.chat().choices[0].message.content


def test_a_failed_step_is_a_server_error_and_health_reports_it(live, monkeypatch):
    launch = engine().engine.core.runner.launch

    def fails(_):
        raise ValueError("secret")

    assert live.http.get("/health").status_code == 200
    monkeypatch.setattr(engine().engine.core.runner, "launch", fails)
    error_of(live.post("/v1/chat/completions", messages=HELLO), 500)
    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda _: httpx2.get(f"{live.address}/health", timeout=30), range(4)))
    assert [error_of(response, 503)["code"] for response in asked] == ["unhealthy"] * 4
    monkeypatch.setattr(engine().engine.core.runner, "launch", launch)
    # The health check finds out by itself that the model responds again.
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.chat().choices[0].message.content
    until(idle)


def test_health_reports_a_hanging_step_until_it_returns(live, monkeypatch):
    service, launch = live.app.state.service, engine().engine.core.runner.launch
    entered, released = threading.Event(), threading.Event()

    def hangs(plan):
        entered.set()
        assert released.wait(120)
        return launch(plan)

    def gauge(name: str) -> float:
        text = live.http.get("/metrics").text
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    assert gauge("aria_healthy") == 1 and gauge("aria_step_seconds") == 0
    # By default it depends on the model and the device: nano on a CPU is quick.
    assert service.max_step_seconds == 4.0
    monkeypatch.setattr(service, "settings", replace(service.settings, step_seconds=120.0))
    monkeypatch.setattr(engine().engine.core.runner, "launch", hangs)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.post, "/v1/chat/completions", messages=HELLO, max_tokens=2)
        try:
            assert entered.wait(120)
            # Two minutes have not passed yet.
            assert live.http.get("/health").status_code == live.http.get("/ready").status_code == 200
            monkeypatch.setattr(service, "settings", replace(service.settings, step_seconds=1e-3))
            until(lambda: engine().step_seconds > 1e-3)
            error = error_of(live.http.get("/health"), 503)
            assert error["code"] == "unhealthy" and "at most 0.001 s are allowed (--step-seconds)" in error["message"]
            assert error_of(live.http.get("/ready"), 503)["code"] == "overloaded"
            assert gauge("aria_healthy") == 0 and gauge("aria_step_seconds") > 0
        finally:
            released.set()
        assert answer.result().status_code == 200
    until(lambda: engine().step_seconds == 0)
    assert live.http.get("/health").status_code == live.http.get("/ready").status_code == 200
    assert gauge("aria_healthy") == 1


def test_generation_that_its_grammar_stops_is_an_error(live, monkeypatch):
    async def pieces(*_, **__):
        answer = SimpleNamespace(cached_tokens=0)
        for finish in (None, "error"):
            yield SimpleNamespace(answer=answer, choice=0, text="{", token_id=5, logprob=None, finish_reason=finish)

    monkeypatch.setattr(live.app.state.service.engine, "pieces", pieces)
    error = error_of(live.post("/v1/chat/completions", messages=HELLO), 500)
    assert "schema" in error["message"]
    with pytest.raises(openai.APIError, match="schema"):
        list(live.chat(stream=True))
    with pytest.raises(openai.APIError, match="schema"):
        list(live.openai.responses.create(model="aria-nano", input="hello", stream=True))


@pytest.mark.parametrize(
    "fields",
    [{"max_body": 0}, {"max_queue": -1}, {"max_concurrency_per_key": 0}, {"temperature": 3}, {"api_keys": ("",)},
     {"drain_seconds": -1}, {"step_seconds": 0}, {"step_seconds": math.nan}, {"model_names": ()},
     {"header_seconds": 0}, {"body_seconds": -1}, {"idle_seconds": 0}, {"write_seconds": 0}, {"request_seconds": 0},
     {"max_connections": 0}, {"max_connections_per_address": 0}, {"max_header_bytes": 10}, {"held_body_bytes": 0},
     {"max_media": -1}, {"trusted_proxies": ("*",)}, {"trusted_proxies": ("proxy.example",)},
     {"allowed_hosts": ("http://aria.example",)}, {"allowed_hosts": ("aria.example:80",)}, {"allowed_hosts": ("",)}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError):
        ServerSettings(**fields)


def test_settings_in_range_are_accepted():
    ServerSettings(trusted_proxies=("10.0.0.1", "10.0.0.0/8", "fd00::/8"), request_seconds=None)
    ServerSettings(allowed_hosts=("aria.example", "*.example", "*", "my_host"), request_seconds=math.inf)


def test_anonymous_access_is_detected():
    assert allows_anonymous_access("0.0.0.0", ())
    assert not allows_anonymous_access("0.0.0.0", ("key",))
    assert not allows_anonymous_access("127.0.0.1", ())
