"""Fields of OpenAI's and vLLM's interfaces: each is implemented, accepted without effect, or refused by name."""

from __future__ import annotations

import re

import pytest
from openai.types import chat, completion_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.responses import response_create_params
from pydantic import BaseModel, ValidationError

from aria.serve import generation_request, protocol, responses_protocol
from aria.serve.errors import ApiError, from_validation
from aria.serve.generation_request import Defaults
from aria.serve.protocol import ChatRequest, CompletionRequest
from aria.serve.protocol_base import names_of
from aria.serve.responses_protocol import ResponsesRequest

DEFAULTS = Defaults(sizes=(224, 448), max_model_len=100, variables=frozenset({"style"}))
HELLO = [{"role": "user", "content": "hello"}]
PICTURE = "data:image/png;base64,AAAA"
BODIES: dict[type[BaseModel], dict] = {
    ChatRequest: {"messages": HELLO},
    CompletionRequest: {"prompt": "hello"},
    ResponsesRequest: {"input": "hello"},
}
# vLLM's own fields of each of its bodies.
VLLM = [
    "request_id",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "truncate_prompt_tokens",
    "truncation_side",
    "allowed_token_ids",
    "add_special_tokens",
    "spaces_between_special_tokens",
    "priority",
    "session_id",
    "cache_salt",
    "return_tokens_as_token_ids",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "watermarking",
    "logprob_token_ids",
    "thinking_token_budget",
    "stream_interval",
]
VLLM_CHAT = [
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "echo",
    "documents",
    "chat_template",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "include_reasoning",
    "bad_words",
    "return_prompt_text",
    "return_mm_kwargs",
]
VLLM_RESPONSES = [
    "cache_salt",
    "enable_response_messages",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "mm_processor_kwargs",
    "previous_input_messages",
    "previous_response",
    "priority",
    "repetition_penalty",
    "request_id",
    "seed",
    "skip_special_tokens",
    "stop",
    "top_k",
    "vllm_xargs",
]


def known(model: type) -> set[str]:
    return {*names_of(model), *model.known}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        (response_create_params.ResponseCreateParamsBase, ResponsesRequest),
        (chat.ChatCompletionStreamOptionsParam, protocol.StreamOptions),
        (response_create_params.StreamOptions, responses_protocol.ResponseStreamOptions),
        (chat.ChatCompletionSystemMessageParam, protocol.SystemMessage),
        (chat.ChatCompletionDeveloperMessageParam, protocol.SystemMessage),
        (chat.ChatCompletionUserMessageParam, protocol.UserMessage),
        (chat.ChatCompletionAssistantMessageParam, protocol.AssistantMessage),
        (chat.ChatCompletionMessage, protocol.AssistantMessage),
        (chat.ParsedChatCompletionMessage, protocol.AssistantMessage),
        (chat.ChatCompletionToolMessageParam, protocol.ToolMessage),
        (chat.ChatCompletionAllowedToolsParam, protocol.AllowedTools),
        (responses.ToolChoiceAllowedParam, responses_protocol.FlatAllowedTools),
        (responses.ParsedResponseOutputText, responses_protocol.PriorOutputText),
        (chat.ChatCompletionContentPartTextParam, protocol.TextPart),
        (chat.ChatCompletionContentPartImageParam, protocol.ImageUrlPart),
        (chat.ChatCompletionContentPartRefusalParam, protocol.RefusalPart),
        (ImageURL, protocol.ImageUrl),
        (shared_params.FunctionDefinition, protocol.Function),
        (responses.EasyInputMessageParam, responses_protocol.InputMessage),
        (responses.ResponseOutputMessageParam, responses_protocol.InputMessage),
        (responses.ResponseFunctionToolCallParam, responses_protocol.InputCall),
        (responses.response_input_item_param.FunctionCallOutput, responses_protocol.InputResult),
        (responses.ResponseReasoningItemParam, responses_protocol.InputReasoning),
        (responses.ResponseInputTextParam, responses_protocol.InputText),
        (responses.ResponseInputImageParam, responses_protocol.InputImage),
        (responses.ResponseInputFileParam, responses_protocol.InputFile),
        (responses.ResponseOutputTextParam, responses_protocol.PriorOutputText),
        (responses.FunctionToolParam, responses_protocol.FlatTool),
        (responses.ResponseTextConfigParam, responses_protocol.TextSettings),
        (shared_params.Reasoning, responses_protocol.Reasoning),
    ],
)
def test_every_field_of_the_official_client_is_known(theirs, ours):
    fields = {"model", *theirs.model_fields} if issubclass(theirs, BaseModel) else set(theirs.__annotations__)
    assert fields - {"model"} <= known(ours)


def test_every_field_of_vllm_is_known():
    assert {*VLLM, "response_format"} <= known(ChatRequest) & known(CompletionRequest)
    assert set(VLLM_CHAT) <= known(ChatRequest)
    assert set(VLLM_RESPONSES) <= known(ResponsesRequest)
    assert not {one for model in BODIES for one in set(model.known) & set(names_of(model))}, "in two places"


