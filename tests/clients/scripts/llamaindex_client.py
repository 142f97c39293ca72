"""LlamaIndex's OpenAILike."""

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
)
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

settings = {"model": MODEL, "api_base": BASE_URL, "api_key": KEY, "max_retries": 0, "context_window": 4096}
model = OpenAILike(**settings, is_chat_model=True, is_function_calling_model=True)
HELLO = [ChatMessage(role="user", content="Hello")]


class Paint(BaseModel):
    """A colour."""

    colour: Literal["red", "green", "blue"]


def paint(colour: Literal["red", "green", "blue"]) -> str:
    """Report a colour."""
    return colour


def about(picture, question):
    return ChatMessage(role="user", blocks=[ImageBlock(path=picture), TextBlock(text=question)])


def chat():
    answer = model.chat(HELLO)
    equal(answer.message.content, GREETING)
    equal(model.chat([*HELLO, answer.message, ChatMessage(role="user", content=THANKS)]).message.content, WELCOME)
    plain = OpenAILike(**settings, is_chat_model=False, max_tokens=4)
    assert plain.complete("Hello").text


def stream():
    pieces = [chunk.delta for chunk in model.stream_chat(HELLO)]
    equal("".join(pieces), GREETING)


def image():
    equal(model.chat([about(WORD, READ)]).message.content, "Welcome")


def tools():
    tool = FunctionTool.from_defaults(paint)
    answer = model.chat_with_tools([tool], chat_history=[about(SHAPES, CIRCLE)], tool_required=True)
    [call] = model.get_tool_calls_from_response(answer)
    equal(call.tool_name, "paint")
    Paint.model_validate(call.tool_kwargs)  # the colour depends on the function's description
    result = ChatMessage(role="tool", content="Noted.", additional_kwargs={"tool_call_id": call.tool_id})
    again = [about(SHAPES, CIRCLE), answer.message, result, ChatMessage(role="user", content=THANKS)]
    equal(model.chat_with_tools([tool], chat_history=again).message.content, WELCOME)


def structured():
    prompt = ChatPromptTemplate(message_templates=[about(SHAPES, CIRCLE)])
    equal(model.structured_predict(Paint, prompt), Paint(colour="red"))
    native = OpenAILike(**settings, is_chat_model=True, should_use_structured_outputs=True)
    equal(native.structured_predict(Paint, prompt), Paint(colour="red"))


def errors():
    long = [ChatMessage(role="user", content=TOO_LONG)]
    equal(raises(openai.BadRequestError, lambda: model.chat(long)).code, "context_length_exceeded")


def usage():
    counted = model.chat(HELLO).raw.usage
    assert counted.prompt_tokens > 5 and counted.completion_tokens > 5, counted


report(chat, stream, image, tools, structured, errors, usage)
