"""Clips and documents in messages: the text around frames and pages, token counts, and all ways to pass them."""

from __future__ import annotations

import base64
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aria import Engine, SamplingParams
from aria.processor import AriaProcessor, DocumentPart, MediaSettings, Prompt, VideoPart, render
from aria.processor import expand as expanding
from aria.processor.expand import expand, resolve_defaults
from aria.processor.image_inputs import Medium
from tests.helpers.made_media import authors, clip, number_in, pdf

SLOT = "<fim_prefix><|img|><fim_suffix>"
CLIP, PDF = clip(50, g="10"), pdf((60, 30), (30, 60), (40, 40))
PICTURE = Image.new("RGB", (50, 40), (9, 200, 9))


@pytest.fixture(scope="module")
def processor() -> AriaProcessor:
    processor = AriaProcessor.from_pretrained()
    # As in Aria's settings; nano uses the smallest size for everything.
    processor.image_processor.max_image_size = processor.image_processor.sizes[-1]
    return processor


def made_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(processor: AriaProcessor, *parts: Any, **settings: Any) -> Prompt:
    prompt = render([{"role": "user", "content": list(parts)}])
    return expand(
        resolve_defaults(prompt, processor.image_processor, **settings), processor.image_processor, processor.media
    )[0]


def body(prompt: str) -> str:
    return str(prompt).removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n")


def test_text_around_frames_and_pages(processor: AriaProcessor) -> None:
    video = {"type": "video", "video": CLIP, "num_frames": 2}
    prompt = opened(processor, {"type": "text", "text": "<|img|> A: "}, video, {"type": "text", "text": "B"})
    assert body(prompt) == f"<|img|> A: [00:00]{SLOT}\n[00:01]{SLOT}\nB"
    assert len(prompt.slots) == 2 and [number_in(part.source) for part in prompt.parts] == authors(50, 2)
    assert (
        body(opened(processor, {**video, "timestamps": False}, video)) == f"{SLOT * 2}\n[00:00]{SLOT}\n[00:01]{SLOT}\n"
    )
    document = {"type": "document", "document": PDF, "pages": "3,1"}
    prompt = opened(processor, document, {"type": "text", "text": "?"})
    assert body(prompt) == f"Page 3: {SLOT}\nPage 1: {SLOT}\n?"
    assert [part.source.shape for part in prompt.parts] == [(80, 80, 3), (60, 120, 3)]


def test_defaults_arguments_and_parts_in_this_order(processor: AriaProcessor) -> None:
    small, large = processor.image_processor.sizes
    kinds: tuple[dict[str, Any], ...] = (
        {"type": "image", "image": PICTURE},
        {"type": "video", "video": CLIP, "num_frames": 1},
        {"type": "document", "document": PDF, "pages": [1]},
    )

    def decided(own: dict[str, Any], **settings: Any) -> list[tuple[Any, Any]]:
        parts = opened(processor, *({**kind, **own} for kind in kinds), **settings).parts
        return [(part.max_image_size, part.split_image) for part in parts]

    assert decided({}) == [(large, False), (small, False), (large, True)]
    assert decided({}, max_image_size=small, split_image=True) == [(small, True)] * 3
    assert (
        decided({"max_image_size": large, "split_image": False}, max_image_size=small, split_image=True)
        == [(large, False)] * 3
    )


def test_frames_in_memory_are_no_larger_than_their_crops(processor: AriaProcessor) -> None:
    large = clip(4, draw=lambda number: np.full((400, 640, 3), 40 * number, np.uint8))
    size = processor.image_processor.sizes[0]
    [part] = opened(processor, {"type": "video", "video": large, "num_frames": 1}).parts
    width, height = processor.image_processor.fit((640, 400), size)
    assert part.source.shape == (height, width, 3) and max(width, height) == size
    [part] = opened(processor, {"type": "video", "video": large, "num_frames": 1, "split_image": True}).parts
    assert part.source.shape == (400, 640, 3), "tiles are cut from the whole"
    [part] = opened(processor, {"type": "video", "video": clip(1), "num_frames": 1}).parts
    assert part.source.shape == (96, 128, 3), "never larger than it was"