def refusal(model: type[BaseModel], body: dict) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return from_validation(caught.value.errors(include_url=False))


def user(**part) -> dict:
    return {"messages": [{"role": "user", "content": [part]}]}


def answer(**fields) -> dict:
    return {"messages": [*HELLO, {"role": "assistant", "content": "x", **fields}, *HELLO]}


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low", "verbosity": "medium"},
        {"functions": [], "function_call": "auto", "modalities": ["text"], "logit_bias": {}, "documents": []},
        {"use_beam_search": False, "length_penalty": 1.0, "priority": 0, "mm_processor_kwargs": {}, "bad_words": []},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"stream": None, "stream_options": None, "unheard_of": None},
        {"chat_template_kwargs": {"enable_thinking": False, "add_generation_prompt": None}, "request_id": None},
        {"messages": [{"role": role, "content": "x", "name": "bob"} for role in ("system", "user", "assistant")]},
        {"messages": [{"role": "user", "content": "x", "name": None, "cache_control": {"type": "ephemeral"}}]},
        user(type="text", text="x", cache_control={"type": "ephemeral"}),
        user(type="image_url", image_url={"url": PICTURE, "detail": "original"}, cache_control=None),
        user(type="image_url", image_url={"url": PICTURE, "detail": None, "split": None}),
        user(type="file", file={"file_data": "AAAA", "file_url": None, "file_id": None, "detail": None}),
        user(type="video_url", video_url={"url": "a.mp4", "detail": "original", "fps": None}),
        answer(parsed={"k": 1}, refusal=None, annotations=[{"type": "url_citation"}], audio=None, function_call=None),
        answer(reasoning_content="y", reasoning="y", tool_calls=None),
        answer(tool_calls=[{"id": "1", "type": None, "function": {"name": "f", "arguments": "{}"}}]),
        {"tools": [{"type": "function", "cache_control": {}, "function": {"name": "f", "strict": None}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": None, "strict": None}}},
        {"logprobs": False, "top_logprobs": 0, "max_tokens": 5, "max_completion_tokens": 5},
        # Fields that clients of other providers send back, and calls without arguments.
        answer(tool_calls=[{"id": "1", "index": 0, "extra_content": {"a": {}}, "provider_specific_fields": {"a": 1},
                            "function": {"name": "f", "arguments": None, "provider_specific_fields": {"a": 1}}}]),
        {"tools": [{"type": None, "function": {"name": "f"}}], "tool_choice": {"function": {"name": "f"}}},
    ],
)  # fmt: skip
def test_fields_without_effect_are_accepted_in_chats(fields):
    generation_request.chat(ChatRequest.model_validate({"messages": HELLO, **fields}), DEFAULTS)


def test_integers_may_be_written_as_floats():
    body = ChatRequest.model_validate({"messages": HELLO, "max_tokens": 5.0, "seed": -3.0, "n": 2.0, "temperature": 1})
    assert (body.max_tokens, body.seed, body.n, body.temperature) == (5, -3, 2, 1.0)


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("flat", [False, True])
def test_tools_can_be_restricted_to_some(mode, flat):
    def tool(name: str, **more) -> dict:
        return {"type": "function", **({"name": name, **more} if flat else {"function": {"name": name, **more}})}

    allowed = {"mode": mode, "tools": [tool("b"), tool("c")]}
    body = {
        "tools": [tool(name, parameters={"type": "object"}) for name in "abc"],
        "tool_choice": {"type": "allowed_tools", **(allowed if flat else {"allowed_tools": allowed})},
    }
    if flat:
        asked = responses_protocol.read(ResponsesRequest.model_validate({"input": "hello", **body}), DEFAULTS)
    else:
        asked = generation_request.chat(ChatRequest.model_validate({"messages": HELLO, **body}), DEFAULTS)
    assert asked.functions == ("b", "c")
    assert '"name": "a"' not in asked.prompts[0][0]["content"]
    assert [bound.param[:8] for bound in asked.bound] == ["tools[1]", "tools[2]"]
    assert (asked.params.json_schema is not None) is (mode == "required")


def test_completions_follow_a_response_format():
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    body = CompletionRequest.model_validate({"prompt": "hello", "response_format": wanted})
    assert generation_request.completion(body, DEFAULTS).params.json_schema == {"const": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}},
        {"reasoning": {"effort": None}, "include": None, "text": {"format": None, "verbosity": "medium"}},
        {"truncation": "disabled", "background": False, "previous_response_id": None, "max_tool_calls": 4},
        {"input": [{"type": None, "role": "user", "content": "x", "phase": None, "id": None}]},
        {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}, *HELLO]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a", "detail": "original"}]}]},
        {"tools": [{"type": "function", "name": "f", "strict": None, "defer_loading": False, "output_schema": {}}]},
        {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "x", "parsed": {"k": 1}}]}]},
        {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "parsed_arguments": {}}]},
    ],
)
def test_fields_without_effect_are_accepted_in_responses(fields):
    assert responses_protocol.messages(ResponsesRequest.model_validate({"input": "hello", **fields}))


