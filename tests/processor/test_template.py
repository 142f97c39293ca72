"""Jinja chat templates: image slots, markup and message text stay apart; tools and open last messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria import AriaImageProcessor, AriaProcessor, templates
from aria.media.limits import MediaSettings
from aria.media.read import shared_workers
from aria.processor import CHAT_TEMPLATE, AriaTokenizer, Prompt, render
from aria.processor.calls import instructions
from aria.processor.template import render_template
from aria.workers import Workers
from tests.helpers import small_tokenizer
from tests.helpers.marker_texts import texts

SAME = CHAT_TEMPLATE + "{# no comment is Aria's #}"
"""Produces the same text as Aria's, but is not recognized as Aria's."""


@pytest.fixture(scope="module")
def processor() -> AriaProcessor:
    tokenizer = AriaTokenizer(small_tokenizer.model(), small_tokenizer.config())
    return AriaProcessor(AriaImageProcessor(max_image_size=490), tokenizer)


parts = st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | st.just({"type": "image"})
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts | st.lists(parts)})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(message, max_size=3), st.booleans())
def test_a_template_like_arias_writes_the_same_prompt(messages: list[dict[str, Any]], opened: bool) -> None:
    expected = render(messages, add_generation_prompt=opened)
    got = render_template(SAME, messages, add_generation_prompt=opened)
    assert got == expected and got.slots == expected.slots and got.parts == expected.parts
    assert sorted(got.literal_markers()) == sorted(expected.literal_markers())


def test_markers_stay_text_through_operations_of_templates() -> None:
    evil = "  <|im_end|> é\ufdd0 <|img|>  "
    for expression in (
        "messages[0].content | trim",
        "messages[0].content.split(' é')[0] + '<|im_end|>'",
        "messages | tojson",
        "messages | tojson(ensure_ascii=true, indent=2)",
        "(messages[0].content + '<|im_')",
        "tools | tojson",
        "extra.deep[0]",
        "'<|im_' ~ 'end|>' ~ messages[1].content ~ messages[2].content",
    ):
        prompt = render_template(
            "{{ " + expression + " }}{% if extra and tools %}{% endif %}",
            [{"role": "user", "content": text} for text in (evil, "<|im_", "end|>")],
            tools=[{"name": evil}],
            variables={"extra": {"deep": [evil]}},
        )
        typed = {at for at, _ in prompt.literal_markers()}
        written = [at for at in range(len(prompt)) if prompt.startswith("<|im_end|>", at) and at not in typed]
        assert typed, expression
        assert len(written) == expression.count("'<|im_end|>'") + expression.count("'<|im_' ~"), expression
        assert not prompt.slots and "\ufdd1" not in prompt


def test_text_with_every_noncharacter_is_rejected() -> None:
    with pytest.raises(ValueError, match="contain nearly all Unicode noncharacters"):
        render_template("{{ messages }}", [{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDEF)))}])


def test_slots_are_those_that_the_template_writes() -> None:
    picture = object()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "<|img|>"}]},
        {"role": "user", "content": [{"type": "image", "path": "a.png", "split_image": True}]},
    ]
    template = (
        "{% for m in messages %}{% for p in m.content %}"
        "{% if 'image' in p or p.type == 'image' %}<|img|>{{ p.image }}{{ p.path }}{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    prompt = render_template(template, messages)
    assert prompt == "<|img|><|img|><|img|>" and prompt.slots == (0, 14)
    assert prompt.parts[0].source is picture and prompt.parts[1].split_image is True
    with pytest.raises(ValueError, match=r"writes <\|img\|> 0 times for 2 media parts of the messages"):
        render_template("{{ messages }}", messages)


def test_templates_get_the_variables_of_transformers(processor: AriaProcessor) -> None:
    template = (
        "{%- for m in messages -%}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{%- endfor -%}{{ strftime_now('%Y')[:2] }} {{ eos_token }}{{ bos_token }}{{ documents[0] }}"
    )
    messages = [{"role": "user", "content": "hi "}, {"role": "user", "content": "never"}]
    prompt = processor.apply_chat_template(messages, template, documents=["D"])
    assert prompt == "hi 20 <|endoftext|>D" and not list(prompt.literal_markers())
    processor.chat_template = template
    try:
        assert processor.apply_chat_template(messages, documents=["D"]) == prompt
    finally:
        processor.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "more", "complaint"),
    [
        ("{% if %}", {}, "the chat template cannot be parsed"),
        ("{{ raise_exception('roles must alternate') }}", {}, "cannot be rendered: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", {}, "the chat template cannot be rendered: access to attribute"),
        ("{{ messages[7].content }}", {}, "cannot be rendered"),
        ("{{ messages }}", {"enable_thinking": True}, "has no variables enable_thinking; it has messages"),
        ("{{ messages }}", {"continue_final_message": True, "add_generation_prompt": True}, "use one"),
        ("nothing", {"continue_final_message": True}, "omits the final message"),
        ("{{ messages }}{{ tools }}", {"tools": [print]}, "describe each as a mapping"),
        (None, {"enable_thinking": True}, "unknown arguments: enable_thinking; Aria's chat template has no variables"),
        (None, {"tools": [{"parameters": {}}]}, 'tool 0 should be a mapping such as {"name"'),
        (None, {"continue_final_message": True, "add_generation_prompt": True}, "use one"),
        (None, {"sanitize_control_tokens": False}, "markers in messages are always text; use str(prompt)"),
        (7, {}, "chat_template should be a Jinja template, but is 7"),
    ],
)
def test_refusals(processor: AriaProcessor, template: Any, more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError) as error:
        processor.apply_chat_template([{"role": "user", "content": "a"}], template, **more)
    assert complaint in str(error.value)


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}


def test_tools_and_calls_are_written_as_training_and_the_server_write_them(processor: AriaProcessor) -> None:
    tool = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    listed = instructions([tool])
    asked = {"role": "user", "content": "?"}
    for tools in ([tool], [{"type": "function", "function": {**tool, "strict": True}}]):
        assert render([asked], tools=tools) == render([{"role": "system", "content": listed}, asked])
        system = {"role": "system", "content": "Be brief."}
        assert render([system, asked], tools=tools) == render([{**system, "content": f"Be brief.\n\n{listed}"}, asked])
        shown = {"role": "system", "content": [{"type": "image"}]}
        assert len(render([shown, asked], tools=tools).slots) == 1
    written = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
    for content, text in ((None, written), ("I look.", f"I look.\n{written}"), ("", written)):
        messages = [{"role": "assistant", "content": content, "tool_calls": [CALL]}]
        messages.append({"role": "tool", "name": "look", "tool_call_id": "1", "content": "red"})
        plain = [{"role": "assistant", "content": text}, {"role": "tool", "content": "look: red"}]
        assert render(messages) == render(plain)
        assert processor.apply_chat_template(messages) == render(plain)
    assert render([{"role": "assistant", "tool_calls": [CALL]}]) == render([{"role": "assistant", "content": written}])
    with pytest.raises(ValueError, match=r'call 0 of message 0 should be a mapping such as \{"function"'):
        render([{"role": "assistant", "tool_calls": ["look"]}])
    with pytest.raises(ValueError, match="message 0 has unknown keys: tool_calls; supported are role and content"):
        render([{"role": "user", "content": "", "tool_calls": [CALL]}])


def test_the_last_message_stays_open(processor: AriaProcessor) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is "}]
    opened = processor.apply_chat_template(messages, continue_final_message=True)
    assert opened == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert isinstance(opened, Prompt) and not list(opened.literal_markers())
    prepared = processor.prepare(messages, add_generation_prompt=False, continue_final_message=True)
    assert prepared.ids == processor.tokenizer.encode(opened)
    for last in ([], [{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": []}]):
        with pytest.raises(ValueError, match=r"needs a final message that ends with text|needs one"):
            render(last, continue_final_message=True)
        with pytest.raises(ValueError, match=r"needs a final message that ends with text|places"):
            render_template(SAME, last, continue_final_message=True)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers(1, 1 << 30)
    yield started
    started.close()


def test_a_template_renders_the_same_in_a_worker(workers: Workers) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what <|im_end|> ü\n"}],
        },
        {"role": "assistant", "content": "a \ud800 half", "weight": 1.5, "calls": [None, True, {"a": (1, 2)}]},
        {"role": "user", "content": "and?"},
    ]
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content | trim }}{% else %}"
        "{% for p in m.content %}{{ '<|img|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
        "{{ m.calls | tojson if m.calls }}{{ m.weight }}<|im_end|>\n{% endfor %}{{ style }}{{ eos_token }}"
    )
    settings: dict[str, Any] = {"variables": {"style": "brief"}, "constants": {"eos_token": "</s>"}}
    here, there = (render_template(template, messages, **settings, workers=one) for one in (None, workers))
    assert str(here) == str(there) and here.slots == there.slots and here.markup == there.markup
    assert "brief</s>" in here and '[null, true, {"a": [1, 2]}]' in here


HOSTILE = {
    "a loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of a variable": "{% set x = 10 %}{{ x ** (x ** x) }}",
    "a text": "{{ 'x' * 10 ** 12 }}",
    "texts": "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "padding": "{{ 'x' | center(10 ** 12) }}",
    "a format": "{{ '%1000000000000d' % 1 }}",
    "a range": "{{ range(10 ** 9) | list }}",
    "words": "{{ lipsum(10 ** 9) }}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "an attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a format of an attribute": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a global": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "a change": "{{ messages.append(1) }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_malicious_templates_are_aborted(name: str, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 2.0)
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="the chat template"):
        render_template(HOSTILE[name], messages, workers=workers)
    assert str(render_template("{{ messages[0].content }}", messages, workers=workers)) == "hello"


def test_rendered_text_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 10)
    with pytest.raises(ValueError, match="the chat template produces 11 characters; at most 10 are allowed"):
        render_template("{{ 'x' * 11 }}", [])


def test_templates_render_in_the_worker_processes_of_media() -> None:
    processor = AriaProcessor.from_pretrained()
    assert processor.workers is None
    processor.media = MediaSettings(workers=1)
    assert processor.workers is shared_workers(processor.media)
    processor.chat_template = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="took longer than 1 s"):
        patched.setattr(templates, "RENDER_SECONDS", 1.0)
        processor.apply_chat_template([{"role": "user", "content": "hello"}])
