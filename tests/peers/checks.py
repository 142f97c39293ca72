"""Checks of other servers' interfaces: requests to our server, and the expected replies."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Request = tuple[str, dict[str, Any] | None]
"""A path, and a body to POST; None sends GET."""
HELLO = [{"role": "user", "content": "Hello"}]
GREETING = "Hello! Show me a picture."


@dataclass(frozen=True)
class Reply:
    """A reply of the server."""

    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """Events of a stream without the last, which has to be [DONE]."""
        *lines, last = [line.removeprefix("data: ") for line in self.text.splitlines() if line]
        assert last == "[DONE]", last
        return [json.loads(line) for line in lines]

    @property
    def choices(self) -> list[Any]:
        return self.json["choices"]

    @property
    def answers(self) -> list[str | None]:
        """Texts of all choices."""
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in self.choices]

    @property
    def answer(self) -> str:
        """Text of the first choice, streamed or not."""
        if self.text.startswith("data: "):
            first = [choice for event in self.events for choice in event["choices"] if choice["index"] == 0]
            return "".join((one["text"] if "text" in one else one["delta"].get("content")) or "" for one in first)
        answer = self.answers[0]
        assert answer is not None
        return answer

    @property
    def finish(self) -> str:
        return self.choices[0]["finish_reason"]

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """Function calls of the first choice, with arguments."""
        calls = [call["function"] for call in self.choices[0]["message"]["tool_calls"] or ()]
        return [(call["name"], json.loads(call["arguments"])) for call in calls]

    @property
    def usage(self) -> dict[str, Any]:
        return self.json["usage"]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass(frozen=True)
class Check:
    """A check that another server's own tests make."""

    area: str
    what: str
    requests: tuple[Request, ...]
    right: Callable[..., bool] | None = None
    """Returns whether the replies are right; None if the last request is refused."""
    refused: str = ""
    """Part of the error message that gives the reason."""
    status: int = 200
    """Status of the last reply."""


def passes(area: str, what: str, *requests: Request, right: Callable[..., bool], status: int = 200) -> Check:
    return Check(area, what, requests, right, status=status)


def refused(area: str, what: str, *requests: Request, reason: str, status: int = 400) -> Check:
    return Check(area, what, requests, refused=reason, status=status)


def chat(content: Any = "Hello", **fields: Any) -> Request:
    """Make a chat request, greedy unless fields override it; ``messages`` replaces ``content``."""
    said = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
    return "/v1/chat/completions", said | fields


def completion(prompt: Any = "Hello", **fields: Any) -> Request:
    return "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8} | fields


def responses(said: Any, **fields: Any) -> Request:
    return "/v1/responses", {"input": said, "temperature": 0, "max_output_tokens": 32} | fields


def picture(name: str, **part: Any) -> dict[str, Any]:
    """Make a message part from a file of examples/pictures."""
    data = (Path(__file__).parents[2] / "examples" / "pictures" / name).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}, **part}


def function(name: str, properties: dict[str, Any], **schema: Any) -> dict[str, Any]:
    """Make a tool whose parameters are all required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties), **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}
