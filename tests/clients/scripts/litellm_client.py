"""LiteLLM in a program."""

import os
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # do not fetch anything

import litellm
from check import (
    BASE_URL,
    CIRCLE,
    GREETING,
    KEY,
    MODEL,
    READ,
    SHAPES,
    THANKS,
    TOO_LONG,
    WELCOME,
    WORD,
    equal,
    raises,
    report,
    uri,
)
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "Hello"}]


class Paint(BaseModel):
    """A colour."""

    colour: Literal["red", "green", "blue"]


SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"]}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Report a colour.", "parameters": SCHEMA}}


def ask(messages=HELLO, model=MODEL, provider="openai", **fields):
    settings = {"api_base": BASE_URL, "api_key": KEY, "max_retries": 0}
    return litellm.completion(model=f"{provider}/{model}", messages=messages, **settings | fields)


def about(picture, question):
    parts = [{"type": "image_url", "image_url": {"url": uri(picture)}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def chat():
    for provider in ("openai", "hosted_vllm", "litellm_proxy"):
        message = ask(provider=provider).choices[0].message
        equal(message.content, GREETING)
        again = [*HELLO, message, {"role": "user", "content": THANKS}]
        equal(ask(again, provider=provider).choices[0].message.content, WELCOME)
    responses = litellm.responses(model=f"openai/{MODEL}", input="Hello", api_base=BASE_URL, api_key=KEY)
    equal(responses.output[0].content[0].text, GREETING)
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="Hello", max_tokens=4, api_base=BASE_URL, api_key=KEY
    )
    equal(text.choices[0].finish_reason, "length")


def stream():
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
    equal("".join(pieces), GREETING)


def image():
    equal(ask(about(WORD, READ)).choices[0].message.content, "Welcome")


def tools():
    answer = ask(about(SHAPES, CIRCLE), tools=[PAINT], tool_choice="required").choices[0]
    [call] = answer.message.tool_calls
    equal(Paint.model_validate_json(call.function.arguments), Paint(colour="red"))
    equal(answer.finish_reason, "tool_calls")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Noted."}
    again = [*about(SHAPES, CIRCLE), answer.message, result, {"role": "user", "content": THANKS}]
    equal(ask(again, tools=[PAINT]).choices[0].message.content, WELCOME)


def structured():
    answer = ask(about(SHAPES, CIRCLE), response_format=Paint)
    equal(Paint.model_validate_json(answer.choices[0].message.content), Paint(colour="red"))


def errors():
    raises(litellm.NotFoundError, lambda: ask(model="another"))
    raises(litellm.AuthenticationError, lambda: ask(api_key="wrong"))
    raises(litellm.ContextWindowExceededError, lambda: ask([{"role": "user", "content": TOO_LONG}]))


def usage():
    whole = ask().usage
    assert whole.prompt_tokens > 5 and whole.completion_tokens > 5
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    equal(last.usage.total_tokens, whole.total_tokens)


report(chat, stream, image, tools, structured, errors, usage)
