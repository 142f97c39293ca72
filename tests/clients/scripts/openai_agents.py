"""OpenAI's agents, over chat completions and over responses."""

import asyncio
from typing import Literal

import agents
import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner
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

agents.set_tracing_disabled(True)  # traces would go to OpenAI


class Paint(BaseModel):
    """A colour."""

    colour: Literal["red", "green", "blue"]


@agents.function_tool
def paint(colour: Literal["red", "green", "blue"]) -> str:
    """Report a colour."""
    return f"{colour}!"


def about(picture, question):
    parts = [{"type": "input_image", "image_url": uri(picture), "detail": "auto"}]
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": question}]}]


def team(**options):
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
        yield Agent(name="Nano", model=kind(MODEL, client), **options)


def chat():
    for agent in team():
        result = Runner.run_sync(agent, "Hello")
        equal(result.final_output, GREETING)
        again = [*result.to_input_list(), {"role": "user", "content": THANKS}]
        equal(Runner.run_sync(agent, again).final_output, WELCOME)


def stream():
    async def read(agent):
        result = Runner.run_streamed(agent, "Hello")
        kinds = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
        return result.final_output, kinds

    for agent in team():
        output, kinds = asyncio.run(read(agent))
        equal(output, GREETING)
        assert kinds.count("response.output_text.delta") > 3, kinds


def image():
    for agent in team():
        equal(Runner.run_sync(agent, about(WORD, READ)).final_output, "Welcome")


def tools():
    required = {"model_settings": ModelSettings(tool_choice="required"), "tool_use_behavior": "stop_on_first_tool"}
    for agent in team(tools=[paint], **required):
        result = Runner.run_sync(agent, about(SHAPES, CIRCLE))
        equal(result.final_output, "red!")
        again = [*result.to_input_list(), {"role": "user", "content": THANKS}]
        equal(Runner.run_sync(agent.clone(model_settings=ModelSettings()), again).final_output, WELCOME)


def structured():
    for agent in team(output_type=Paint):
        equal(Runner.run_sync(agent, about(SHAPES, CIRCLE)).final_output, Paint(colour="red"))


def errors():
    for agent in team():
        error = raises(openai.BadRequestError, lambda agent=agent: Runner.run_sync(agent, TOO_LONG))
        equal(error.code, "context_length_exceeded")


def usage():
    for agent in team():
        counted = Runner.run_sync(agent, "Hello").context_wrapper.usage
        assert counted.input_tokens > 5 and counted.output_tokens > 5, counted


report(chat, stream, image, tools, structured, errors, usage)
