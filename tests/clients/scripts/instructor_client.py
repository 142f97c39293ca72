"""instructor on top of OpenAI's client."""

from typing import Literal

import instructor
import openai
from check import BASE_URL, CIRCLE, KEY, MODEL, SHAPES, TOO_LONG, equal, raises, report, uri
from instructor import Mode
from instructor.core import InstructorRetryException
from pydantic import BaseModel

raw = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
client = instructor.from_openai(raw)


COLOURS = ("red", "green", "blue")


class Paint(BaseModel):
    """A colour."""

    colour: Literal[COLOURS]


def about(picture, question):
    return [{"role": "user", "content": [instructor.Image.from_base64(uri(picture)), question]}]


def chat():
    question = [{"role": "user", "content": "Which colour do you like?"}]
    assert client.create(model=MODEL, messages=question, response_model=Paint).colour in COLOURS


def stream():
    *_, last = client.create_partial(model=MODEL, messages=about(SHAPES, CIRCLE), response_model=Paint)
    assert last.colour in COLOURS  # partial models allow null, so the schema differs


def image():
    equal(client.create(model=MODEL, messages=about(SHAPES, CIRCLE), response_model=Paint).colour, "red")


def tools():
    for mode in (Mode.TOOLS, Mode.TOOLS_STRICT):
        asked = instructor.from_openai(raw, mode=mode)
        equal(asked.create(model=MODEL, messages=about(SHAPES, CIRCLE), response_model=Paint).colour, "red")


def structured():
    # Mode.JSON sends no schema that could constrain nano.
    asked = instructor.from_openai(raw, mode=Mode.JSON_SCHEMA)
    equal(asked.create(model=MODEL, messages=about(SHAPES, CIRCLE), response_model=Paint).colour, "red")


def errors():
    long = [{"role": "user", "content": TOO_LONG}]
    error = raises(
        InstructorRetryException,
        lambda: client.create(model=MODEL, messages=long, response_model=Paint, max_retries=1),
    )
    assert "context_length_exceeded" in str(error), error


def usage():
    _, completion = client.create_with_completion(model=MODEL, messages=about(SHAPES, CIRCLE), response_model=Paint)
    assert completion.usage.prompt_tokens > 64 and completion.usage.completion_tokens > 5


report(chat, stream, image, tools, structured, errors, usage)
