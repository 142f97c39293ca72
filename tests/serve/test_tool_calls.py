"""Tool calls: generated text -> what clients read, and back into later turns."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aria import SamplingParams
from aria.processor import calls
from aria.serve.choice_parser import ChoiceParser
from aria.serve.generation_request import Defaults, GenerationRequest, _answer, chat
from aria.serve.protocol import AssistantMessage, ChatRequest
from aria.serve.tool_calls import Call, CallReader, parse

NESTED = json.dumps({"path": "a.md", "text": 'quote " and </tool_call> and <tool_call>{"name": "f"}</tool_call>\\'})
SAID = f"Saved.\n{calls.format_call('f', NESTED)}\n{calls.format_call('f', '')}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(SAID)), max_size=12))
def test_tags_inside_arguments_are_text_in_any_split(cuts):
    reader = CallReader(["f"])
    found = [one for a, b in itertools.pairwise([0, *sorted(cuts), len(SAID)]) for one in reader.push(SAID[a:b])]
    found += reader.flush()
    assert "".join(one for one in found if isinstance(one, str)) == "Saved."
    assert [call.arguments for call in found if isinstance(call, Call)] == [NESTED, "{}"]


def test_whitespace_around_calls_is_dropped_in_any_split():
    call = calls.format_call("save", "{}")
    text = f"so: \n{call} \n{call}\n\n done {call} \n "
    for size in range(1, len(text) + 1):
        reader = CallReader(("save",))
        parts = [part for i in range(0, len(text), size) for part in reader.push(text[i : i + size])] + reader.flush()
        assert sum(isinstance(part, Call) for part in parts) == 3
        assert "".join(part for part in parts if isinstance(part, str)) == "so:done"


def test_a_call_with_unmatched_quotes_does_not_hide_later_calls():
    broken = '<tool_call>{"name": "f", "arguments": {"a": "it"s"}}</tool_call>'
    reader = CallReader(["f"])
    found = [*reader.push(broken + calls.format_call("f", '{"a": 1}') + " done"), *reader.flush()]
    text = "".join(one for one in found if isinstance(one, str))
    assert text == f"{broken}done"
    assert [call.arguments for call in found if isinstance(call, Call)] == ['{"a": 1}']


@pytest.mark.parametrize(
    "arguments",
    ['{"n": NaN}', '{"n": [-Infinity]}', '{"n": "cut \\ud83d"}', '{"\\udc00": 1}', '{"n": "cut', "[1]", '"{}"', "1"],
)
def test_arguments_that_are_not_json_stay_text(arguments):
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(text[len(calls.OPEN) : -len(calls.CLOSE)], ["f"]) is None
    reader = CallReader(["f"])
    assert "".join([*reader.push(text), *reader.flush()]) == text


@pytest.mark.parametrize(
    "arguments",
    [
        '{"n": 1e999}',
        '{"n":12345678901234567890123, "x" : 1.0e-2}',
        '{"a": 1, "a": 2}',
        '{"s": "\\ud83d\\ude00"}',
        "{ }",
    ],
)
def test_arguments_keep_the_models_spelling(arguments):
    call = parse(f' {{ "arguments" : {arguments} , "name":"f"}}\n', ["f"])
    assert call is not None and call.arguments == arguments


@pytest.mark.parametrize(
    "arguments", ['{"path": "notes.txt", "text": "cut of', "", "not JSON", '{"n": NaN}', "[" * 99_999]
)
def test_earlier_calls_are_kept_unchanged(arguments):
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    message = AssistantMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    assert _answer(message) == f'<tool_call>{{"name": "f", "arguments": {arguments or "{}"}}}</tool_call>'


def test_without_parallel_calls_the_answer_ends_after_one():
    turn = ChoiceParser(GenerationRequest([], SamplingParams(), functions=("f",), parallel=False), None)
    texts = [SAID[:70], SAID[70:], "more", ""]
    pieces = [SimpleNamespace(text=text, finish_reason=None) for text in texts]
    deltas = [turn.push(piece) for piece in pieces]
    assert [part for delta in deltas for part in delta.parts if isinstance(part, str)] == ["Saved."]
    assert [part.arguments for delta in deltas for part in delta.parts if isinstance(part, Call)] == [NESTED]
    assert [delta.finish_reason for delta in deltas] == [None, "tool_calls", None, None] and turn.finished


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, True),
        ({"type": "json_object", "schema": {"const": 1}}, {"const": 1}),
        ({"type": "json_schema", "schema": {"const": 1}}, {"const": 1}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}}}, {"const": 1}),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, {}),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, True),
    ],
)
def test_output_formats_in_openais_and_llama_cpps_syntax(form, schema):
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "response_format": form})
    assert chat(body, Defaults(sizes=(224,), max_model_len=9)).params.json_schema == schema


@pytest.mark.parametrize("more", [{}, {"schema": {}, "json_schema": {"name": "a"}}])
def test_a_format_has_exactly_one_schema(more):
    form = {"type": "json_schema", **more}
    with pytest.raises(ValidationError, match=r"give json_schema .* or schema"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "response_format": form})


def test_calls_that_clients_send_back_are_accepted():
    call = {"id": "1", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}}
    message = AssistantMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    assert _answer(message) == '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