def test_token_counts_of_a_conversation(processor: AriaProcessor) -> None:
    small, large = processor.image_processor.sizes
    content = [
        {"type": "text", "text": "look"},
        {"type": "video", "video": CLIP, "num_frames": 3},
        {"type": "image", "image": PICTURE},
        {"type": "document", "document": PDF},
        {"type": "video", "video": CLIP, "fps": 1.0, "max_image_size": large},
    ]
    prepared = processor.prepare([{"role": "system", "content": content[2:3]}, {"role": "user", "content": content}])
    tokens = processor.size_conversion
    picture, first, again, document, second = prepared.media
    assert picture == again == Medium("image", 1, 1, tokens[large])
    assert first == Medium("video", 3, 3, 3 * tokens[small])
    assert document.kind == "document" and document.count == 3 and document.crops > 3
    assert document.tokens == document.crops * tokens[large]
    assert second == Medium("video", 2, 2, 2 * tokens[large])
    assert sum(medium.tokens for medium in prepared.media) == prepared.ids.count(processor.tokenizer.image_token_id)
    assert sum(medium.count for medium in prepared.media) == len(prepared.images)
    assert processor.prepare([{"role": "user", "content": "hello"}]).media == []


def test_all_ways_to_pass_a_clip_give_the_same(processor: AriaProcessor, tmp_path: Path) -> None:
    (tmp_path / "clip.bin").write_bytes(CLIP)
    path, uri = tmp_path / "clip.bin", "data:video/mp4;base64," + base64.b64encode(CLIP).decode()

    def messages(**source: Any) -> list[dict[str, Any]]:
        part = {"type": "video", "num_frames": 3, **source}
        return [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]

    def call(text: Any, **media: Any) -> Any:
        return processor(text=text, return_tensors="pt", **media)

    template = processor.apply_chat_template
    bare = template(messages())
    assert body(bare) == f"{SLOT}what?", "a clip is one place until it is opened"
    everything = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ways = [
        *(call(template(messages(**source))) for source in ({"video": CLIP}, {"path": path}, {"url": str(path)})),
        call(template(messages(url=uri))),
        *(call(bare, videos=videos) for videos in (CLIP, [path], [[str(path)]], uri)),
        template(messages(), videos=[CLIP], **everything),
        template(messages(path=path), **everything),
        call(template(messages(path="nowhere")), videos=[CLIP]),
    ]
    prepared = processor.prepare(messages(video=CLIP), add_generation_prompt=False)
    for inputs in ways:
        assert inputs.num_crops == [1, 1, 1]
        assert inputs.input_ids[0].tolist() == prepared.ids
        assert torch.equal(inputs.pixel_values, ways[0].pixel_values)


def test_plain_strings_and_clips(processor: AriaProcessor) -> None:
    inputs = processor(text=[f"{SLOT}a", "<|img|>b"], videos=[[CLIP], [CLIP]], return_tensors="pt")
    assert len(inputs.num_crops) == 100 and inputs.pixel_values.shape[-1] == processor.image_processor.sizes[0]
    text = [processor.decode([i for i in row if i != processor.tokenizer.image_token_id], skip_special_tokens=False)
            for row in inputs.input_ids.tolist()]  # fmt: skip
    assert text[0].endswith("[00:01]<fim_prefix><fim_suffix>\na") and text[1].endswith("[00:01]\nb")
    with pytest.raises(ValueError, match="does not say which"):
        processor(text=SLOT * 2, images=PICTURE, videos=CLIP)
    with pytest.raises(ValueError, match=r"the prompts have 1 clip slots .* but 2 clips were given"):
        processor(text=SLOT, videos=[CLIP, CLIP])
    with pytest.raises(ValueError, match=r"2 image slots .* but 0 images"):
        processor(text=SLOT * 2)


