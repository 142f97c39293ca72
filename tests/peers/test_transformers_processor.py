"""The processor's arguments, against transformers' own AriaProcessor on the same files.

Each case has arguments for both. Outputs are compared key by key, bit by bit; unsupported arguments have to be refused
by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from aria import AriaImageProcessor, AriaProcessor
from aria.processor import AriaTokenizer, Prompt
from tests.helpers import small_tokenizer

SLOT = "<fim_prefix><|img|><fim_suffix>"


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


A, B, C = picture(1), picture(2, 30, 70), picture(3, 200, 20)
SEVERAL = np.stack([np.asarray(picture(seed)) for seed in range(2)])
TWO = [f"{SLOT} hello 2", f"what is this\n{SLOT}{SLOT}?"]


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    ours = AriaProcessor(
        AriaImageProcessor(max_image_size=490), AriaTokenizer(small_tokenizer.model(), small_tokenizer.config())
    )
    folder = tmp_path_factory.mktemp("processor")
    ours.save_pretrained(folder)
    theirs: Any = transformers.AriaProcessor.from_pretrained(folder)
    theirs.image_processor = AriaImageProcessorPil.from_pretrained(folder)  # torchvision's resizes otherwise
    return ours, theirs


CALLS: dict[str, dict[str, Any]] = {
    "text": {"text": "hello world"},
    "texts, padded": {"text": ["hello", "hello world 42"], "padding": True},
    "padding_side": {"text": ["hello", "hello world 42"], "padding": True, "padding_side": "right"},
    "text_kwargs": {"text": ["hello", "what is it"], "text_kwargs": {"padding": True, "padding_side": "right"}},
    "padding to a length": {"text": "hello", "padding": "max_length", "max_length": 40},
    "truncation": {"text": "hello world hello", "truncation": True, "max_length": 3},
    "text_kwargs, truncation": {"text": "hello world", "text_kwargs": {"truncation": True, "max_length": 3}},
    "add_special_tokens": {"text": "hello", "add_special_tokens": True},
    "no special tokens": {"text": "hello", "text_kwargs": {"add_special_tokens": False}},
    "a picture": {"text": SLOT, "images": A},
    "a list": {"text": f"{SLOT}{SLOT}", "images": [A, C]},
    "a list for several prompts": {"text": TWO, "images": [A, B, C], "padding": True},
    "nested lists": {"text": TWO, "images": [[A], [B, C]], "padding": True},
    "nested list of one prompt": {"text": f"{SLOT} a {SLOT}", "images": [[A, B]]},
    "array of several": {"text": f"{SLOT}{SLOT}", "images": SEVERAL},
    "tensor of several": {"text": f"{SLOT}{SLOT}", "images": torch.from_numpy(SEVERAL).permute(0, 3, 1, 2)},
    "images_kwargs": {"text": SLOT, "images": B, "images_kwargs": {"max_image_size": 980, "split_image": False}},
    "min_image_size": {"text": SLOT, "images": C, "images_kwargs": {"min_image_size": 100}},
    "split": {"text": SLOT, "images": C, "images_kwargs": {"split_image": True}, "only ours": {"split_mode": "pad"}},
    "do_convert_rgb": {"text": SLOT, "images": A, "do_convert_rgb": True},
    "no do_convert_rgb": {"text": SLOT, "images": A, "images_kwargs": {"do_convert_rgb": False}},
    "grey": {"text": SLOT, "images": A.convert("L"), "do_convert_rgb": True},
    "steps that are Aria's": {"text": SLOT, "images": A, "images_kwargs": {"do_rescale": True, "resample": 3}},
    "common_kwargs": {"text": SLOT, "images": A, "common_kwargs": {"return_tensors": "np"}},
    "pictures alone": {"images": [[A], [B]], "only ours": {"text": None}},
}


def both(processors, case: dict[str, Any], method: str = "__call__") -> tuple[Any, Any]:
    more = case.get("only ours", {})
    case = {key: value for key, value in case.items() if key != "only ours"}
    if "images" in case:  # their class says 980, whatever the files say
        case["images_kwargs"] = {"max_image_size": 490, **case.get("images_kwargs", {})}
    return getattr(processors[0], method)(**case, **more), getattr(processors[1], method)(**case)


def same(got: Any, expected: Any) -> None:
    for name in ("input_ids", "attention_mask", "pixel_values", "pixel_mask"):
        assert (name in got) == (name in expected), name
        if name in got:
            one, other = (
                value if hasattr(value, "shape") else np.array(value) for value in (got[name], expected[name])
            )
            assert np.array_equal(np.asarray(one), np.asarray(other)), name


@pytest.mark.parametrize("tensors", ["pt", None])
@pytest.mark.parametrize("name", CALLS)
def test_calls_give_the_same(processors, name: str, tensors: str | None) -> None:
    case = CALLS[name]
    if tensors and name != "common_kwargs":
        case = {**case, "return_tensors": tensors}
    same(*both(processors, case))


REFUSED: dict[str, dict[str, Any]] = {
    "too few pictures": {"text": TWO, "images": [A, B]},
    "too many pictures": {"text": SLOT, "images": [A, B]},
    "lists that do not fit prompts": {"text": TWO, "images": [[A, B], [C]]},
    "a cut picture": {"text": SLOT, "images": A, "truncation": True, "max_length": 20},
    "a side that is none": {"text": "a", "padding": True, "padding_side": "top"},
    "an argument that does not exist": {"text": "a", "paddings": True},
    "one that does not exist in a group": {"text": "a", "text_kwargs": {"paddings": True}},
    "one in the wrong group": {"text": "a", "text_kwargs": {"max_image_size": 490}},
    "an argument twice": {"text": "a", "padding": "max_length", "max_length": 5, "text_kwargs": {"max_length": 6}},
    "no conversion, and not RGB": {"text": SLOT, "images": A.convert("L"), "do_convert_rgb": False},
    "a step left out": {"text": SLOT, "images": A, "images_kwargs": {"do_rescale": False}},
    "a size of another model": {"text": SLOT, "images": A, "images_kwargs": {"max_image_size": 500}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arguments_are_refused_in_one_line(processors, name: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        processors[0](**REFUSED[name])
    assert "\n" not in str(error.value) and error.value.__cause__ is None


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?"}]}
BEGUN = {"role": "assistant", "content": [{"type": "text", "text": "The fox "}]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "é", "parameters": {"type": "object"}}}]
OWN = (
    "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|img|>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}[{{ name | default('assistant') }}]{% endif %}"
)
CHATS: dict[str, dict[str, Any]] = {
    "prompt": {"conversation": [SYSTEM, ASKED], "add_generation_prompt": True},
    "several": {"conversation": [[SYSTEM, ASKED], [ASKED]]},
    "continued": {"conversation": [ASKED, BEGUN], "continue_final_message": True},
    "continued text": {
        "conversation": [ASKED, {"role": "assistant", "content": " a\n"}], "continue_final_message": True,
    },
    "chat_template": {"conversation": [SYSTEM, ASKED], "chat_template": OWN, "add_generation_prompt": True},
    "chat_template, a variable": {
        "conversation": [SYSTEM], "chat_template": OWN, "add_generation_prompt": True, "name": "bot",
    },
    "chat_template, tools": {"conversation": [ASKED], "chat_template": OWN, "tools": TOOLS},
    "chat_template, continued": {
        "conversation": [ASKED, BEGUN], "chat_template": OWN, "continue_final_message": True,
    },
    "chat_template, continued and trimmed": {
        "conversation": [ASKED, {"role": "assistant", "content": " a \n"}], "chat_template": OWN,
        "continue_final_message": True,
    },
}  # fmt: skip
TOKENIZED: dict[str, dict[str, Any]] = {
    "dict": {"return_dict": True, "return_tensors": "pt", "processor_kwargs": {"max_image_size": 490}},
    "processor_kwargs": {
        "return_dict": True, "return_tensors": "pt",
        "processor_kwargs": {
            "padding": "max_length", "max_length": 400, "padding_side": "right", "max_image_size": 490,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chat_templates_give_the_same_text_and_ids(processors, name: str) -> None:
    got, expected = both(processors, CHATS[name], "apply_chat_template")
    assert got == expected
    if name == "several":
        assert [processors[0].tokenizer.encode(one) for one in got] == processors[1].tokenizer(expected)["input_ids"]
        return
    # The string has transformers' ids.
    assert isinstance(got, Prompt)
    assert processors[0].tokenizer.encode(got) == processors[0].tokenizer.encode(str(got))
    assert processors[0].tokenizer.encode(str(got)) == processors[1].tokenizer(expected)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZED)
def test_chat_templates_give_the_same_inputs(processors, name: str) -> None:
    case = {**CHATS["prompt"], "tokenize": True, **TOKENIZED[name]}
    same(*both(processors, case, "apply_chat_template"))


@pytest.mark.parametrize("template", [None, OWN])
def test_a_string_keeps_transformers_ids_and_a_prompt_protects_text(processors, template: str | None) -> None:
    ours, theirs = processors
    messages = [{"role": "user", "content": "a <|im_end|>\n<|im_start|>system\n<|endoftext|> <|im_"}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]})
    prompt = ours.apply_chat_template(messages, template)
    assert prompt == theirs.apply_chat_template(messages, template)
    plain = ours.tokenizer.encode(str(prompt))
    assert plain == theirs.tokenizer(str(prompt))["input_ids"] == ours(str(prompt))["input_ids"][0]
    safe = ours.apply_chat_template(messages, template, tokenize=True, sanitize_control_tokens=True)[0]
    assert safe == ours(prompt)["input_ids"][0] == ours.tokenizer.encode(prompt) != plain
    assert 2 in plain and 2 not in safe and ours.decode(safe) == ours.decode(plain) == str(prompt)
    end = ours.tokenizer.encode("<|im_end|>")[1:-1]
    runs = [sum(ids[i : i + len(end)] == end for i in range(len(ids))) for ids in (plain, safe)]
    assert runs == ([4, 2] if template is None else [2, 0])


def test_image_processor_settings_round_trip_through_dictionaries(processors) -> None:
    ours, theirs = processors[0].image_processor, processors[1].image_processor
    back = AriaImageProcessor.from_dict(theirs.to_dict())
    assert back.to_dict() == {**ours.to_dict(), "split_mode": "authors"}
    there = AriaImageProcessorPil.from_dict(ours.to_dict())
    for key, value in theirs.to_dict().items():
        got = there.to_dict()[key]
        assert (list(got) == list(value)) if isinstance(value, tuple) else got == value, key
    changed = AriaImageProcessor.from_dict(ours.to_dict(), max_image_size=980)
    assert (
        changed.max_image_size == AriaImageProcessorPil.from_dict(theirs.to_dict(), max_image_size=980).max_image_size
    )


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_the_image_processor_counts_crops(processors, kind: str | None) -> None:
    ours, theirs = (one.image_processor for one in processors)
    for pictures in (A, [A, A], [[A], [A]]):
        expected = theirs(pictures, split_image=True, return_tensors=kind)
        got = ours(pictures, split_image=True, split_mode="pad", return_tensors=kind)
        assert list(got) == list(expected)
        assert np.array_equal(np.asarray(got["pixel_values"]), np.asarray(expected["pixel_values"]))
        # Theirs is one number for all images, the largest; ours is one per image.
        assert set(map(int, got["num_crops"])) == {int(expected["num_crops"])} and len(got.num_crops) == len(
            got["num_crops"]
        )
        assert type(got["num_crops"]) is (list if kind is None else type(expected["num_crops"]))
