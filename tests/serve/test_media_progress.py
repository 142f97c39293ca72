"""Progress of reading media as events before a response, and previews."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from aria.media.read import shared_workers
from tests.helpers.made_media import clip, pdf
from tests.helpers.serving import PICTURES, data_uri, engine, idle, running, until
from tests.hostile.bad_drawings import nested_forms

WORD = {"type": "image_url", "image_url": {"url": data_uri((PICTURES / "word.png").read_bytes())}}
PAGES = data_uri(pdf(*[(200, 100)] * 3), "application/pdf")
THREE = {"type": "file", "file": {"file_data": PAGES, "detail": "low", "split": False}}
CHAT = {"stream": True, "stream_options": {"include_progress": True, "include_usage": True}, "max_tokens": 2}


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


@pytest.fixture(autouse=True)
def uncached(live):
    """Clears the caches of media."""
    processor = engine().engine.processor
    media, processor.media = processor.media, replace(processor.media, cache_bytes=0)
    yield
    processor.media = media


def events(response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *data, done = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


def said(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_progress_of_pages_precedes_the_response(live):
    chunks = events(live.post("/v1/chat/completions", messages=said(THREE), **CHAT))
    reported = [chunk.pop("progress") for chunk in chunks if "progress" in chunk]
    assert reported[:4] == [{"kind": "document", "done": done, "total": 3} for done in range(4)]
    assert all(
        chunk["choices"] == [] and chunk["object"] == "chat.completion.chunk" for chunk in chunks[: len(reported)]
    )
    assert chunks[len(reported)]["choices"][0]["delta"]["role"] == "assistant"
    assert {chunk["id"] for chunk in chunks} == {chunks[-1]["id"]}
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def test_frames_and_images_are_counted(live):
    video = {"type": "video_url", "video_url": {"url": data_uri(clip(9), "video/mp4"), "num_frames": 4}}
    chunks = events(live.post("/v1/chat/completions", messages=said(WORD, video, WORD), **CHAT))
    reported = [chunk["progress"] for chunk in chunks if "progress" in chunk]
    assert [one["done"] for one in reported if one["kind"] == "video"] == [0, 1, 2, 3, 4]
    assert {one["total"] for one in reported if one["kind"] == "video"} == {4}
    assert [one["done"] for one in reported if one["kind"] == "image"] == [0, 1, 2]


def test_progress_is_sent_only_if_requested(live):
    plain = {**CHAT, "stream_options": {"include_usage": True}}
    chunks = events(live.post("/v1/chat/completions", messages=said(THREE), **plain))
    assert not any("progress" in chunk for chunk in chunks)
    reply = live.post("/tokenize", messages=said(THREE))
    assert reply.headers["content-type"] == "application/json"
    [medium] = reply.json()["media"]
    assert (medium["total"], "preview" in medium) == (3, False)


def test_early_errors_have_a_status(live):
    hello = [{"role": "user", "content": "hello"}]
    assert live.post("/v1/chat/completions", messages=hello, model="other", **CHAT).status_code == 404
    assert live.post("/v1/chat/completions", messages=hello, temperature=9, **CHAT).status_code == 400
    no_pdf = {"type": "file", "file": {"file_data": data_uri(b"%PDF-nothing", "application/pdf")}}
    for path, fields in (("/v1/chat/completions", CHAT), ("/tokenize", {"stream": True})):
        refused = live.post(path, messages=said(no_pdf), **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_later_errors_end_the_stream(live):
    broken = {"type": "image_url", "image_url": {"url": data_uri(b"no picture")}}
    for path, fields in (("/v1/chat/completions", CHAT), ("/tokenize", {"stream": True})):
        reply = live.post(path, messages=said(THREE, broken), **fields)
        assert reply.status_code == 200
        *_, last = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: ")]
        assert last["error"]["type"] == "invalid_request_error" and "not an image" in last["error"]["message"]
    until(idle)


def test_costs_are_streamed_with_previews(live):
    fields = {"messages": said(WORD, THREE), "return_previews": True}
    *reported, answer = events(live.post("/tokenize", **fields, stream=True))
    assert {"progress": {"kind": "document", "done": 2, "total": 3}} in reported
    assert answer == live.post("/tokenize", **fields).json()
    sizes = []
    for medium in answer["media"]:
        kind, data = medium["preview"].split(",")
        assert kind == "data:image/webp;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(320, 160), (224, 112)], "the page is as the model sees it"
    assert [medium.get("total") for medium in answer["media"]] == [None, 3]
    some = {**THREE, "file": {**THREE["file"], "pages": "2"}}
    [medium] = live.post("/tokenize", messages=said(some)).json()["media"]
    assert (medium["count"], medium["total"]) == (1, 3)


@pytest.mark.parametrize(("path", "fields"), [("/v1/chat/completions", CHAT), ("/tokenize", {"stream": True})])
def test_a_disconnect_stops_the_reading_of_pages(live, path, fields):
    workers = shared_workers(engine().engine.processor.media)
    file_data = data_uri(nested_forms(Random(0), 9, 10), "application/pdf")
    endless = {**THREE, "file": {**THREE["file"], "file_data": file_data}}
    with live.http.stream("POST", path, json={"messages": said(endless), **fields}) as stream:
        assert '"done":0,"total":1' in next(stream.iter_lines())
        assert workers.busy == 1
    until(lambda: workers.busy == 0, seconds=2)