def test_images_and_clips_in_one_batch_share_a_size(processor: AriaProcessor) -> None:
    small, large = processor.image_processor.sizes
    picture, video = {"type": "image"}, {"type": "video", "num_frames": 2}

    def sides(*parts: Any, images: Any = None, **settings: Any) -> int:
        messages = [{"role": "user", "content": list(parts)}]
        inputs = processor.apply_chat_template(
            messages, images=images, videos=CLIP, tokenize=True, return_dict=True, return_tensors="pt", **settings
        )
        return inputs.pixel_values.shape[-1]

    assert sides(video) == small
    assert sides(video, max_image_size=large) == large
    assert sides(picture, video, images=PICTURE) == large
    assert sides({**picture, "max_image_size": small}, video, images=PICTURE) == small
    with pytest.raises(ValueError, match="give all parts the same max_image_size"):
        sides(picture, {**video, "max_image_size": small}, images=PICTURE)


@pytest.mark.parametrize(("part", "complaint"), [
    ({"type": "video", "num_frames": 0}, "num_frames of part 0 of message 0 should be a whole number above 0"),
    ({"type": "video", "num_frames": True}, "num_frames of part 0"),
    ({"type": "video", "num_frames": 4, "fps": 1}, "gives num_frames and fps"),
    ({"type": "video", "max_frames": 4}, "max_frames of part 0 of message 0 requires fps"),
    ({"type": "video", "fps": float("inf")}, "fps of part 0 of message 0 should be a number above 0"),
    ({"type": "video", "fps": float("nan")}, "fps of part 0"),
    ({"type": "video", "timestamps": 1}, "timestamps of part 0 of message 0 should be a bool"),
    ({"type": "video", "pages": "1"}, "unknown keys: pages; video parts support type, video, path, url, num_frames"),
    ({"type": "video", "video": b"", "url": "a"}, "gives its video as video and url"),
    ({"type": "video", "url": b"abc"}, "objects go under video"),
    ({"type": "document"}, "has no source"),
    ({"type": "document", "path": "a", "pages": 3}, 'pages of part 0 of message 0 should be text such as "1-3,7"'),
    ({"type": "document", "path": "a", "pages": [1.0]}, "pages of part 0"),
    ({"type": "document", "document": PDF, "video": CLIP}, "unknown keys: video"),
    ({"type": ["video"]}, "has the type ['video']"),
])  # fmt: skip
def test_invalid_parts(part: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError) as error:
        render([{"role": "user", "content": [part]}])
    assert complaint in str(error.value)


def test_parts_keep_their_settings() -> None:
    parts = [
        {"type": "video", "path": "a.mp4", "fps": 2, "max_frames": 9, "timestamps": False, "max_image_size": 490},
        {"type": "document", "url": "https://example.org/a.pdf", "pages": [1, 3], "split_image": False},
    ]
    assert render([{"role": "tool", "content": parts}]).parts == (
        VideoPart(Path("a.mp4"), 490, fps=2, max_frames=9, timestamps=False),
        DocumentPart("https://example.org/a.pdf", split_image=False, pages=(1, 3)),
    )


