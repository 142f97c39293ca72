"""Checks of llama.cpp's server tests, as our own requests."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.peers.checks import GREETING, HELLO, Check, chat, completion, function, passes, picture, refused

NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 2}
NAMED = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
FORM = function("form", {"a": {"const": 1}})
PLAIN = {"type": "function", "function": {"name": "plain", "parameters": {"type": "object", "properties": {}}}}
WORD = picture("word.png")
READ = {"type": "text", "text": "What does it say?"}


def form(**format: Any) -> Any:
    return chat("Count.", response_format=format, max_tokens=64)


def is_json(expected: Any) -> Any:
    return lambda reply: json.loads(reply.answer) == expected


def two_numbers(reply: Any) -> bool:
    found = json.loads(reply.answer)
    return len(found) == 2 and all(0 <= one <= 9 for one in found)


CHECKS: tuple[Check, ...] = (
    # Routes
    passes("server", "health", ("/health", None), right=lambda r: r.json["status"] == "ok"),
    passes("server", "list of models", ("/v1/models", None), right=lambda r: r.json["data"][0]["id"] == "aria-nano"),
    passes("server", "metrics", ("/metrics", None), right=lambda r: "# HELP" in r.text),
    refused(
        "server",
        "its own completions",
        ("/completion", {"prompt": "a"}),
        reason="use /v1/chat/completions or /v1/completions",
        status=404,
    ),
    refused("server", "slots", ("/slots", None), reason="requests share the prefix cache", status=404),
    refused(
        "server", "saving slots", ("/slots/0?action=save", {}), reason="requests share the prefix cache", status=404
    ),
    refused("server", "props", ("/props", None), reason="use /v1/models", status=404),
    refused("server", "filling in the middle", ("/infill", {}), reason="cannot fill in the middle", status=404),
    refused("server", "embeddings", ("/embeddings", {"input": "a"}), reason="makes no embeddings", status=404),
    refused("server", "ranks", ("/v1/rerank", {}), reason="makes no scores", status=404),
    refused("server", "the prompt as text", ("/apply-template", {}), reason="use /tokenize", status=404),
    refused(
        "server",
        "adapter scales",
        ("/lora-adapters", None),
        reason="name an adapter in the field model",
        status=404,
    ),
    refused("server", "Anthropic's messages", ("/v1/messages", {}), reason="use /v1/chat/completions", status=404),
    passes(
        "server",
        "body that is not a JSON object",
        ("/v1/chat/completions", []),
        right=lambda r: "object" in r.error["message"],
        status=400,
    ),
    # Chats
    passes(
        "chat",
        "system and user",
        chat(messages=[{"role": "system", "content": "Be kind."}, *HELLO]),
        right=lambda r: r.finish == "stop",
    ),
    passes(
        "chat",
        "token limit",
        chat(max_tokens=4),
        right=lambda r: r.usage["completion_tokens"] == 4 and r.finish == "length",
    ),
    passes("chat", "stream, with the role first", chat(stream=True), right=lambda r: r.answer == GREETING),
    passes(
        "chat",
        "usage at the end of a stream",
        chat(stream=True, stream_options={"include_usage": True}),
        right=lambda r: r.events[-1]["usage"]["completion_tokens"] > 10,
    ),
    passes(
        "chat",
        "a message without content",
        chat(messages=[{"role": "user"}]),
        right=lambda r: r.error["param"] == "messages[0].content",
        status=400,
    ),
    passes(
        "chat", "messages as text", chat(messages="Hello"), right=lambda r: r.error["param"] == "messages", status=400
    ),
    passes(
        "chat",
        "prefilled answer",
        chat(messages=[*HELLO, {"role": "assistant", "content": "Hello!"}], continue_final_message=True),
        right=lambda r: r.answer == GREETING.removeprefix("Hello!"),
    ),
    passes("chat", "images", chat([WORD, READ]), right=lambda r: r.answer == "Welcome"),
    passes(
        "chat",
        "successive requests share a prefix",
        chat("Tell me. " * 9),
        chat("Tell me. " * 9),
        right=lambda _, r: r.usage["prompt_tokens_details"]["cached_tokens"] > 60,
    ),
    # Completions
    passes("completions", "text", completion(), right=lambda r: r.answer != "" and r.usage["completion_tokens"] == 8),
    passes(
        "completions",
        "stream equals the whole answer",
        completion(),
        completion(stream=True),
        right=lambda one, two: one.answer == two.answer,
    ),
    passes("completions", "prompts of token ids", completion([43, 72]), right=lambda r: r.usage["prompt_tokens"] == 2),
    passes("completions", "stop words", chat(stop=["Show"]), right=lambda r: r.answer == "Hello! "),
    passes(
        "completions",
        "the same seed gives the same text",
        completion(seed=3, temperature=2),
        completion(seed=3, temperature=2),
        right=lambda one, two: one.answer == two.answer,
    ),
    refused("completions", "n_predict", completion(n_predict=8), reason="use max_tokens"),
    refused(
        "completions",
        "prompts mixed from text and ids",
        completion([43, "Hello"]),
        reason="input should be a valid integer",
    ),
    # Extensions
    passes(
        "extensions", "cache_prompt, which is always on", chat(cache_prompt=True), right=lambda r: r.answer == GREETING
    ),
    refused("extensions", "cache_prompt off", chat(cache_prompt=False), reason="prompts are always cached"),
    passes(
        "extensions",
        "samplers with neutral values",
        chat(typical_p=1, mirostat=0, dynatemp_range=0, xtc_probability=0, dry_multiplier=0, top_n_sigma=-1),
        right=lambda r: r.answer == GREETING,
    ),
    refused("extensions", "mirostat", chat(mirostat=2), reason="use temperature, top_p, top_k or min_p"),
    refused("extensions", "dry_multiplier", chat(dry_multiplier=0.8), reason="use repetition_penalty"),
    refused(
        "extensions",
        "order of samplers",
        chat(samplers=["top_k"]),
        reason="temperature, top_k, top_p and min_p apply in this order",
    ),
    refused("extensions", "id_slot", chat(id_slot=1), reason="there are no slots"),
    refused("extensions", "n_probs", completion(n_probs=2), reason="use logprobs"),
    refused("extensions", "t_max_predict_ms", chat(t_max_predict_ms=100), reason="use max_tokens"),
    refused("extensions", "timings_per_token", chat(stream=True, timings_per_token=True), reason="/metrics"),
    refused(
        "extensions", "lora scales", chat(lora=[{"id": 0, "scale": 0.5}]), reason="name an adapter in the field model"
    ),
    passes(
        "extensions",
        "min_p, top_k and repetition_penalty",
        chat(min_p=0.1, top_k=40, repetition_penalty=1),
        right=lambda r: r.answer == GREETING,
    ),
    refused("extensions", "repeat_penalty", chat(repeat_penalty=1.1), reason="use repetition_penalty"),
    # Structured output
    passes("structured", "json_object with a schema", form(type="json_object", schema=NAMED), right=is_json({"a": 1})),
    passes("structured", "json_schema with a bare schema", form(type="json_schema", schema=NUMBERS), right=two_numbers),
    passes(
        "structured",
        "json_schema in OpenAI's format",
        form(type="json_schema", json_schema={"schema": NUMBERS}),
        right=two_numbers,
    ),
    passes("structured", "a constant", form(type="json_object", schema={"const": "42"}), right=is_json("42")),
    passes(
        "structured",
        "a schema of a wrong type",
        form(type="json_object", schema=3),
        right=lambda r: "schema" in r.error["param"],
        status=400,
    ),
    passes(
        "structured",
        "an unknown type",
        form(type="sound"),
        right=lambda r: r.error["param"] == "response_format.type",
        status=400,
    ),
    passes(
        "structured",
        "a GBNF grammar, as structured_outputs",
        chat(structured_outputs={"grammar": 'root ::= [a-c]+ "!"'}),
        right=lambda r: bool(re.fullmatch("[a-c]+!?", r.answer)),
    ),
    refused("structured", "grammar", chat(grammar='root ::= "a"'), reason="use structured_outputs"),
    refused(
        "structured", "json_schema outside of response_format", chat(json_schema=NAMED), reason="use response_format"
    ),
    # Tools
    passes(
        "tools",
        "required",
        chat(tools=[FORM], tool_choice="required", max_tokens=100),
        right=lambda r: r.calls == [("form", {"a": 1})],
    ),
    passes(
        "tools",
        "a function without parameters",
        chat(tools=[PLAIN], tool_choice="required", max_tokens=100),
        right=lambda r: r.calls == [("plain", {})],
    ),
    passes("tools", "no tools, none called", chat(tools=[]), right=lambda r: r.answer == GREETING),
    passes("tools", "auto", chat(tools=[FORM], tool_choice="auto"), right=lambda r: r.finish == "stop" and not r.calls),
    passes(
        "tools", "tools as an object", chat(tools={"a": 1}), right=lambda r: r.error["param"] == "tools", status=400
    ),
    # Log-probabilities
    passes(
        "logprobs",
        "chats",
        chat(logprobs=True, top_logprobs=2),
        right=lambda r: all(
            one["logprob"] <= 0 and len(one["top_logprobs"]) == 2 for one in r.choices[0]["logprobs"]["content"]
        ),
    ),
    passes("logprobs", "logit_bias by id", completion(logit_bias={"43": 100}), right=lambda r: len(set(r.answer)) == 1),
    refused(
        "logprobs",
        "logit_bias as a list of pairs",
        chat(logit_bias=[[43, 1]]),
        reason="input should be a valid dictionary",
    ),
    # Tokens
    refused("tokens", "content", ("/tokenize", {"content": "Hello"}), reason="use prompt"),
    passes("tokens", "detokenize", ("/detokenize", {"tokens": [43, 72]}), right=lambda r: len(r.json["prompt"]) == 2),
)
