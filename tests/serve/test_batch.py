"""``aria batch``: OpenAI's batch files, answered as by the server, once each despite interruptions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from aria import AsyncEngine
from aria.hub import NANO
from aria.serve.batch import BatchFile, _lines, find_lines
from aria.serve.settings import ServerSettings
from tests.helpers.signals import start_interrupted

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def request(custom_id: str, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def ask(text: str, **settings: Any) -> dict[str, Any]:
    return {"model": "aria-nano", "messages": [{"role": "user", "content": text}], "temperature": 0, **settings}


def show(picture: str, text: str) -> dict[str, Any]:
    data = base64.b64encode((PICTURES / picture).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": text},
    ]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0}


def show_document(text: str) -> dict[str, Any]:
    data = base64.b64encode((ROOT / "docs" / "cookbook" / "media" / "pages.pdf").read_bytes()).decode()
    file = {"file_data": data, "filename": "pages.pdf", "pages": "2", "split": False}
    parts = [{"type": "file", "file": file}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0}


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in requests), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(capsys, command):
    """Run ``aria batch`` with arguments; returns exit code and errors."""

    def call(*arguments: object):
        code = command("batch", *arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return call


@pytest.mark.slow
def test_lines_are_answered_as_by_the_server(run, tmp_path):
    requests = [
        request("hello", ask("hello")),
        request("picture", show("word.png", "What does it say?")),
        request("document", show_document("What does it say?")),
        request("two", ask("hello", n=2, logprobs=True, top_logprobs=2, max_tokens=3)),
        request("text", {"model": "aria-nano", "prompt": "hello", "max_tokens": 4, "temperature": 0}, COMPLETIONS),
        request("response", {"model": "aria-nano", "input": "hello", "temperature": 0}, RESPONSES),
        request("other model", ask("hello", model="gpt-4o")),
        request("unknown field", ask("hello", beams=4)),
        request("bad value", ask("hello", temperature=3)),
        request("stream", ask("hello", stream=True)),
        request("no picture", show("draw.py", "What is this?")),
        request("local", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": str(PICTURES / "word.png")}},
        ]}]}),
    ]  # fmt: skip
    out = tmp_path / "out.jsonl"
    code, err = run(write(tmp_path / "in.jsonl", requests), out)
    assert (code, err) == (1, "6 done, 6 failed\n")
    lines = {line["custom_id"]: line for line in read(out)}
    assert set(lines) == {one["custom_id"] for one in requests}
    assert len({line["id"] for line in lines.values()}) == len(requests)
    for line in lines.values():
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert list(line["response"]) == ["status_code", "request_id", "body"]
        assert line["error"] is None
    statuses = {name: line["response"]["status_code"] for name, line in lines.items()}
    assert statuses == {
        **dict.fromkeys(["hello", "picture", "document", "two", "text", "response"], 200),
        **dict.fromkeys(["unknown field", "bad value", "stream", "no picture", "local"], 400),
        "other model": 404,
    }
    bodies = {name: line["response"]["body"] for name, line in lines.items()}
    assert bodies["picture"]["choices"][0]["message"]["content"] == "Welcome"
    assert bodies["document"]["choices"][0]["message"]["content"] == "Budget"
    assert (bodies["hello"]["object"], bodies["text"]["object"]) == ("chat.completion", "text_completion")
    assert bodies["response"]["object"] == "response"
    assert [choice["index"] for choice in bodies["two"]["choices"]] == [0, 1]
    assert len(bodies["two"]["choices"][1]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert bodies["hello"]["usage"]["total_tokens"] > bodies["hello"]["usage"]["completion_tokens"] > 0
    params = {name: bodies[name]["error"]["param"] for name in ("unknown field", "bad value", "stream", "other model")}
    assert params == {
        "unknown field": "beams", "bad value": "temperature", "stream": "stream", "other model": "model",
    }  # fmt: skip


@pytest.mark.slow
def test_lines_may_be_added_and_files_allowed(run, tmp_path):
    parts = [
        {"type": "image_url", "image_url": {"url": str(PICTURES / "emoji.png")}},
        {"type": "text", "text": "Which emoji is this?"},
    ]
    requests = [request("a", ask("hello")), request("b", {"messages": [{"role": "user", "content": parts}]})]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert run(write(source, requests[:1]), out) == (0, "1 done\n")
    first = out.read_bytes()
    # A kill during a write leaves a partial line.
    out.write_bytes(first + first[:40])
    requests[1]["body"]["temperature"] = 0
    code, err = run(write(source, requests[::-1]), out, "--allow-local", PICTURES)
    assert (code, err) == (0, "1 done, 1 done before\n")
    assert out.read_bytes().startswith(first)
    assert [line["custom_id"] for line in read(out)] == ["a", "b"]
    assert read(out)[1]["response"]["body"]["choices"][0]["message"]["content"] == "octopus"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: not JSON"),
        (["[]"], "line 1: expected an object with custom_id, method, url, body"),
        ([{"custom_id": "a", "method": "POST", "url": CHAT}], "line 1: body missing"),
        ([{**request("a", {}), "when": "now"}], "line 1: unknown when"),
        ([request("", {})], "line 1: custom_id is ''; expected a non-empty string"),
        ([{**request("a", {}), "method": "GET"}], "line 1: method is 'GET'; expected 'POST'"),
        ([request("a", {}, "/v1/embeddings")], "line 1: url is '/v1/embeddings'; expected one of"),
        ([request("a", []), request("b", {}), "", request("b", {})], "line 4: the custom_id 'b' is line 2's already"),  # type: ignore[arg-type]
        ([request("a", [])] * 12, "line 10: body is []; expected an object; and 2 more"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_batch_is_refused_before_anything_runs(run, tmp_path, lines, message):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    code, err = run(source, tmp_path / "out.jsonl")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_files_are_not_mixed_up(run, tmp_path):
    source = write(tmp_path / "in.jsonl", [request("a", ask("hello"))])
    before = source.read_bytes()
    code, err = run(source, source)
    assert code == 2 and "is the input" in err
    other = write(tmp_path / "other.jsonl", [{"text": "something else"}])
    code, err = run(source, other)
    assert code == 2 and "not a response of a batch" in err
    code, err = run(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")
    assert code == 2 and "nowhere.jsonl" in err
    assert source.read_bytes() == before and len(read(other)) == 1


@pytest.mark.slow
def test_a_changed_request_is_refused_by_name(run, tmp_path):
    requests = [request(name, ask(f"hello {name}", max_tokens=2)) for name in "abc"]
    source, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    assert run(source, out)[0] == 0
    complete = out.read_bytes()
    assert all(len(line["id"]) == len("batch_req_") + 40 for line in read(out))
    # The same request in other JSON formatting is the same.
    source.write_text("\n".join(json.dumps(one, indent=None, sort_keys=True) + "  " for one in reversed(requests)))
    assert run(source, out) == (0, "0 done, 3 done before\n")
    requests[0]["body"]["max_tokens"] = 3
    requests[2]["url"] = COMPLETIONS
    code, err = run(write(source, requests), out)
    message = " ".join(err.split())
    assert code == 2 and "Name another output, or delete their lines" in message
    # In the order of the output.
    assert "the request of 'a', 'c'." in message or "the request of 'c', 'a'." in message
    assert out.read_bytes() == complete
    # As the message says.
    [other] = [line for line in complete.splitlines(keepends=True) if json.loads(line)["custom_id"] == "b"]
    out.write_bytes(other)
    requests[2]["url"] = CHAT
    assert run(write(source, requests), out) == (0, "2 done, 1 done before\n")


@pytest.mark.slow
def test_an_output_of_another_model_is_not_resumed(run, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [request("a", ask("hello", max_tokens=2))]), tmp_path / "out.jsonl"
    assert run(source, out)[0] == 0
    shutil.copytree(NANO, tmp_path / "copy")
    code, err = run(source, out, "--model", tmp_path / "copy", "--served-model-name", "aria-nano")
    assert code == 2 and "the model of 'a'." in " ".join(err.split())


def test_responses_of_earlier_versions_are_accepted(tmp_path):
    work = BatchFile(tmp_path / "in.jsonl", ServerSettings())
    [line] = find_lines(write(tmp_path / "in.jsonl", [request("a", ask("hello"))]))
    assert work.changed(line, {"id": "batch_req_0123456789abcdef0123456789abcdef", "custom_id": "a"}) is None
    assert work.changed(line, {"custom_id": "a"}) is None
    assert work.changed(line, work.give_up(line, RuntimeError())) is None


def test_an_endless_line_is_refused_and_not_held_in_memory(run, tmp_path, monkeypatch):
    monkeypatch.setattr("aria.serve.batch.MAX_LINE_BYTES", 1000)
    source = tmp_path / "in.jsonl"
    lines = [json.dumps(request("a", ask("hello"))), json.dumps(request("b", ask("x" * 3_000_000))), "{}"]
    source.write_text("\n".join(lines))
    code, err = run(source, tmp_path / "out.jsonl")
    reported = " ".join(err.split())
    assert code == 2 and "line 2: it has 3,000," in reported and "at most 1,000 are read; line 3: custom_id" in reported
    with source.open("rb") as file:
        assert [len(content) for content, _ in _lines(file)] == [len(lines[0]) + 1, 1001, 2]


def test_videos_and_documents_are_recognized(tmp_path):
    def parts(kind: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": kind}]}]

    requests = [
        request("text", ask("hello")),
        request("picture", {"messages": parts("image_url")}),
        request("clip", {"messages": parts("video_url")}),
        request("document", {"messages": parts("file")}),
        request("document too", {"input": parts("input_file")}, RESPONSES),
        request("nonsense", {"messages": {"content": 3}, "input": [1, {"content": "x"}]}),
    ]
    heavy = {line.custom_id: line.heavy for line in find_lines(write(tmp_path / "in.jsonl", requests))}
    assert [name for name, value in heavy.items() if value] == ["clip", "document", "document too"]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["b", None])
def test_an_input_that_changes_during_a_run_ends_the_batch(tmp_path, other):
    source = write(tmp_path / "in.jsonl", [request("a", ask("hello"))])
    lines = find_lines(source)
    source.write_text("" if other is None else json.dumps(request(other, ask("hello"))))
    with (
        contextlib.closing(BatchFile(source, ServerSettings())) as work,
        AsyncEngine() as engine,
        pytest.raises(OSError, match="changed while it was being answered"),
    ):
        asyncio.run(work.do(engine, lines[0]))


def test_a_request_that_breaks_the_engine_is_a_500(tmp_path, caplog):
    work = BatchFile(tmp_path / "in.jsonl", ServerSettings())
    [line] = find_lines(write(tmp_path / "in.jsonl", [request("a", ask("hello"))]))
    record = work.give_up(line, RuntimeError("a step failed"))
    assert work.recognize(record) == ("a", True)
    response = record["response"]
    assert (response["status_code"], response["body"]["error"]["type"]) == (500, "server_error")
    assert "a step failed" not in json.dumps(record)
    assert response["request_id"] in caplog.text and "a step failed" in caplog.text


SLOW = {"max_tokens": 40, "ignore_eos": True}
"""Answers that take a while."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_killed_batch_loses_nothing_and_does_nothing_twice(run, tmp_path):
    names = [f"line {i}" for i in range(8)]
    requests = [request(name, ask(f"hello {name}", seed=i, **SLOW)) for i, name in enumerate(names)]
    source, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    kept: list[bytes] = []
    for kill, lines in ((signal.SIGKILL, 1), (signal.SIGINT, 3)):
        written = "aria.jobs.journal:Journal.write"
        process = start_interrupted(written, lines, kill, "batch", source, out, "--at-once", "2")
        _, err = process.communicate()
        if kill == signal.SIGINT:
            assert process.returncode == 130
            assert b"stopped, rerun to resume" in err and b"Traceback" not in err
        else:
            assert process.returncode == -signal.SIGKILL
        complete = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        assert complete[: len(kept)] == kept
        assert len(kept) + lines <= len(complete) < len(names)
        kept = complete
    code, err = run(source, out)
    assert (code, err) == (0, f"{len(names) - len(kept)} done, {len(kept)} done before\n")
    lines = out.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(names)
    # All runs together wrote what one run writes.
    again = tmp_path / "again.jsonl"
    assert run(source, again)[0] == 0
    texts = [
        {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in read(file)}
        for file in (out, again)
    ]
    assert texts[0] == texts[1]