def test_include_distinguishes_logprobs_from_unavailable_output():
    body = {"input": "x", "include": ["reasoning.encrypted_content"]}
    assert not ResponsesRequest.model_validate(body).wants_logprobs
    body["include"].append("message.output_text.logprobs")
    assert ResponsesRequest.model_validate(body).wants_logprobs


@pytest.mark.parametrize(
    ("model", "fields", "param", "code", "says"),
    [
        (ChatRequest, {"max_token": 3}, "max_token", "unsupported_field", "did you mean max_tokens?"),
        (ChatRequest, {"zzz": 3}, "zzz", "unsupported_field", "leave it out"),
        (ChatRequest, {"a" * 5000: 3}, "a" * 256, "unsupported_field", "leave it out"),
        (ChatRequest, {"length_penalty": True}, "length_penalty", "unsupported_value", "beam search"),
        (ChatRequest, {"use_beam_search": True}, "use_beam_search", "unsupported_value", "beam search"),
        (ChatRequest, {"allowed_token_ids": [1]}, "allowed_token_ids", "unsupported_field", "logit_bias"),
        (ChatRequest, {"audio": {"voice": "x"}}, "audio", "unsupported_field", "no audio"),
        (ChatRequest, {"verbosity": "low"}, "verbosity", "unsupported_value", "the length that you want"),
        (ChatRequest, {"priority": -1}, "priority", "unsupported_value", "order of their arrival"),
        (ChatRequest, answer(audio={"id": "1"}), "messages[1].audio", "unsupported_field", "no audio"),
        (ChatRequest, answer(function_call={"name": "f"}), "messages[1].function_call", "unsupported_field", "tool_"),
        (ChatRequest, user(type="text", text="x", cache_contrl="y"), "messages[0].content[0].cache_contrl",
         "unsupported_field", "cache_control"),
        (ChatRequest, user(type="file", file={"file_id": "1", "file_data": "x"}), "messages[0].content[0].file.file_id",
         "unsupported_field", "no files are stored"),
        (CompletionRequest, {"best_of": 2}, "best_of", "unsupported_value", "use n"),
        (CompletionRequest, {"prompt_embeds": "x"}, "prompt_embeds", "unsupported_field", "token ids"),
        (ResponsesRequest, {"previous_response_id": "x"}, "previous_response_id", "unsupported_field", "whole conv"),
        (ResponsesRequest, {"conversation": "x"}, "conversation", "unsupported_field", "nothing is stored"),
        (ResponsesRequest, {"reasoning": {"efort": "x"}}, "reasoning.efort", "unsupported_field", "mean effort"),
        (ResponsesRequest, {"include": ["x"]}, "include[0]", "invalid_value", "message.output_text.logprobs"),
    ],
)  # fmt: skip
def test_fields_that_would_change_the_response_are_refused_by_name(model, fields, param, code, says):
    error = refusal(model, {**BODIES[model], **fields})
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param in error.message and says in error.message


@pytest.mark.parametrize(
    ("fields", "opens", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"chat_template_kwargs": {"continue_final_message": True}}, False, True),
        ({"add_generation_prompt": True, "chat_template_kwargs": {"add_generation_prompt": False}}, False, False),
    ],
)
def test_options_for_the_end_of_a_prompt(fields, opens, continues):
    template = generation_request.template(ChatRequest.model_validate({"messages": HELLO, **fields}), DEFAULTS)
    assert template == {"add_generation_prompt": opens, "continue_final_message": continues, "variables": {}}


def test_variables_of_the_template_are_passed_on_and_others_are_refused():
    def template(**variables) -> dict:
        body = ChatRequest.model_validate({"messages": HELLO, "chat_template_kwargs": variables})
        return generation_request.template(body, DEFAULTS)

    assert template(style="short", enable_thinking=False, documents=[], nothing=None)["variables"] == {"style": "short"}
    for variables, param, says in (
        ({"styl": 1}, "styl", "did you mean style?"),
        ({"enable_thinkin": 1}, "enable_thinkin", "did you mean enable_thinking?"),
        ({"tools": [1]}, "tools", "use tools of the request"),
        ({"zzz": 1}, "zzz", "leave it out"),
    ):
        with pytest.raises(ApiError, match=re.escape(says)) as caught:
            template(**variables)
        assert (caught.value.param, caught.value.code) == (f"chat_template_kwargs.{param}", "unsupported_field")
    with pytest.raises(ApiError, match="should be true or false"):
        template(continue_final_message="yes")


def test_contradicting_endings_are_refused():
    body = {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(ApiError, match="set one of them to false"):
        generation_request.template(ChatRequest.model_validate(body), DEFAULTS)


def test_fields_without_effect_are_in_the_description():
    schema = ChatRequest.model_json_schema()
    assert {"prediction", "verbosity", "stream_interval"} <= schema["properties"].keys()
    assert schema["properties"]["verbosity"]["enum"] == [None, "medium"]
    assert "audio" not in schema["properties"] and schema["additionalProperties"] is False
