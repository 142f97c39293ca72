"""Bodies of requests as clients send them."""

from __future__ import annotations

from typing import Any

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
_PARTS = [
    {"type": "text", "text": "hello"},
    {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}, "uuid": "u"},
    {"type": "video_url", "video_url": {"url": "data:,x", "fps": 1.5, "max_frames": 3}},
    {"type": "file", "file": {"file_data": "JVBERi0=", "pages": "1-2"}},
]
_ALLOWED = {"mode": "auto", "tools": [{"function": {"name": "f"}}]}
_INPUT = [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": "data:,x"}]
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": _PARTS}],
            "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "logit_bias": {"5": 1}, "logprobs": True,
            "top_logprobs": 2, "tools": [_TOOL], "stream": True, "stream_options": {"include_usage": True},
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
            "tools": [_TOOL],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": _ALLOWED},
        },
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "chat_template_kwargs": {"continue_final_message": True}, "n": 2, "seed": 3,
        },
        {"messages": [{"role": "user", "content": "q"}], "structured_outputs": {"choice": ["a", "b"]}, "top_k": -1},
    ],
    "/v1/completions": [
        {"prompt": ["hello", "you"], "max_tokens": 2, "n": 2, "logprobs": 1, "echo": True},
        {"prompt": [[1, 2], [3]], "structured_outputs": {"regex": "a+"}},
        {"prompt": "x", "stream": True, "prompt_logprobs": None, "min_tokens": 1},
    ],
    "/v1/responses": [
        {
            "input": [
                {"role": "user", "content": _INPUT},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"},
            ],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "truncation": "auto",
        },
        {"input": "hello", "instructions": "i", "max_output_tokens": 3, "reasoning": {"effort": "low"}},
    ],
    "/tokenize": [{"messages": [{"role": "user", "content": _PARTS[:2]}], "tools": [_TOOL]}, {"prompt": "x"}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
    "/v1/load_lora_adapter": [{"lora_name": "a", "lora_path": "/x"}],
}  # fmt: skip
WORDS = (
    *("messages", "content", "role", "type", "text", "image_url", "url", "tools", "function", "name", "parameters"),
    *(
        "tool_calls",
        "arguments",
        "response_format",
        "json_schema",
        "schema",
        "structured_outputs",
        "stop",
        "n",
        "input",
    ),
    *(
        "user",
        "assistant",
        "system",
        "tool",
        "developer",
        "data:,x",
        "http://a/",
        "<|img|>",
        "<|im_start|>",
        "max_token",
    ),
    *(
        "model",
        "stream",
        "logprobs",
        "continue_final_message",
        "chat_template_kwargs",
        "required",
        "auto",
        "$ref",
        "null",
    ),
)