def test_limits_of_the_processor_apply_everywhere(tmp_path: Path) -> None:
    processor = AriaProcessor.from_pretrained()
    processor.media = MediaSettings(local_folders=(), max_frames=4, max_pages=2, image_pixels=1000)
    PICTURE.save(tmp_path / "a.png")
    for part, message in (
        ({"type": "image", "path": tmp_path / "a.png"}, "local files are not allowed here"),
        ({"type": "video", "path": tmp_path / "a.mp4"}, "local files are not allowed here"),
        ({"type": "document", "url": str(tmp_path / "a.pdf")}, "local files are not allowed here"),
        ({"type": "video", "video": CLIP, "num_frames": 5}, "num_frames is 5; 1 to 4 are allowed"),
        ({"type": "document", "document": PDF}, "3 pages of .* are requested, but 2 are allowed"),
        ({"type": "image", "image": (tmp_path / "a.png").read_bytes()}, "more than the 1,000 allowed"),
        ({"type": "image", "url": "http://127.0.0.1:9/"}, "not on the public internet"),
        ({"type": "video", "video": PICTURE}, "a clip cannot be a Image"),
    ):
        messages = [{"role": "user", "content": [part]}]
        for prepare in (
            processor.prepare,
            lambda messages: processor.apply_chat_template(messages, tokenize=True),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                prepare(messages)
    prepared = processor.prepare([{"role": "user", "content": [{"type": "video", "video": CLIP}]}])
    assert prepared.media[0].count == 4, "the custom of 128 frames gives way to the limit"


def test_the_next_question_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counted(name: str, real: Any) -> Any:
        return lambda *args, **kwargs: [reads.append(name), real(*args, **kwargs)][1]

    for name in ("read_clip", "read_document"):
        monkeypatch.setattr(expanding, name, counted(name, getattr(expanding, name)))
    processor = AriaProcessor.from_pretrained()
    (tmp_path / "a.mp4").write_bytes(CLIP)

    def prepare(**part: Any) -> Any:
        return processor.prepare([{"role": "user", "content": [part]}])

    video = {"type": "video", "num_frames": 3}
    document = {"type": "document", "document": PDF}
    first = prepare(**video, video=CLIP)
    again = prepare(**video, url="data:;base64," + base64.b64encode(CLIP).decode(), timestamps=False)
    assert [one.key for one in again.images] == [one.key for one in first.images] and len(again.ids) < len(first.ids)
    prepare(**document)
    prepare(**document, split_image=False)
    prepare(**video, path=tmp_path / "a.mp4")
    prepare(**video, path=tmp_path / "a.mp4")
    assert reads == ["read_clip", "read_document", "read_document", "read_clip"], "pages that are split are larger"
    (tmp_path / "a.mp4").write_bytes(clip(3))
    assert prepare(**video, path=tmp_path / "a.mp4").images[0].key != first.images[0].key
    for other in ({"num_frames": 2}, {"max_image_size": processor.image_processor.sizes[1]}, {"split_image": True}):
        prepare(**{**video, **other}, video=CLIP)
    prepare(**document, pages="1")
    assert len(reads) == 9, "what is asked for otherwise is read anew"
    processor.media = MediaSettings(max_frames=2)
    with pytest.raises(ValueError, match="1 to 2 are allowed"):
        prepare(**video, video=CLIP)
    processor.media = MediaSettings(cache_bytes=0)
    for _ in range(2):
        prepare(**video, video=CLIP)
    assert len(reads) == 12 and processor._media_cache.nbytes == 0
    assert pickle.loads(pickle.dumps(processor)).prepare([{"role": "user", "content": "hello"}]).ids


@pytest.mark.slow
def test_the_engine_answers_about_clips_and_documents() -> None:
    engine = Engine(device="cpu")
    content = [
        {"type": "video", "video": CLIP, "num_frames": 2},
        {"type": "document", "document": PDF, "pages": "1", "split_image": False},
        {"type": "text", "text": "What is this?"},
    ]
    [result] = engine.chat([[{"role": "user", "content": content}]], SamplingParams(max_tokens=4))
    assert 1 <= len(result.token_ids) <= 4
    prepared = engine.prepare([{"role": "user", "content": content}])
    assert result.usage.prompt_tokens == len(prepared.ids)
    assert [medium.kind for medium in prepared.media] == ["video", "document"]


def test_the_pixels_of_a_prompt_are_limited_in_total() -> None:
    processor = AriaProcessor.from_pretrained()
    picture = {"type": "image", "image": made_png(100, 80)}
    video, document = {"type": "video", "video": CLIP, "num_frames": 2}, {"type": "document", "document": PDF}

    def taken(*parts: Any) -> int:
        """The least limit that lets the parts in."""
        low, high = 0, 10**7
        while high - low > 1:
            middle = (low + high) // 2
            processor.media = MediaSettings(prompt_pixels=middle)
            try:
                processor.prepare([{"role": "user", "content": list(parts)}])
                high = middle
            except ValueError as error:
                assert f"more than the {middle:,} pixels" in str(error)
                low = middle
        return high

    assert taken(picture) == 8000 and taken(picture, picture, picture) == 24000
    # Twice the size of the pages in points, in both dimensions.
    assert taken(document) == 4 * (60 * 30 + 30 * 60 + 40 * 40)
    assert taken(video, picture, document) == taken(video) + 8000 + taken(document)


def test_an_image_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = AriaProcessor.from_pretrained()
    processor.media = MediaSettings(prompt_pixels=7999)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="send fewer or smaller ones"):
        processor.prepare([{"role": "user", "content": [{"type": "image", "image": made_png(100, 80)}]}])
