"""Checks of vLLM's server tests: structured output, tools, media, responses, tokens and adapters."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.peers.checks import GREETING, HELLO, Check, chat, completion, function, passes, picture, refused, responses

COLOURS = ["red", "green", "blue"]
PAINT = function("paint", {"colour": {"enum": COLOURS}})
COUNT = function("count", {"number": {"type": "integer", "minimum": 0, "maximum": 9}})
SCHEMA = {"type": "object", "properties": {"colour": {"enum": COLOURS}}, "required": ["colour"]}
WORD = picture("word.png")
READ = {"type": "text", "text": "What does it say?"}


def structured(**kind: Any) -> Any:
    return chat("What colour is it?", structured_outputs=kind)


def follows(reply: Any) -> bool:
    """Return whether an answer follows SCHEMA."""
    found = json.loads(reply.answer)
    return list(found) == ["colour"] and found["colour"] in COLOURS


CHECKS: tuple[Check, ...] = (
    # Structured output
    passes("structured", "json", structured(json=SCHEMA), right=follows),
    passes("structured", "json as text", structured(json=json.dumps(SCHEMA)), right=follows),
    passes("structured", "choice", structured(choice=COLOURS), right=lambda r: r.answer in COLOURS),
    passes(
        "structured",
        "regex",
        structured(regex=r"\d{3}-\d{2}"),
        right=lambda r: bool(re.fullmatch(r"\d{3}-\d{2}", r.answer)),
    ),
    passes(
        "structured", "grammar", structured(grammar='root ::= "yes" | "no"'), right=lambda r: r.answer in ("yes", "no")
    ),
    passes("structured", "json_object", chat(response_format={"type": "json_object", "schema": SCHEMA}), right=follows),
    passes(
        "structured",
        "response_format with json_schema",
        chat(response_format={"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA}}),
        right=follows,
    ),
    passes(
        "structured",
        "structural_tag",
        chat(
            response_format={
                "type": "structural_tag",
                "structures": [{"begin": "<c>", "schema": SCHEMA, "end": "</c>"}],
                "triggers": ["<c>"],
            }
        ),
        right=lambda r: r.answer == GREETING,
    ),
    passes("structured", "streamed", chat(stream=True, structured_outputs={"json": SCHEMA}), right=follows),
    passes(
        "structured",
        "two kinds at once",
        structured(json=SCHEMA, choice=COLOURS),
        right=lambda r: "one of" in r.error["message"],
        status=400,
    ),
    passes(
        "structured",
        "an invalid regex",
        structured(regex="("),
        right=lambda r: "structured_outputs" in r.error["param"],
        status=400,
    ),
    passes(
        "structured",
        "completions",
        completion(structured_outputs={"choice": COLOURS}),
        right=lambda r: r.answer in COLOURS,
    ),
    refused(
        "structured", "guided_json and other older names", chat(guided_json=SCHEMA), reason="use structured_outputs"
    ),
    # Tools
    passes(
        "tools",
        "required: a call of one of them",
        chat(tools=[PAINT, COUNT], tool_choice="required", max_tokens=200),
        right=lambda r: r.finish == "tool_calls" and r.calls[0][0] in ("paint", "count"),
    ),
    passes(
        "tools",
        "a named function",
        chat(tools=[PAINT, COUNT], tool_choice={"type": "function", "function": {"name": "count"}}, max_tokens=200),
        right=lambda r: r.calls[0][0] == "count" and 0 <= r.calls[0][1]["number"] <= 9,
    ),
    passes(
        "tools",
        "a call in a stream",
        chat(tools=[PAINT], tool_choice="required", max_tokens=200, stream=True),
        right=lambda r: "paint" in r.text and r.events[-1]["choices"][0]["finish_reason"] == "tool_calls",
    ),
    passes(
        "tools",
        "auto: text where nothing is called",
        chat(tools=[PAINT]),
        right=lambda r: not r.calls and r.finish == "stop",
    ),
    passes("tools", "none", chat(tools=[PAINT], tool_choice="none"), right=lambda r: not r.calls),
    passes(
        "tools",
        "tool_choice of an unknown function",
        chat(tools=[PAINT], tool_choice={"type": "function", "function": {"name": "other"}}),
        right=lambda r: "other" in r.error["message"],
        status=400,
    ),
    passes(
        "tools",
        "tool_choice without tools",
        chat(tool_choice="required"),
        right=lambda r: "tools" in r.error["message"],
        status=400,
    ),
    passes(
        "tools",
        "calls and results in the conversation",
        chat(
            messages=[
                *HELLO,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "paint", "arguments": '{"colour":"red"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "Noted."},
                {"role": "user", "content": "Thank you."},
            ],
            tools=[PAINT],
        ),
        right=lambda r: r.answer == "You are welcome.",
    ),
    passes(
        "tools",
        "a schema that cannot be followed",
        chat(tools=[function("f", {"a": {"type": "nothing"}})], tool_choice="required"),
        right=lambda r: "f" in r.error["message"],
        status=400,
    ),
    # Media
    passes("media", "image as a data: URI", chat([WORD, READ]), right=lambda r: r.answer == "Welcome"),
    passes("media", "image in a stream", chat([WORD, READ], stream=True), right=lambda r: r.answer == "Welcome"),
    passes("media", "image and its usage", chat([WORD, READ]), right=lambda r: r.usage["prompt_tokens"] > 64),
    passes(
        "media",
        "an image by its uuid",
        chat([picture("word.png", uuid="word"), READ]),
        chat([{"type": "image_url", "image_url": None, "uuid": "word"}, READ]),
        right=lambda first, again: first.answer == again.answer == "Welcome",
    ),
    passes(
        "media",
        "an unknown uuid",
        chat([{"type": "image_url", "image_url": None, "uuid": "unsent"}, READ]),
        right=lambda r: r.error["code"] == "media_not_cached",
        status=400,
    ),
    passes(
        "media",
        "data that is not an image",
        chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8gaW1hZ2U="}}, READ]),
        right=lambda r: r.error["type"] == "invalid_request_error",
        status=400,
    ),
    refused(
        "media",
        "audio",
        chat([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
        reason="the model has no audio input or output",
    ),
    refused(
        "media",
        "embeddings of images",
        chat([{"type": "image_embeds", "image_embeds": ""}]),
        reason="send media as URLs or data: URIs",
    ),
    refused("media", "mm_processor_kwargs", chat(mm_processor_kwargs={"num_crops": 4}), reason="set detail, split"),
    # Responses
    passes(
        "responses",
        "an answer",
        responses("Hello"),
        right=lambda r: r.json["output"][0]["content"][0]["text"] == GREETING,
    ),
    passes(
        "responses",
        "a stream of events, to the completed answer",
        ("/v1/responses", {"input": "Hello", "stream": True, "temperature": 0}),
        right=lambda r: "response.completed" in r.text,
    ),
    passes(
        "responses",
        "reasoning, include and truncation",
        responses("Hello", reasoning={"effort": "low"}, include=[], truncation="disabled"),
        right=lambda r: r.json["status"] == "completed",
    ),
    refused(
        "responses",
        "earlier answers by id",
        responses("Hello", previous_response_id="resp_1"),
        reason="nothing is stored between requests",
    ),
    refused(
        "responses",
        "items by id",
        responses([{"type": "item_reference", "id": "msg_1"}]),
        reason="clients do so with store: false",
    ),
    refused(
        "responses",
        "tools run by the server",
        responses("Hello", tools=[{"type": "web_search_preview"}]),
        reason="the server runs no tools",
    ),
    refused(
        "responses",
        "in the background",
        responses("Hello", background=True),
        reason="nothing is stored between requests",
    ),
    # Tokens
    passes(
        "tokens",
        "round trip of a text",
        ("/tokenize", {"prompt": "Hello"}),
        ("/detokenize", {"tokens": [43, 72, 79]}),
        right=lambda there, back: there.json["count"] == len(there.json["tokens"]) and len(back.json["prompt"]) == 3,
    ),
    passes(
        "tokens",
        "counts of a conversation equal its usage",
        ("/tokenize", {"messages": HELLO}),
        chat(),
        right=lambda tokens, answer: tokens.json["count"] == answer.usage["prompt_tokens"],
    ),
    passes(
        "tokens",
        "with tools, and texts of tokens",
        ("/tokenize", {"messages": HELLO, "tools": [PAINT], "return_token_strs": True}),
        right=lambda r: len(r.json["token_strs"]) == r.json["count"] > 100,
    ),
    passes(
        "tokens",
        "tokenizer_info: special tokens, which are one token each, and the chat template",
        ("/tokenizer_info", None),
        ("/tokenize", {"prompt": "<|endoftext|>"}),
        right=lambda info, tokens: (
            info.json["eos_token"] == "<|endoftext|>"
            and tokens.json["count"] == 1
            and "<|im_start|>" in info.json["chat_template"]
        ),
    ),
    # Adapters
    passes(
        "adapters",
        "a folder that does not exist",
        ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/nowhere/adapter"}),
        right=lambda r: "/nowhere/adapter" in r.error["message"],
        status=404,
    ),
    passes(
        "adapters",
        "no path",
        ("/v1/load_lora_adapter", {"lora_name": "new"}),
        right=lambda r: r.error["param"] == "lora_path",
        status=400,
    ),
    passes(
        "adapters",
        "unload an unknown adapter",
        ("/v1/unload_lora_adapter", {"lora_name": "new"}),
        right=lambda r: "new" in r.error["message"],
        status=404,
    ),
)
