"""pydantic-ai's agents, over chat completions and over responses."""

import asyncio
from typing import Literal

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
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
models = [OpenAIChatModel(MODEL, provider=provider), OpenAIResponsesModel(MODEL, provider=provider)]
SETTINGS = {"openai_store": False}


class Paint(BaseModel):
    """A colour."""

    colour: Literal["red", "green", "blue"]


def about(picture, question):
    return [BinaryContent(picture.read_bytes(), media_type="image/png"), question]


def agents(**options):
    return [Agent(model, model_settings=SETTINGS, **options) for model in models]


def chat():
    for agent in agents(instructions=None):
        first = agent.run_sync("Hello")
        equal(first.output, GREETING)
        equal(agent.run_sync(THANKS, message_history=first.all_messages()).output, WELCOME)


def stream():
    async def read(agent):
        async with agent.run_stream("Hello") as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    for agent in agents():
        pieces = asyncio.run(read(agent))
        equal("".join(pieces), GREETING)


def image():
    for agent in agents():
        equal(agent.run_sync(about(WORD, READ)).output, "Welcome")


def tools():
    for agent in agents(output_type=ToolOutput(Paint)):
        result = agent.run_sync(about(SHAPES, CIRCLE))
        equal(result.output, Paint(colour="red"))
        # Send back the call and its result.
        equal(type(agent.run_sync(CIRCLE, message_history=result.all_messages()).output), Paint)
    for agent in agents():

        @agent.tool_plain
        def paint(colour: Literal["red", "green", "blue"]) -> str:
            """Report a colour."""
            return colour

        equal(agent.run_sync(THANKS).output, WELCOME)


def structured():
    for agent in agents(output_type=NativeOutput(Paint)):
        equal(agent.run_sync(about(SHAPES, CIRCLE)).output, Paint(colour="red"))


def errors():
    for agent in agents(retries=0):
        error = raises(ModelHTTPError, lambda agent=agent: agent.run_sync(TOO_LONG))
        equal((error.status_code, error.body["code"]), (400, "context_length_exceeded"))


def usage():
    for agent in agents():
        result = agent.run_sync("Hello")
        counted = result.usage() if callable(result.usage) else result.usage
        assert counted.input_tokens > 5 and counted.output_tokens > 5, counted


report(chat, stream, image, tools, structured, errors, usage)
