"""LangChain's ChatOpenAI."""

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
    base64_of,
    equal,
    raises,
    report,
    uri,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

settings = {"model": MODEL, "base_url": BASE_URL, "api_key": KEY, "max_retries": 0}
model = ChatOpenAI(**settings)
responses = ChatOpenAI(**settings, use_responses_api=True)


class Paint(BaseModel):
    """A colour."""

    colour: Literal["red", "green", "blue"]


@tool
def paint(colour: Literal["red", "green", "blue"]) -> str:
    """Report a colour."""
    return f"{colour} it is"


def about(picture, question):
    block = {"type": "image", "base64": base64_of(picture), "mime_type": "image/png"}
    return HumanMessage([block, {"type": "text", "text": question}])


def chat():
    answer = model.invoke("Hello")
    equal(answer.content, GREETING)
    equal(model.invoke(["Hello", answer, ("user", THANKS)]).content, WELCOME)
    equal(responses.invoke("Hello").text, GREETING)
    equal([one.content for one in model.batch(["Hello", THANKS])], [GREETING, WELCOME])


def stream():
    pieces = [chunk.text for chunk in model.stream("Hello")]
    equal("".join(pieces), GREETING)
    assert len(pieces) > 3, pieces
    equal("".join(chunk.text for chunk in responses.stream("Hello")), GREETING)


def image():
    equal(model.invoke([about(WORD, READ)]).content, "Welcome")
    equal(responses.invoke([about(WORD, READ)]).text, "Welcome")
    block = {"type": "image_url", "image_url": {"url": uri(WORD)}}
    equal(model.invoke([HumanMessage([block, {"type": "text", "text": READ}])]).content, "Welcome")


def tools():
    question = about(SHAPES, CIRCLE)
    for choice in ("required", "paint"):
        answer = model.bind_tools([paint], tool_choice=choice).invoke([question])
        [call] = answer.tool_calls
        equal((call["name"], call["args"]), ("paint", {"colour": "red"}))
    result = paint.invoke(call)
    equal(type(result), ToolMessage)
    offering = model.bind_tools([paint])
    equal(offering.invoke([question, answer, result, ("user", THANKS)]).content, WELCOME)
    chunks = list(model.bind_tools([paint], tool_choice="required").stream([question]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    equal([call["args"] for call in whole.tool_calls], [{"colour": "red"}])


def structured():
    for method in ("json_schema", "function_calling"):
        equal(model.with_structured_output(Paint, method=method).invoke([about(SHAPES, CIRCLE)]), Paint(colour="red"))
    equal(responses.with_structured_output(Paint).invoke([about(SHAPES, CIRCLE)]), Paint(colour="red"))


def errors():
    raises(openai.NotFoundError, lambda: ChatOpenAI(**settings | {"model": "another"}).invoke("Hello"))
    overflow = raises(openai.BadRequestError, lambda: model.invoke(TOO_LONG))
    equal(type(overflow).__name__, "OpenAIContextOverflowError")  # recognised by the code


def usage():
    counted = model.invoke("Hello").usage_metadata
    assert counted["input_tokens"] > 5 and counted["output_tokens"] > 5
    totals = [chunk.usage_metadata for chunk in model.stream("Hello", stream_usage=True) if chunk.usage_metadata]
    equal([one["total_tokens"] for one in totals], [counted["total_tokens"]])


report(chat, stream, image, tools, structured, errors, usage)
