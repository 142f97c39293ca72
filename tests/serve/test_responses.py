"""`/v1/responses` with OpenAI's client; bodies without a server; incremental calls and log-probabilities."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria.engine import SamplingParams, TokenLogprob
from aria.media.open import Base64
from aria.serve import generation_request, responses_protocol
from aria.serve.choice_parser import ChoiceParser
from aria.serve.endpoints import answer
from aria.serve.generation_request import Defaults, GenerationRequest
from aria.serve.protocol import ChatRequest
from aria.serve.responses_protocol import ResponsesRequest
from aria.serve.tool_calls import Call, CallReader, UntaggedCallReader
from tests.helpers.serving import PICTURES, data_uri, engine, running, straight

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "check", "parameters": SCHEMA, "strict": True}
DEFAULTS = Defaults(sizes=(224, 448), max_model_len=100)


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def ask(live, **fields):
    return live.openai.responses.create(
        **{"model": "aria-nano", "input": "hello", "temperature": 0, "max_output_tokens": 64, **fields}
    )


def test_a_response_equals_the_engines_result(live):
    response = ask(live)
    expected = straight(HELLO)
    assert response.output_text == expected.text
    assert response.status == "completed"
    assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert response.usage.output_tokens == expected.usage.completion_tokens
    assert response.store is False
    short = ask(live, max_output_tokens=3)
    assert short.status == short.output[0].status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"


def test_responses_accept_the_extensions_of_chats(live):
    complete = ask(live).output_text
    assert ask(live, extra_body={"stop": complete[4:6]}).output_text == complete[: complete.index(complete[4:6])]
    [Z] = engine().engine.processor.tokenizer.encode("Z")
    fixed = ask(live, max_output_tokens=4, extra_body={"logit_bias": {str(Z): 100}, "request_id": "mine"})
    assert (fixed.output_text, fixed.id) == ("ZZZZ", "resp_mine")


def test_events_add_up_to_the_same_response(live):
    with live.openai.responses.stream(model="aria-nano", input="hello", temperature=0, max_output_tokens=64) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == ask(live).output_text
    assert len(deltas) > 5


def test_instructions_images_and_earlier_turns_are_read(live):
    url = data_uri((PICTURES / "word.png").read_bytes())
    said = [
        {"role": "user", "content": "hello"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello!"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "low"},
                                     {"type": "input_text", "text": "What does it say?"}]},
    ]  # fmt: skip
    response = ask(live, instructions="Be brief.", input=said)
    size = min(engine().engine.processor.image_processor.sizes)
    image = {"type": "image", "image": (PICTURES / "word.png").read_bytes(), "max_image_size": size}
    same = [
        {"role": "system", "content": "Be brief."},
        said[0],
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [image, {"type": "text", "text": "What does it say?"}]},
    ]
    expected = straight(same)
    assert response.output_text == expected.text
    assert response.usage.input_tokens == expected.usage.prompt_tokens


def test_output_formats_and_calls(live):
    form = {"format": {"type": "json_schema", "name": "check", "schema": SCHEMA, "strict": True}}
    assert json.loads(ask(live, text=form).output_text).keys() == {"ok"}
    [call] = ask(live, tools=[TOOL], tool_choice="required").output
    assert (call.type, call.name) == ("function_call", "check")
    again = [{"role": "user", "content": "hello"}, call.model_dump(), {
        "type": "function_call_output", "call_id": call.call_id, "output": "true"}]  # fmt: skip
    assert ask(live, input=again, tools=[TOOL], max_output_tokens=2).status == "incomplete"
    events = list(ask(live, tools=[TOOL], tool_choice={"type": "function", "name": "check"}, stream=True))
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert json.loads(arguments).keys() == {"ok"}
    assert events[-1].response.output[0].arguments == arguments


def test_logprobs_are_returned_if_included(live):
    response = ask(live, include=["message.output_text.logprobs"], top_logprobs=2)
    reported = response.output[0].content[0].logprobs
    assert "".join(one.token for one in reported) == response.output_text
    assert all(len(one.top_logprobs) == 2 for one in reported)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}, 200),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}, 200),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2}, 200),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True}, 400),
        ("/v1/chat/completions", {"messages": HELLO, "model": "other"}, 404),
        ("/v1/chat/completions", {"messages": [], "max_tokens": 2}, 400),
        ("/v1/embeddings", {"input": "x"}, 404),
    ],
)
def test_bodies_are_answered_without_http_as_with_it(live, path, body, status):
    got, reply = asyncio.run(answer(live.app.state.service, path, body))
    assert got == status
    if not body.get("stream") and path != "/v1/embeddings":
        said = live.post(path, **body)
        assert said.status_code == status
        assert said.json().keys() == reply.keys()


# Bodies


def test_bodies_become_messages_and_parameters():
    body = ChatRequest.model_validate(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low", "split": True}},
                        {"type": "video_url", "video_url": {"url": "b.mp4", "num_frames": 8, "timestamps": False}},
                        {"type": "file", "file": {"file_data": "AAAA", "filename": "c.pdf", "pages": "1-2"}},
                        {"type": "text", "text": "what?"},
                    ],
                }
            ],
            "stop": "x",
            "logit_bias": {"5": -1},
            "max_completion_tokens": 7,
        }
    )
    asked = generation_request.chat(body, DEFAULTS)
    [[message]] = asked.prompts
    assert message["content"] == [
        {"type": "image", "url": "a.png", "max_image_size": 224, "split_image": True},
        {"type": "video", "url": "b.mp4", "max_image_size": 224, "num_frames": 8, "timestamps": False},
        {
            "type": "document",
            "document": Base64("AAAA"),
            "pages": "1-2",
            "max_image_size": 448,
        },
        {"type": "text", "text": "what?"},
    ]
    assert asked.params == SamplingParams(max_tokens=7, temperature=1.0, stop="x", logit_bias={5: -1})
    assert asked.media
    new = ResponsesRequest.model_validate(
        {"input": [{"role": "user", "content": [{"type": "input_video", "video_url": "b.mp4", "fps": 2.0},
                                                {"type": "input_file", "file_url": "https://a/c.pdf"}]}]}
    )  # fmt: skip
    [[message]] = responses_protocol.read(new, DEFAULTS).prompts
    assert message["content"] == [
        {"type": "video", "url": "b.mp4", "max_image_size": 224, "fps": 2.0},
        {"type": "document", "url": "https://a/c.pdf", "max_image_size": 448},
    ]


def test_functions_are_appended_to_the_system_message():
    system = {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    function = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    body = ChatRequest.model_validate({"messages": [system, *HELLO], "tools": [function]})
    [[first, second]] = generation_request.chat(body, DEFAULTS).prompts
    assert first["content"].startswith("Be brief.\n\nYou may call functions.")
    assert second["content"] == "hello"
    assert generation_request.chat(body, DEFAULTS).params.stop == ()
    one = body.model_copy(update={"parallel_tool_calls": False})
    assert not generation_request.chat(one, DEFAULTS).parallel and generation_request.chat(body, DEFAULTS).parallel


# Incremental calls


TEXT = (
    'I look.\n<tool_call>{"name": "f", "arguments": {"a": "<tool"}}</tool_call>\n<tool_call>{"name": "f"}</tool_call>'
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(TEXT)), max_size=12))
def test_calls_are_found_in_any_split_of_the_text(cuts):
    places = [0, *sorted(cuts), len(TEXT)]
    reader = CallReader(["f"])
    found: list = []
    for start, end in itertools.pairwise(places):
        new = reader.push(TEXT[start:end])
        assert not any("<" in one for one in new if isinstance(one, str)), "no partial tag is emitted"
        found += new
    found += reader.flush()
    assert "".join(one for one in found if isinstance(one, str)) == "I look."
    assert [call.arguments for call in found if isinstance(call, Call)] == ['{"a": "<tool"}', "{}"]


@pytest.mark.parametrize(
    "text",
    [
        "a < b and <tool",
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "argum',
        "spaces at the end  \n",
        "<tool_call>" + "[" * 50_000 + "</tool_call>",
    ],
)
def test_invalid_calls_stay_text(text):
    reader = CallReader(["f"])
    assert "".join([*reader.push(text), *reader.flush()]) == text


def test_a_call_may_lack_its_closing_tag_at_the_end():
    reader = CallReader(["f"])
    assert reader.push('<tool_call>{"name": "f", "arguments": {}}') == []
    [call] = reader.flush()
    assert call.name == "f"


def test_a_grammar_makes_a_call_or_text():
    reader = UntaggedCallReader(["f"])
    assert reader.push('{"name":"f","arguments":{"a":{}') == []
    [call] = reader.push("}}")
    assert json.loads(call.arguments) == {"a": {}}
    assert reader.flush() == []
    assert reader.push('{"ok": true}') == []
    assert reader.flush() == ['{"ok": true}']


def test_logprobs_of_a_stop_text_are_held_back():
    tokenizer = engine().engine.processor.tokenizer
    turn = ChoiceParser(GenerationRequest([HELLO], SamplingParams(logprobs=0)), tokenizer)
    reported = []
    # "He" is text, "y!" might begin a stop text but does not, and then "." ends the text.
    for token, text, finish in (
        ("H", "H", None),
        ("e", "", None),
        ("y", "ey", None),
        ("!", "", None),
        ("x", "", "stop"),
    ):
        [index] = tokenizer.encode(token)
        piece = SimpleNamespace(
            text=text, finish_reason=finish, token_id=index, logprob=TokenLogprob(index, token, -1.0)
        )
        reported += turn.push(piece).logprobs
    assert "".join(one.token for one in reported) == "Hey"
