"""OpenAI's client for Python: chat completions, completions and responses."""

from typing import Literal

import openai
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

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]


class Paint(BaseModel):
    """Report a colour."""

    colour: Literal["red", "green", "blue"]


def about(picture, question):
    parts = [{"type": "image_url", "image_url": {"url": uri(picture)}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    equal(answer.choices[0].message.content, GREETING)
    equal(answer.choices[0].finish_reason, "stop")
    # Append the answer to the conversation as the client's own object.
    again = [*HELLO, answer.choices[0].message, {"role": "user", "content": THANKS}]
    equal(client.chat.completions.create(model=MODEL, messages=again).choices[0].message.content, WELCOME)
    equal(client.responses.create(model=MODEL, input="Hello").output_text, GREETING)
    equal(client.completions.create(model=MODEL, prompt="Hello", max_tokens=4).choices[0].finish_reason, "length")
    equal([model.id for model in client.models.list()], [MODEL])


def stream():
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as events:
        pieces = [event.delta for event in events if event.type == "content.delta"]
        equal(events.get_final_completion().choices[0].message.content, GREETING)
    equal("".join(pieces), GREETING)
    assert len(pieces) > 3, pieces
    with client.responses.stream(model=MODEL, input="Hello") as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        equal(events.get_final_response().output_text, GREETING)
    equal("".join(pieces), GREETING)


def image():
    answer = client.chat.completions.create(model=MODEL, messages=about(WORD, READ))
    equal(answer.choices[0].message.content, "Welcome")
    parts = [{"type": "input_image", "image_url": uri(WORD)}, {"type": "input_text", "text": READ}]
    equal(client.responses.create(model=MODEL, input=[{"role": "user", "content": parts}]).output_text, "Welcome")


def tools():
    tool = openai.pydantic_function_tool(Paint)
    messages = about(SHAPES, CIRCLE)
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, tools=[tool], tool_choice="required")
    [call] = parsed.choices[0].message.tool_calls
    equal(call.function.parsed_arguments, Paint(colour="red"))
    equal(parsed.choices[0].finish_reason, "tool_calls")
    # Append the client's parsed message and the result of its call.
    messages += [parsed.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Noted."}]
    messages += [{"role": "user", "content": THANKS}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool])
    equal(answer.choices[0].message.content, WELCOME)
    with client.chat.completions.stream(
        model=MODEL, messages=about(SHAPES, CIRCLE), tools=[tool], tool_choice="required"
    ) as events:
        [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    equal(done.parsed_arguments, Paint(colour="red"))


def structured():
    parsed = client.chat.completions.parse(model=MODEL, messages=about(SHAPES, CIRCLE), response_format=Paint)
    equal(parsed.choices[0].message.parsed, Paint(colour="red"))
    again = [*about(SHAPES, CIRCLE), parsed.choices[0].message, {"role": "user", "content": THANKS}]
    equal(client.chat.completions.create(model=MODEL, messages=again).choices[0].message.content, WELCOME)
    equal(type(client.responses.parse(model=MODEL, input=CIRCLE, text_format=Paint).output_parsed), Paint)


def errors():
    missing = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="another", messages=HELLO))
    equal(missing.code, "model_not_found")
    long = [{"role": "user", "content": TOO_LONG}]
    overflow = raises(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=long))
    equal(overflow.code, "context_length_exceeded")
    unauthorized = client.with_options(api_key="wrong")
    raises(openai.AuthenticationError, lambda: unauthorized.chat.completions.create(model=MODEL, messages=HELLO))


def usage():
    whole = client.chat.completions.create(model=MODEL, messages=HELLO).usage
    assert whole.prompt_tokens > 5 and whole.completion_tokens > 5
    equal(whole.total_tokens, whole.prompt_tokens + whole.completion_tokens)
    *_, last = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    equal(last.usage.total_tokens, whole.total_tokens)


report(chat, stream, image, tools, structured, errors, usage)
