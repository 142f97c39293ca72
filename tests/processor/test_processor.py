"""The processor: checks of counts, batches, messages with images, and agreement with transformers."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from aria.config import AriaConfig, ProjectorConfig
from aria.hub import NANO
from aria.processor import AriaImageProcessor, AriaProcessor, AriaTokenizer, BatchFeature, Prompt
from tests.helpers import small_tokenizer

SLOT = "<fim_prefix><|img|><fim_suffix>"
RNG = np.random.default_rng(5)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor() -> AriaProcessor:
    tokenizer = AriaTokenizer(small_tokenizer.model(), small_tokenizer.config())
    return AriaProcessor(AriaImageProcessor(max_image_size=490), tokenizer)


def image_runs(row: torch.Tensor) -> list[int]:
    """Lengths of the runs of image ids."""
    text = "".join("x" if i == 9 else " " for i in row.tolist())
    return [len(run) for run in text.split()]


def test_one_image(processor: AriaProcessor) -> None:
    inputs = processor(f"{SLOT}hello", picture(), return_tensors="pt")
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    hello = processor.tokenizer.encode("hello")
    assert inputs.input_ids.tolist() == [[39, *[9] * 128, 41, *hello]]
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == torch.int64 and inputs.attention_mask.all()
    assert inputs.pixel_values.shape == (1, 3, 490, 490) and inputs.num_crops == [1]
    assert image_runs(processor(SLOT, [picture()], max_image_size=980, return_tensors="pd").input_ids[0]) == [256]


def test_text_alone(processor: AriaProcessor) -> None:
    inputs = processor(["hello", "hello world hello"], return_tensors="pt")
    assert list(inputs) == ["input_ids", "attention_mask"] and inputs.num_crops == []
    assert inputs.input_ids[0, 0] == 2 and inputs.attention_mask[0, 0] == 0 and inputs.attention_mask[:, -1].all()
    assert processor("hello")["input_ids"] == [processor.tokenizer.encode("hello")]


def test_split_images_have_their_own_counts(processor: AriaProcessor) -> None:
    square, wide = picture(500, 500), picture(3000, 500)
    prompts = [f"{SLOT}a", f"b{SLOT}{SLOT}"]
    inputs = processor(prompts, [[square], [wide, square]], split_image=True, return_tensors="pt")
    assert inputs.num_crops == [5, 7, 5] and inputs.pixel_values.shape[0] == 17
    assert [image_runs(row) for row in inputs.input_ids] == [[5 * 128], [7 * 128, 5 * 128]]
    assert int((inputs.input_ids == 9).sum()) == 17 * 128
    flat = processor(prompts, [square, wide, square], split_image=True, return_tensors="pt")
    assert torch.equal(flat.input_ids, inputs.input_ids) and torch.equal(flat.pixel_values, inputs.pixel_values)
    assert processor(SLOT, square, split_image=True, split_mode="pad").num_crops == [4]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        (SLOT, 0, "1 image slots .* but 0 images"),
        (SLOT, 2, "1 image slots .* but 2 images"),
        ("hello", 1, "0 image slots .* but 1 images"),
        ([SLOT, SLOT], 1, "2 image slots .* but 1 images"),
    ],
)
def test_counts_that_differ(processor: AriaProcessor, text: Any, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text, [picture() for _ in range(count)])


def test_lists_of_lists_are_checked_prompt_by_prompt(processor: AriaProcessor) -> None:
    one = picture()
    with pytest.raises(ValueError, match=r"prompt 1 has 1 image slots .* but 2 images"):
        processor([SLOT, SLOT], [[one], [one, one]])
    with pytest.raises(ValueError, match="1 lists for 2 prompts"):
        processor([SLOT, SLOT], [[one]])
    with pytest.raises(ValueError, match="not a mixture"):
        processor([SLOT, SLOT], [[one], one])


def test_literal_image_tokens_of_users_take_no_image(processor: AriaProcessor) -> None:
    content = [{"type": "text", "text": "what is <|img|> here? "}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(prompt, picture(), return_tensors="pt")
    assert image_runs(inputs.input_ids[0]) == [128]
    decoded = processor.decode(inputs.input_ids[0])
    assert decoded.replace("<|img|>" * 128, "<|img|>") == prompt
    with pytest.raises(ValueError, match="2 image slots"):
        processor(str(prompt), picture())
    assert processor(Prompt("<|img|>"), return_tensors="pt").input_ids.shape[1] > 1


def test_truncation_never_cuts_an_image(processor: AriaProcessor) -> None:
    inputs = processor(f"a{SLOT}hello world", picture(), truncation=True, max_length=132, return_tensors="pt")
    assert inputs.input_ids.shape == (1, 132) and image_runs(inputs.input_ids[0]) == [128]
    for text, images, length in (
        (f"a{SLOT}b", [picture()], 100),
        (SLOT, [picture()], 128),
        (f"{SLOT}{SLOT}", [picture(), picture()], 131),
    ):
        with pytest.raises(
            ValueError, match=rf"max_length={length} would cut an image: the last one ends at token \d+"
        ):
            processor(text, images, truncation=True, max_length=length)
    with pytest.raises(ValueError, match="need max_length"):
        processor(SLOT, picture(), truncation=True)


def test_padding_to_a_length(processor: AriaProcessor) -> None:
    inputs = processor(SLOT, picture(), padding="max_length", max_length=140, return_tensors="np")
    assert isinstance(inputs.pixel_values, np.ndarray) and inputs.input_ids.shape == (1, 140)
    assert inputs.attention_mask.sum() == 130 and not inputs.attention_mask[0, :10].any()


def test_messages_have_their_own_images(processor: AriaProcessor, tmp_path) -> None:
    first, second, third = picture(), picture(90, 30), picture(30, 90)
    first.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    third.save(buffer, "PNG")
    parts: list[dict[str, Any]] = [
        {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "image"},
        {"type": "image", "image": buffer.getvalue()},
        {"type": "text", "text": "compare"},
    ]
    messages = [{"role": "user", "content": parts}]
    options: dict[str, Any] = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": True,
    }
    inputs = processor.apply_chat_template(messages, images=second, **options)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    all_given = processor(prompt, [first, second, third], return_tensors="pt")
    assert torch.equal(inputs.pixel_values, all_given.pixel_values)
    assert torch.equal(inputs.input_ids, all_given.input_ids)
    assert processor.decode(inputs.input_ids[0]).endswith("compare<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"3 image slots .*\(2 of them with a source\), but 2 images"):
        processor(prompt, [first, second])
    greeting: list[Any] = [{"role": "user", "content": "hi"}]
    batch = processor.apply_chat_template([messages, greeting], images=[second], **options)
    assert batch.input_ids.shape[0] == 2 and batch.attention_mask[1, 0] == 0 and batch.num_crops == [1, 1, 1]
    ids = processor.apply_chat_template(messages, images=second, tokenize=True)
    assert ids == processor(processor.apply_chat_template(messages), second)["input_ids"]


def test_image_parts_carry_size_and_splitting(processor: AriaProcessor) -> None:
    def prepare(*parts: dict[str, Any], **options: Any) -> BatchFeature:
        content: list[Any] = [{"type": "image", "image": picture(), **part} for part in parts]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)

    assert prepare({"max_image_size": 980}).pixel_values.shape[-1] == 980
    assert prepare({"split_image": True}, {}).num_crops == [7, 1]
    assert prepare({"split_image": False}, {}, split_image=True).num_crops == [1, 7]
    assert prepare({"max_image_size": 980}, {}, max_image_size=980).num_crops == [1, 1]
    with pytest.raises(ValueError, match="490 and 980 pixels, but share one"):
        prepare({"max_image_size": 980}, {})
    with pytest.raises(ValueError, match="100 is not one of this model's sizes"):
        prepare({"max_image_size": 100})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": SLOT, "videos": [[]]}, ValueError, "1 clip slots"),
        ({"text": None}, ValueError, "should be a prompt"),
        ({"text": []}, ValueError, "should be a prompt"),
        ({"text": "a", "return_tensors": "tf"}, ValueError, "'tf' is not known"),
        ({"text": "a", "do_resize": True}, TypeError, "do_resize"),
        ({"text": SLOT, "images": "no/such/file.png"}, FileNotFoundError, "no/such/file|no.such.file"),
    ],
)
def test_refusals(processor: AriaProcessor, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_inputs_move_and_cast_in_place(processor: AriaProcessor) -> None:
    inputs = processor(SLOT, picture(), return_tensors="pt")
    assert inputs.to("cpu", torch.bfloat16) is inputs
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs.input_ids.dtype == torch.int64 and inputs.pixel_mask.dtype == torch.bool
    inputs.to(torch.float16)
    assert inputs.pixel_values.dtype == torch.float16
    inputs.to(device="cpu", dtype=torch.float32)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.float64)
    assert inputs.pixel_values.dtype == torch.float64
    assert (lambda **names: sorted(names))(**inputs) == sorted(inputs)
    with pytest.raises(AttributeError, match="no input named 'labels'; there are input_ids"):
        _ = inputs.labels


def test_saving_and_loading(processor: AriaProcessor, tmp_path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AriaProcessor.from_pretrained(tmp_path)
    image = picture()
    ours, again = (one(f"{SLOT}hello", image, return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["size_conversion"] == {"490": 128, "980": 256}


def test_a_model_with_other_sizes(processor: AriaProcessor, tmp_path) -> None:
    small = AriaProcessor(
        AriaImageProcessor(sizes=(224, 448), max_image_size=224, min_image_size=64),
        processor.tokenizer,
        size_conversion={224: 64, 448: 128},
    )
    small.save_pretrained(tmp_path)
    without_config = AriaProcessor.from_pretrained(tmp_path)
    AriaConfig(projector=ProjectorConfig(patch_to_query={256: 64, 1024: 100})).save_pretrained(tmp_path)
    with_config = AriaProcessor.from_pretrained(tmp_path)
    for loaded, tokens in ((without_config, 128), (with_config, 100)):
        assert image_runs(loaded(SLOT, picture(), return_tensors="pt").input_ids[0]) == [64]
        assert image_runs(loaded(SLOT, picture(), max_image_size=448, return_tensors="pt").input_ids[0]) == [tokens]
    with pytest.raises(ValueError, match=r"sizes \[490, 980\], but the image processor has \[224, 448\]"):
        AriaProcessor(small.image_processor, processor.tokenizer)


def test_transformers_loads_what_is_saved_and_agrees(processor: AriaProcessor, tmp_path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
    processor.save_pretrained(tmp_path)
    theirs: Any = transformers.AriaProcessor.from_pretrained(tmp_path)
    theirs.image_processor = AriaImageProcessorPil.from_pretrained(
        tmp_path
    )  # not torchvision's, which resizes otherwise
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is 2?"}]}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.apply_chat_template(messages, add_generation_prompt=True)
    prompts, pictures = [text, f"{SLOT}\n{SLOT} hello"], [[picture()], [picture(30, 70), picture(200, 20)]]
    expected = theirs(text=prompts, images=pictures, max_image_size=490, padding=True, return_tensors="pt")
    inputs = processor(prompts, pictures, return_tensors="pt")
    for name in inputs:
        assert torch.equal(inputs[name], expected[name]), name


def test_transformers_gives_the_same_prompt_and_ids_from_the_packaged_files() -> None:
    """Its image processor supports only 490 and 980 pixels, so images of nano's sizes cannot be compared."""
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
    theirs: Any = transformers.AriaProcessor.from_pretrained(NANO)
    ours = AriaProcessor.from_pretrained()
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what  is this – 2 naïve 👍?\n"}]},
    ]
    prompt = ours.apply_chat_template(messages, add_generation_prompt=True)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == prompt
    ids = theirs.tokenizer(str(prompt))["input_ids"]
    assert ids == ours.tokenizer.encode(prompt) and ids.count(9) == 1
    assert theirs.size_conversion == ours.size_conversion
