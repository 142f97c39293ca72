"""Truncated conversations, and media that clients name by uuid."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from aria.engine import ContextLengthError
from aria.processor import MediaSettings
from aria.processor.image_inputs import Prepared
from aria.serve.errors import ApiError
from aria.serve.named_media import NamedMedia
from aria.serve.settings import ServerSettings
from aria.serve.truncation import prepare_latest
from tests.helpers.media_site import site
from tests.helpers.serving import PICTURES, data_uri, engine, error_of, running

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
WORD = (PICTURES / "word.png").read_bytes()


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


# Truncation


def conversation(text: str) -> list[dict]:
    """``s3 u2 a1 t9``: a system message of 3 words, a user's of 2, ..."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[one[0]], "content": "word " * int(one[1:])} for one in text.split()]


def words(messages) -> int:
    return sum(len(message["content"].split()) for message in messages)


@pytest.mark.parametrize(
    ("said", "room", "kept"),
    [
        ("u5 a5 u5", 10, "a5 u5"),
        ("s3 u5 a5 u5", 10, "s3 u5"),
        ("u5 s3 a5 u5", 13, "s3 a5 u5"),
        ("u1 a2 t6 u2", 9, "u2"),
        ("u1 a2 t6 u2", 10, "a2 t6 u2"),
        ("u3 a2 t2 t2", 6, "a2 t2 t2"),
        ("u3 u1 u50 u1", 9, "u1"),
        ("u3 a2 u14", 10, "u14"),
    ],
)
def test_the_oldest_messages_are_dropped(said, room, kept):
    def prepare(messages) -> Prepared:
        if words(messages) > 15:
            raise ContextLengthError(16, f"{words(messages)} tokens", "shorten it")
        return Prepared([messages], [])

    def measure(messages) -> int:
        if words(messages) > 40:
            raise ContextLengthError(16, "at least 40 tokens", "shorten it")
        return words(messages)

    [got] = prepare_latest(conversation(said), prepare, measure, room).ids
    assert got == conversation(kept)


def test_messages_that_must_stay_may_be_too_long():
    def never(_) -> Prepared:
        raise ContextLengthError(16, "20 tokens", "shorten it")

    for said in ("u20", "s20 u1", "s1", "u1 u20"):
        with pytest.raises(ContextLengthError):
            prepare_latest(conversation(said), never, words, 10)


@pytest.mark.slow
def test_responses_truncate_only_if_allowed(live):
    said = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 300} for i in range(15)]
    asked = {"input": said, "instructions": "Be brief.", "max_output_tokens": 4, "temperature": 0}
    assert error_of(live.post("/v1/responses", **asked), 400)["code"] == "context_length_exceeded"
    answer = live.post("/v1/responses", **asked, truncation="auto").json()
    assert answer["truncation"] == "auto" and answer["status"] in ("completed", "incomplete")
    limit = engine().engine.max_model_len

    def tokens(messages: list) -> int:
        system = {"role": "system", "content": "Be brief."}
        return live.post("/tokenize", messages=[system, *messages]).json()["count"]

    counts = [tokens(said[start:]) for start in range(len(said))]
    kept = counts.index(answer["usage"]["input_tokens"])
    assert 0 < kept < len(said) - 1, "no more is dropped than necessary"
    assert counts[kept] <= limit - 4 and counts[kept - 1] > limit - 20
    short = {"input": "hello", "max_output_tokens": 1}
    usages = [live.post("/v1/responses", **short, truncation=one).json()["usage"] for one in ("auto", "disabled")]
    assert usages[0]["input_tokens"] == usages[1]["input_tokens"]


# Media by uuid


def picture(**fields) -> list:
    return [{"role": "user", "content": [{"type": "image_url", **fields}, {"type": "text", "text": "What is it?"}]}]


def test_a_uuid_references_an_image_that_was_sent_before(live):
    url = data_uri(WORD)
    body = {"max_tokens": 6, "temperature": 0}
    plain = live.post(CHAT, messages=picture(image_url={"url": url, "detail": "low"}), **body).json()
    for fields in (
        {"image_url": {"url": url, "detail": "low"}, "uuid": "word"},
        {"image_url": {"url": None, "detail": "low"}, "uuid": "word"},
        {"image_url": {"detail": "low"}, "uuid": "word"},
    ):
        answer = live.post(CHAT, messages=picture(**fields), **body).json()
        assert answer["choices"][0]["message"] == plain["choices"][0]["message"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    for part in ({"image_url": None, "uuid": "word"}, {"uuid": "word"}):
        assert live.post("/tokenize", messages=picture(**part)).json()["media"][0]["kind"] == "image"
    error = error_of(live.post(CHAT, messages=picture(image_url=None, uuid="other")), 400)
    assert error["code"] == "media_not_cached" and "'other'" in error["message"]
    error = error_of(live.post(CHAT, messages=picture(image_url=None)), 400)
    assert error["param"] == "messages[0].content[0]" and "uuid" in error["message"]
    clip = [{"role": "user", "content": [{"type": "video_url", "video_url": None, "uuid": "word"}]}]
    assert "no video is kept" in error_of(live.post(CHAT, messages=clip), 400)["message"]


def test_a_named_image_is_not_fetched_again_and_belongs_to_its_client():
    fetched = itertools.count()
    settings = ServerSettings(
        api_keys=("one", "two"), media=MediaSettings(private_addresses=True, local_folders=(PICTURES,))
    )

    def serve(_):
        next(fetched)
        return 200, {"Content-Type": "image/png"}, WORD

    with site(serve) as address, running(settings, key="one") as live:
        for source in ({"url": f"{address}/a.png"}, None, None):
            response = live.post("/tokenize", messages=picture(image_url=source, uuid="mine"))
            assert response.status_code == 200, response.text
        assert next(fetched) == 1
        live.http.headers["Authorization"] = "Bearer two"
        assert error_of(live.post("/tokenize", messages=picture(uuid="mine")), 400)["code"] == "media_not_cached"
        for source in ({"url": str(PICTURES / "word.png")}, None):
            assert live.post("/tokenize", messages=picture(image_url=source, uuid="file")).status_code == 200


def test_the_size_of_named_media_is_limited():
    media, settings = NamedMedia(capacity=3000), MediaSettings()

    def part(uuid: str, size: int | None = None) -> list:
        source = {} if size is None else {"url": data_uri(bytes([len(uuid)]) * size)}
        return [{"role": "user", "content": [{"type": "image", "uuid": uuid, **source}]}]

    def resolve(*asked) -> bytes | Path:
        [message] = media.resolve(b"", part(*asked), settings)
        return message["content"][0]["image"]

    assert resolve("a", 900) == resolve("a") == b"\x01" * 900
    resolve("bb", 900)
    resolve("a")
    resolve("ccc", 900)  # the least recently used one is evicted
    assert resolve("a") and resolve("ccc")
    with pytest.raises(ApiError, match="'bb'"):
        resolve("bb")
    resolve("a", 100)
    assert resolve("a") == b"\x01" * 100, "a new medium replaces it"
    assert len(resolve("dddd", 5000)) == 5000
    with pytest.raises(ApiError):
        resolve("dddd")  # it was too large to keep
    assert media.nbytes <= 3000
