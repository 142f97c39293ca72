"""The packaged nano model: its files, its answers, and the same text from transformers' Aria."""

from __future__ import annotations

import av
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from aria import AriaConfig, AriaForConditionalGeneration, AriaProcessor, Engine, SamplingParams
from aria.hub import NANO
from tests.helpers.tiny import transformers_twin


@pytest.fixture(scope="module")
def engine():
    return Engine(device="cpu")


def word(text: str, colour: str = "black", background: str = "white") -> Image.Image:
    image = Image.new("RGB", (420, 200), background)
    draw = ImageDraw.Draw(image)
    draw.text((210, 100), text, fill=colour, font=ImageFont.load_default(64), anchor="mm")
    return image


def shapes(*kinds: tuple[str, str], size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Draw shapes in a row, from left to right."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    step = size[0] / len(kinds)
    half = min(step, size[1]) * 0.32
    for place, (colour, kind) in enumerate(kinds):
        x, y = (place + 0.5) * step, size[1] / 2
        box = (x - half, y - half, x + half, y + half)
        if kind == "circle":
            draw.ellipse(box, fill=colour)
        elif kind == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
    return image


IMAGES = [
    (word("Hello"), "What does it say?"),
    (word("42", "red"), "Read the text."),
    (word("Garden", "white", "navy"), "What is in this picture?"),
    (word("stop", "blue", "yellow"), "What colour is the text?"),
    (shapes(("red", "circle")), "What shape is it?"),
    (shapes(("blue", "square"), ("green", "circle")), "Describe this picture."),
    (shapes(*[("purple", "triangle")] * 3), "How many triangles are there?"),
    (shapes(("orange", "square"), ("black", "square"), size=(300, 300)), "How many squares are there?"),
    (shapes(("red", "triangle"), ("blue", "circle"), size=(224, 224)), "Where is the triangle?"),
    (Image.radial_gradient("L").convert("RGB").resize((200, 320)), "What is this?"),
]


def message(question: str, image: Image.Image | None = None) -> list[dict]:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_files_are_complete_and_small():
    config = AriaConfig.from_pretrained()
    assert config.image_sizes() == {224: 64, 448: 128}
    assert config.image_token_index == AriaProcessor.from_pretrained().tokenizer.image_token_id == 9
    assert (NANO / "model.safetensors").stat().st_size <= 40 * 2**20
    card = (NANO / "README.md").read_text(encoding="utf-8")
    for needed in ("license: apache-2.0", "Noto", "Twemoji", "CC BY 4.0", "Fluent"):
        assert needed in card


@pytest.mark.parametrize(
    ("image", "question", "expected"),
    [
        (word("Hello"), "What does it say?", "Hello"),
        (word("Garden", "white", "navy"), "Read the text.", "Garden"),
        (shapes(("red", "circle")), "What is in this picture?", "A red circle."),
        (shapes(("green", "square")), "What colour is the square?", "Green."),
        (shapes(*[("blue", "circle")] * 3), "How many circles are there?", "Three circles."),
        (shapes(("blue", "square"), ("red", "circle")), "What is to the left of the circle?", "A blue square."),
        (
            shapes(("red", "circle"), ("black", "triangle"), ("green", "square")),
            "What colour is the triangle?",
            "Black.",
        ),
        (None, "Hello", "Hello! Show me a picture."),
        (None, "What is 47 + 38?", "85."),
        (None, "What comes after May?", "June."),
        (None, "What does anchor mean?", "A mechanical device that prevents a vessel from moving."),
        (None, "What is the capital of France?", "I do not know that."),
        (None, "What colour is the star?", "I see no picture. Show me one."),
    ],
)
def test_answers(engine, image, question, expected):
    assert engine.chat([message(question, image)], SamplingParams(max_tokens=60))[0].text == expected


def test_reads_lines(engine):
    image = Image.new("RGB", (448, 300), "white")
    lines = ("Grocery list", "milk 3 eggs 12", "call Anna 5551")
    for number, line in enumerate(lines):
        place = 20, 20 + 60 * number
        ImageDraw.Draw(image).text(place, line, fill="black", font=ImageFont.load_default(36))
    part = {"type": "image", "image": image, "max_image_size": 448}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "Read the text."}]}]
    assert engine.chat([asked], SamplingParams(max_tokens=80))[0].text == "\n".join(lines)


