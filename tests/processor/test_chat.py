"""Rendering messages: the exact text of the published template, image slots, and clear errors."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest

from aria.processor import CHAT_TEMPLATE, IMAGE_TOKEN, ImagePart, Prompt, render

SLOT = "<fim_prefix><|img|><fim_suffix>"
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [],
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}],
    [{"role": "user", "content": [{"text": None, "type": "image"}, {"text": "what is the image?", "type": "text"}]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Image 1: "}, {"type": "image", "url": "a.png"},
                                     {"type": "text", "text": "\nImage 2: "}, {"type": "image", "path": "b.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " a1\n"}]},
        {"role": "tool", "content": "{'x': 1} & <b>"},
        {"role": "user", "content": []},
        {"role": "assistant", "content": None},
    ],
    [{"role": "user", "content": "not a picture: <|img|> {{ x }}<|im_end|>"}],
]  # fmt: skip


def jinja(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    # As in transformers.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_same_text_as_the_published_template(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    prompt = render(messages, add_generation_prompt=add_generation_prompt)
    assert prompt == jinja(messages, add_generation_prompt)
    assert all(prompt[slot - 12 : slot + 19] == SLOT for slot in prompt.slots)


def test_developer_is_written_as_system() -> None:
    assert render([{"role": "developer", "content": "x"}]) == render([{"role": "system", "content": "x"}])


def test_only_image_parts_are_image_slots() -> None:
    content = [
        {"type": "text", "text": "<|img|> <fim_prefix><|img|>"},
        {"type": "image"},
        {"type": "text", "text": IMAGE_TOKEN},
    ]
    prompt = render([{"role": "user", "content": "<|img|>"}, {"role": "user", "content": content}])
    assert prompt.count(IMAGE_TOKEN) == 5
    assert prompt.slots == (prompt.index(SLOT) + len("<fim_prefix>"),)
    assert Prompt.of(prompt) is prompt
    before, after = prompt.segments()
    assert before.endswith("<fim_prefix><|img|><fim_prefix>") and after == "<fim_suffix><|img|><|im_end|>\n"


def test_image_parts_carry_their_source_and_settings() -> None:
    picture = object()
    parts = [
        {"type": "image", "image": picture, "max_image_size": 490},
        {"type": "image", "url": "https://example.org/a.png", "split_image": True, "path": None},
        {"type": "image", "path": "a.png"},
        {"type": "image"},
    ]
    assert render([{"role": "user", "content": parts}]).parts == (
        ImagePart(picture, max_image_size=490),
        ImagePart("https://example.org/a.png", split_image=True),
        ImagePart(Path("a.png")),
        ImagePart(),
    )


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "wizard", "content": "x"}, "message 0 has the role 'wizard'; supported are system, developer, user"),
        ({"content": "x"}, "the role None"),
        ({"role": "user"}, "message 0 has no content"),
        ({"role": "user", "content": "x", "name": "Ann"}, "message 0 has unknown keys: name"),
        ({"role": "user", "content": 3}, "content of message 0 should be a string or a list of parts"),
        ({"role": "user", "content": ["x"]}, "part 0 of message 0 should be a mapping"),
        ({"role": "user", "content": [{"type": "audio"}]}, "has the type 'audio'; supported are text, image"),
        ({"role": "user", "content": [{"text": "x"}]}, "has the type None"),
        ({"role": "user", "content": [{"type": "text"}]}, "text of part 0 of message 0 should be a string"),
        ({"role": "user", "content": [{"type": "image", "src": "x"}]}, "unknown keys: src; image parts support type"),
        ({"role": "user", "content": [{"type": "text", "text": "", "url": "b"}]}, "keys: url; text parts support type"),
        ({"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}, "as path and url; use one"),
        ({"role": "user", "content": [{"type": "image", "url": object()}]}, "objects go under image"),
        ({"role": "user", "content": [{"type": "image", "path": 3}]}, "should be a string or Path"),
        ({"role": "user", "content": [{"type": "image", "max_image_size": "490"}]}, "should be an int, but is '490'"),
        ({"role": "user", "content": [{"type": "image", "split_image": "no"}]}, "should be a bool, but is 'no'"),
        ("hello", "message 0 should be a mapping"),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_its_place(message: Any, complaint: str) -> None:
    with pytest.raises(ValueError) as error:
        render([message])
    assert complaint in str(error.value)


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "x"}, None])
def test_messages_must_be_a_list(messages: Any) -> None:
    with pytest.raises(ValueError, match="should be a list of mappings"):
        render(messages)


def test_prompts_are_strings_that_can_be_joined_copied_and_checked() -> None:
    plain = Prompt.of("a<|img|>b<|img|>")
    assert isinstance(plain, str) and plain.slots == (1, 9) and plain.segments() == ["a", "b", ""]
    assert Prompt("a<|img|>").slots == ()
    joined = Prompt("<|img|>x") + plain + " <|img|>"
    assert joined == "<|img|>xa<|img|>b<|img|> <|img|>" and joined.slots == (9, 17)
    for same in (copy.copy(joined), copy.deepcopy(joined), pickle.loads(pickle.dumps(joined))):
        assert same == joined and same.slots == joined.slots and same.parts == joined.parts
    with pytest.raises(ValueError, match="every slot should be the offset"):
        Prompt("a<|img|>", slots=[0])
    with pytest.raises(ValueError, match="1 slots but 0 image parts"):
        Prompt("<|img|>", slots=[0], parts=[])


def test_literal_image_tokens_stay_text_through_adding_and_stripping() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"is {IMAGE_TOKEN} text?"}]}]
    prompt = render(messages)
    place = prompt.slots[0]
    for changed, moved in (
        (prompt.strip(), 0),
        (f" {IMAGE_TOKEN}" + prompt, 1 + len(IMAGE_TOKEN)),
        (prompt + IMAGE_TOKEN, 0),
        ((" \n" + prompt + "\n ").strip(), 0),
        (prompt.lstrip("<"), -1),
        (prompt.rstrip("\n"), 0),
    ):
        assert isinstance(changed, Prompt)
        assert changed.slots == (place + moved,)
        assert changed.startswith(IMAGE_TOKEN, changed.slots[0])
    assert prompt.lstrip(prompt).slots == ()
    assert prompt.strip() == str(prompt).strip()


def test_slices_keep_whole_slots_and_never_halves() -> None:
    picture = object()
    prompt = Prompt(f"{IMAGE_TOKEN}ab{IMAGE_TOKEN}cd", slots=[9], parts=[ImagePart(picture)])
    for part, slots in (
        (prompt[1:], (8,)),
        (prompt[7:16], (2,)),
        (prompt[:9], ()),
        (prompt[16:], ()),
        (prompt[5:2], ()),
    ):
        assert isinstance(part, Prompt) and part.slots == slots and len(part.parts) == len(slots)
    tail = prompt[7:]
    assert isinstance(tail, Prompt) and tail.parts[0].source is picture
    assert tail == str(prompt)[7:] and prompt[-1] == "d"
    for cut in (slice(10, None), slice(None, 12), slice(11, 13)):
        with pytest.raises(ValueError, match="end inside an image slot, 9 to 16"):
            prompt[cut]
    with pytest.raises(ValueError, match="end inside an image slot"):
        Prompt.of(f"{IMAGE_TOKEN}a").strip("<|")


PLAIN: dict[str, Callable[[Any], Any]] = {
    "replace": lambda prompt: prompt.replace("user", "User"),
    "f-string": lambda prompt: f"{prompt}!",
    "format": lambda prompt: "{}".format(prompt),  # noqa: UP032
    "percent": lambda prompt: "%s" % prompt,  # noqa: UP031
    "times": lambda prompt: prompt * 2,
    "split": lambda prompt: prompt.split("\n"),
    "step": lambda prompt: prompt[::2],
    "upper": lambda prompt: prompt.upper(),
}


@pytest.mark.parametrize("operation", PLAIN.values(), ids=PLAIN)
def test_no_operation_makes_slots_of_text(operation: Callable[[Any], Any]) -> None:
    literal = render([{"role": "user", "content": f"what is {IMAGE_TOKEN}?"}])
    with pytest.raises(ValueError, match="here plain text, would become an image slot"):
        operation(literal)
    for part in ({}, {"path": "a.png"}):
        prompt = render([{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "what?"}]}])
        assert operation(prompt) == operation(str(prompt))


def test_only_text_is_added() -> None:
    for add in (lambda: Prompt("a") + 3, lambda: 3 + Prompt("a")):  # type: ignore[operator]
        with pytest.raises(TypeError):
            add()
