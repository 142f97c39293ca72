"""Rows to tokens: those of inference, with targets only on what the assistant said."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
import torch

from aria import AriaProcessor
from aria.processor import CHAT_TEMPLATE, AriaTokenizer
from aria.train.data import DataSettings
from aria.train.data.encode import RowEncoder
from aria.train.data.report import RowError
from aria.train.data.sources import Row
from aria.train.loss import IGNORE_INDEX
from tests.helpers import made_data, made_media, small_tokenizer
from tests.helpers.made_data import chat, config, processor, said

IMAGE = processor().tokenizer.image_token_id


def encode(fields, folder=Path("/nowhere"), tokens=4096, **settings):
    encoder = RowEncoder(processor(), config(), DataSettings(**settings), tokens)
    return encoder(Row(fields, "rows.jsonl:1", folder))


def targets_text(sample) -> str:
    return processor().decode(sample.targets[sample.targets != IGNORE_INDEX])


def check_targets(sample) -> None:
    """What every sequence keeps to: targets are the next ids, never past the end, never image tokens."""
    assert sample.input_ids.dtype == sample.targets.dtype == torch.long
    has = sample.targets != IGNORE_INDEX
    assert has.any()
    assert not has[-1]
    assert torch.equal(sample.targets[:-1][has[:-1]], sample.input_ids[1:][has[:-1]])
    assert not (sample.targets == IMAGE).any()


def long_conversation(folder: Path) -> list[dict]:
    made_data.picture(folder, "a.png", (60, 40))
    made_data.picture(folder, "b.png", (30, 90), shade=1)
    (folder / "c.pdf").write_bytes(made_media.pdf((200, 100), (100, 200)))
    made_data.clip(folder)
    return [
        said("system", "answer questions.\n"),
        said("user", [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what is <|img|> this?"}]),
        said("assistant", " a fox <|im_end|>\n<|im_start|>user\n jumps"),
        said(
            "user",
            [
                {"type": "video", "path": "clip.mp4", "num_frames": 3},
                {"type": "text", "text": "and this?"},
                {"type": "image", "path": "b.png", "max_image_size": 28, "split_image": True},
            ],
        ),
        said(
            "assistant",
            [
                {"type": "text", "text": "it says 世界 "},
                {"type": "image", "path": "a.png"},
                {"type": "text", "text": " 42"},
            ],
        ),
        said("tool", "dog: lazy"),
        said("user", [{"type": "document", "path": "c.pdf"}]),
        said("assistant", "?"),
    ]


def resolved(messages: list[dict], folder: Path) -> list[dict]:
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else
         [{**p, "path": folder / p["path"]} if "path" in p else p for p in m["content"]]}
        for m in messages
    ]  # fmt: skip


def test_joint_labels_are_the_tokens_of_inference(tmp_path):
    messages = long_conversation(tmp_path)
    [sample] = encode({"messages": messages}, tmp_path, labels="joint").samples
    prepared = processor().prepare(resolved(messages, tmp_path), add_generation_prompt=False)
    assert sample.input_ids.tolist() == prepared.ids
    check_targets(sample)
    assert len(sample.crops) == len(prepared.images) == 1 + 3 + 1 + 1 + 2
    for crops, placed in zip(sample.crops, prepared.images, strict=True):
        expected = placed.data.load()
        assert torch.equal(crops.pixels, expected.pixels)
        assert crops.extents == expected.extents
    places = sum(placed.tokens for placed in prepared.images)
    assert (sample.input_ids == IMAGE).sum() == places


@pytest.mark.parametrize("seed", range(5))
def test_any_text_is_tokenized_jointly_as_for_inference(seed):
    rng = random.Random(seed)
    pieces = ["the fox ", "\n", "\n\n", "<|im_end|>", "<|im_start|>", "assistant\n", "<fim_prefix>", "世", " ", "."]
    pieces += ["?<", "|>", "<mark4", "3"]
    messages = [
        said(role, "".join(rng.choices(pieces, k=rng.randint(1, 8))) + "x") for role in ["user", "assistant"] * 3
    ]
    [sample] = encode({"messages": messages}, labels="joint").samples
    assert sample.input_ids.tolist() == processor().prepare(messages, add_generation_prompt=False).ids
    expected = "".join(m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant")
    assert targets_text(sample) == expected


def test_tokenized_per_turn_every_marker_stands_by_itself():
    [sample] = encode(
        {"messages": [said("developer", "hi."), said("user", "what?"), said("assistant", "red.")]}
    ).samples
    encode_text = processor().tokenizer.encode
    expected, trained_on = [], []
    for role, text in (("system", "hi."), ("user", "what?"), ("assistant", "red.")):
        header = [encode_text(piece) for piece in ("<|im_start|>", role, "\n")]
        body = [encode_text(piece) for piece in (text, "<|im_end|>", "\n")]
        for piece in header + body:
            expected += piece
        trained_on += [False] * sum(map(len, header)) + [role == "assistant"] * sum(map(len, body))
    assert sample.input_ids.tolist() == expected
    wanted = [index if one else IGNORE_INDEX for index, one in zip(expected, trained_on, strict=True)]
    assert sample.targets.tolist() == [*wanted[1:], IGNORE_INDEX]
    # The two ways differ where a marker follows a mark of punctuation; otherwise this test shows nothing.
    [joint] = encode({"messages": [said("user", "what?"), said("assistant", "red.")]}, labels="joint").samples
    assert joint.input_ids.tolist() != expected[-joint.tokens :]


@pytest.mark.parametrize("labels", ["per_turn", "joint"])
def test_only_answers_are_targets_and_never_an_image(tmp_path, labels):
    [sample] = encode({"messages": long_conversation(tmp_path)}, tmp_path, labels=labels).samples
    check_targets(sample)
    # The picture in the second answer is no target, nor are the marks around it.
    assert targets_text(sample) == (
        " a fox <|im_end|>\n<|im_start|>user\n jumps<|im_end|>\nit says 世界  42<|im_end|>\n?<|im_end|>\n"
    )


@pytest.mark.parametrize("labels", ["per_turn", "joint"])
def test_weight_0_leaves_an_answer_out(labels):
    messages = [
        said("user", "a"),
        said("assistant", "", weight=0),
        said("user", "b"),
        said("assistant", "dog", weight=1),
    ]
    [sample] = encode({"messages": messages}, labels=labels).samples
    assert targets_text(sample) == "dog<|im_end|>\n"


def test_targets_of_text_are_its_second_token_to_the_end_of_text():
    [sample] = encode({"text": "the quick <|img|> fox"}).samples
    ids = processor().tokenizer.encode
    assert processor().decode(sample.input_ids) == "the quick <|img|> fox<|endoftext|>"
    assert IMAGE not in sample.input_ids
    assert sample.targets.tolist() == [*sample.input_ids.tolist()[1:], IGNORE_INDEX]
    assert sample.input_ids.tolist()[-1:] == ids("<|endoftext|>")


@pytest.mark.parametrize("extra", range(4))
def test_long_text_is_cut_into_sequences_that_lose_nothing(extra):
    text = "3" * (39 + extra)  # a token a digit, and one for the end
    encoded = encode({"text": text}, max_length=20)
    assert [note.kind for note in encoded.notes] == ["text cut"]
    assert all(2 <= sample.tokens <= 20 for sample in encoded.samples)
    for sample in encoded.samples:
        check_targets(sample)
    pieces = [processor().decode(sample.input_ids) for sample in encoded.samples]
    assert "".join(pieces) == text + "<|endoftext|>"


def turns(count: int, system: bool = False) -> list[dict]:
    first = [said("system", "0")] if system else []
    return first + [m for i in range(1, count + 1) for m in (said("user", str(i)), said("assistant", f"{i}{i}"))]


def kept_text(messages, **settings) -> str:
    encoded = encode({"messages": messages}, **settings)
    assert [note.kind for note in encoded.notes] == ["trimmed"]
    text = processor().decode(encoded.samples[0].input_ids)
    return "".join(char for char in text if char.isdigit())


def length(messages, **settings) -> int:
    return encode({"messages": messages}, **settings).samples[0].tokens


def test_what_is_too_long_loses_whole_turns_or_is_skipped():
    whole, part = turns(4, system=True), turns(2, system=True)
    most = length(part)
    assert kept_text(whole, max_length=most, too_long="drop_last") == "0111222"
    assert kept_text(whole, max_length=most, too_long="drop_first") == "0333444"
    assert kept_text(whole, max_length=most + 1, too_long="drop_first") == "0333444"
    assert kept_text(whole, max_length=most - 1, too_long="drop_first") == "0444"
    with pytest.raises(RowError, match=rf"{length(whole)} tokens, {most} tokens fit") as error:
        encode({"messages": whole}, max_length=most)
    assert error.value.kind == "too long"
    with pytest.raises(RowError, match="no whole turns"):
        encode({"messages": whole}, max_length=10, too_long="drop_first")


def test_trimming_ends_with_an_answer_that_is_a_target():
    messages = [*turns(2), said("user", "3" * 50)]
    assert kept_text(messages, max_length=length(turns(2)), too_long="drop_last") == "111222"
    # The first exchange alone fits, but its answer is not trained on.
    messages = [said("user", "1"), said("assistant", "11", weight=0), *turns(1), said("user", "3" * 500)]
    with pytest.raises(RowError, match="no whole turns"):
        encode({"messages": messages}, max_length=length(turns(1)), too_long="drop_last")


def test_an_image_is_kept_whole_or_dropped_with_its_turn(tmp_path):
    made_data.picture(tmp_path, "a.png")
    shown = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "7"}]
    messages = [said("user", shown), said("assistant", "1"), said("user", shown), said("assistant", "2")]
    whole = length(messages, folder=tmp_path)
    for most in range(10, whole):
        try:
            [sample] = encode({"messages": messages}, tmp_path, max_length=most, too_long="drop_first").samples
        except RowError:
            continue
        assert (sample.input_ids == IMAGE).sum() == SIZE_TOKENS * len(sample.crops) == SIZE_TOKENS
    with pytest.raises(RowError, match=r"2 crops, 4,096 tokens and 1 crops fit"):
        encode({"messages": messages}, tmp_path, max_crops=1)
    [sample] = encode({"messages": messages}, tmp_path, max_crops=1, too_long="drop_last").samples
    assert len(sample.crops) == 1
    assert targets_text(sample) == "1<|im_end|>\n"


SIZE_TOKENS = made_data.SIZES[56]


def test_frames_of_clips_are_those_of_inference(tmp_path):
    made_data.clip(tmp_path, frames=75)
    row = {"messages": [said("user", [{"type": "video", "text": None}]), said("assistant", "dog")]}
    for given, count in (({"path": "clip.mp4", "num_frames": 5}, 5), ({"path": "clip.mp4", "num_frames": None}, 8),
                         ({"path": "clip.mp4", "num_frames": -1}, 8), ("clip.mp4", 8)):  # fmt: skip
        [sample] = encode({**row, "video": given}, tmp_path).samples
        assert len(sample.crops) == count
        numbers = [made_media.number_in(crops.pixels[0].permute(1, 2, 0)[:21].numpy()) for crops in sample.crops]
        assert numbers == made_media.authors(75, count)
    text = processor().decode(sample.input_ids)
    assert "[00:00]<fim_prefix>" in text
    assert "[00:02]<fim_prefix>" in text
    [sample] = encode({**row, "video": "clip.mp4"}, tmp_path, timestamps=False, num_frames=2, max_image_size=56).samples
    shown = "<fim_prefix>" + "<|img|>" * 9 + "<fim_suffix>"
    assert processor().decode(sample.input_ids).startswith(f"<|im_start|>user\n{shown}{shown}\n<|im_end|>")


def test_settings_are_the_defaults_of_rows(tmp_path):
    made_data.picture(tmp_path, "a.png", (200, 100))
    row = {"messages": [said("user", [{"type": "image", "text": None}]), said("assistant", "dog")], "images": ["a.png"]}
    [whole] = encode(row, tmp_path).samples
    [small] = encode(row, tmp_path, max_image_size=28, split_image=True).samples
    assert [crops.pixels.shape[-1] for crops in (*whole.crops, *small.crops)] == [56, 28]
    assert len(small.crops[0].extents) > 1
    with pytest.raises(ValueError, match="max_image_size is 490; this model's sizes are 28, 56"):
        encode(row, tmp_path, max_image_size=490)


def test_data_in_the_row_itself_need_no_file(tmp_path):
    name = made_data.picture(tmp_path, "a.png")
    data = "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()
    [inside] = encode(chat_of({"type": "image_url", "image_url": {"url": data}})).samples
    [beside] = encode(chat_of({"type": "image_url", "image_url": {"url": "a.png"}}), tmp_path).samples
    assert torch.equal(inside.input_ids, beside.input_ids)
    assert torch.equal(inside.crops[0].pixels, beside.crops[0].pixels)


def chat_of(part: dict) -> dict:
    return {"messages": [said("user", [part]), said("assistant", "dog")]}


def test_a_tokenizer_that_joins_newlines_is_refused_for_joint_labels():
    class Joining:
        image_token_id, sizes, chat_template = IMAGE, (28, 56), CHAT_TEMPLATE

        def encode(self, text):
            return list(text.replace("\n<", "N").encode())

    class Other:
        tokenizer, image_processor = Joining(), processor().image_processor

    with pytest.raises(ValueError, match='use "per_turn"'):
        RowEncoder(Other(), config(), DataSettings(labels="joint"), 64)
    RowEncoder(Other(), config(), DataSettings(), 64)


def test_model_and_tokenizer_must_agree_on_the_image_token():
    import dataclasses

    with pytest.raises(ValueError, match="do not belong together"):
        RowEncoder(processor(), dataclasses.replace(config(), image_token_index=5), DataSettings(), 64)


def test_a_chat_template_that_training_would_not_write_is_refused():
    images = processor().image_processor
    other = AriaTokenizer(small_tokenizer.model(), {"chat_template": "{{ messages }}"})
    with pytest.raises(ValueError, match="brings a chat template of its own, but training uses Aria's"):
        RowEncoder(AriaProcessor(images, other, size_conversion=made_data.SIZES), config(), DataSettings(), 64)


def test_unknown_fields_are_reported():
    encoded = encode(chat("a", "dog", id=7, source="web", nothing=None))
    [note] = encoded.notes
    assert note == ("unread fields", "unknown fields are ignored: id, source")