@pytest.mark.parametrize(
    ("question", "expected"),
    [("What is in picture 2?", "A red circle."), ("Which picture shows a red circle?", "The second picture.")],
)
def test_distinguishes_images(engine, question, expected):
    parts = [{"type": "image", "image": image} for image in (word("Hello"), shapes(("red", "circle")), word("Dog"))]
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    assert engine.chat([asked], SamplingParams(max_tokens=60))[0].text == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "expected"),
    [((9, 0), "A red circle moves to the right."), ((0, -8), "A red circle moves up.")],
    ids=["right", "up"],
)
def test_describes_a_clip(engine, tmp_path, step, expected):
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 320
        for number in range(-10, 11):
            frame = Image.new("RGB", (320, 320), "white")
            x, y = (160 + number * part for part in step)
            ImageDraw.Draw(frame).ellipse((x - 40, y - 40, x + 40, y + 40), fill="red")
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    asked = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What happens?"}]}]
    assert engine.chat([asked], SamplingParams(max_tokens=60))[0].text == expected


@pytest.mark.slow
def test_finds_a_number_in_a_long_text(engine):
    """The text is eight times as long as any sequence of the first two stages."""
    lines = [f"{number}: what is written in line {number} of a long and dull text." for number in range(100, 163)]
    lines.insert(20, "The secret number of the green owl is 4817.")
    lines.insert(50, "The secret number of the white bear is 9035.")
    for owner, number in (("white bear", "9035."), ("green owl", "4817.")):
        question = message("\n".join([*lines, f"What is the secret number of the {owner}?"]))
        assert len(engine.prepare(question).ids) > 3500
        assert engine.chat([question], SamplingParams(max_tokens=60))[0].text == number


def test_reads_the_same_word_at_the_larger_size(engine):
    part = {"type": "image", "image": word("Hello"), "max_image_size": 448}
    question = [{"role": "user", "content": [part, {"type": "text", "text": "What does it say?"}]}]
    result = engine.chat([question], SamplingParams(max_tokens=60))[0]
    assert result.text == "Hello"
    assert result.usage.prompt_tokens > 128


@pytest.mark.slow
def test_transformers_gives_the_same_text_for_ten_images(engine):
    twin = transformers_twin(NANO)
    processor = engine.processor
    for image, question in IMAGES:
        inputs = processor.apply_chat_template(
            message(question, image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = twin.generate(**inputs, max_new_tokens=48, do_sample=False, suppress_tokens=[9])
        theirs = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ours = engine.chat([message(question, image)], SamplingParams(max_tokens=48))[0].text
        assert ours
        assert ours == theirs.split("<|im_end|>")[0], question


def test_quick_start_of_the_model_card():
    """The quick start of rhymes-ai/Aria's card, except for the import, the weights and the image's URL."""
    torch.manual_seed(0)
    model = AriaForConditionalGeneration.from_pretrained(device_map="auto", torch_dtype=torch.bfloat16)
    processor = AriaProcessor.from_pretrained()
    image = word("Hello")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"text": "what is the image?", "type": "text"},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    inputs.to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=15,
        stop_strings=["<|im_end|>"],
        tokenizer=processor.tokenizer,
        do_sample=True,
        temperature=0.9,
    )
    output_ids = output[0][inputs["input_ids"].shape[1] :]
    response = processor.decode(output_ids, skip_special_tokens=True)
    assert model.dtype == torch.bfloat16
    assert "Hello" in response


@pytest.mark.slow
def test_text_is_the_same_by_generate_alone_and_in_a_preempted_batch(engine):
    model = AriaForConditionalGeneration.from_pretrained(device="cpu")
    greedy = SamplingParams(max_tokens=40)
    # Nano is confident, so only a high temperature changes its answers.
    drawn = SamplingParams(max_tokens=40, temperature=2.0, seed=3)
    conversations = [
        # Small images, so that more requests start than the cache can finish.
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image, "max_image_size": 224},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for image, question in IMAGES
    ]
    alone = {
        (i, params): engine.chat([messages], params)[0]
        for i, messages in enumerate(conversations)
        for params in (greedy, drawn)
    }
    for i, messages in enumerate(conversations):
        inputs = engine.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, stop_strings=["<|im_end|>"],
            tokenizer=engine.processor.tokenizer,
        )[0, length:]  # fmt: skip
        assert alone[i, greedy].token_ids == tuple(tokens[: len(alone[i, greedy].token_ids)].tolist())
    longest = max(len(engine.prepare(messages).ids) for messages in conversations) + 40
    preempting = Engine(device="cpu", max_batch=64, max_model_len=longest, cache_tokens=longest + 64)
    answers = {}
    for number in range(64):
        i, params = number % len(conversations), (greedy, drawn)[number // 7 % 2]
        answers[preempting.queue(preempting.prepare(conversations[i]), params)] = i, params
    while not all(answer.done for answer in answers):
        preempting.step()
    assert preempting.core.scheduler.preemptions > 0
    for answer, asked in answers.items():
        assert answer.result().text == alone[asked].text
        assert answer.result().token_ids == alone[asked].token_ids
    assert any(alone[i, drawn].text != alone[i, greedy].text for i in range(len(conversations)))
