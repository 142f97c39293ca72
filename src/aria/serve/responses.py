"""Responses of ``/v1/responses``, complete and streamed: a list of items, which are messages and calls."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from aria.engine import Piece
from aria.serve.choice_parser import ChoiceParser, logprob_object
from aria.serve.response_models import ResponseObject
from aria.serve.responses_protocol import ResponsesRequest
from aria.serve.service import Run
from aria.serve.streaming import event
from aria.serve.tool_calls import Call

Event = dict[str, Any]


async def complete(run: Run, body: ResponsesRequest) -> ResponseObject:
    """The response, once it is finished."""
    output = _Output(run)
    async with aclosing(run.read()) as pieces:
        async for _, piece in pieces:
            for _ in output.push(piece):
                pass
            if output.finish_reason is not None:
                break
    return _response(run, body, output)


async def stream(run: Run, body: ResponsesRequest) -> AsyncGenerator[bytes, None]:
    """The response as numbered events, named as in OpenAI's interface."""
    output = _Output(run)
    number = 0

    def numbered(kind: str, fields: Event) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

    async with aclosing(run.read()) as pieces:
        for kind in ("response.created", "response.in_progress"):
            yield numbered(kind, {"response": _response(run, body, output).model_dump(mode="json")})
        async for _, piece in pieces:
            for kind, fields in output.push(piece):
                yield numbered(kind, fields)
            if output.finish_reason is not None:
                break
    last = _response(run, body, output)
    yield numbered(f"response.{last.status}", {"response": last.model_dump(mode="json")})


class _Output:
    """Items of a response, and the events of their progress."""

    def __init__(self, run: Run):
        self._run = run
        self._turn = ChoiceParser(run.request, run.tokenizer)
        self.items: list[Event] = []
        self.finish_reason: str | None = None

    def push(self, piece: Piece) -> Iterator[tuple[str, Event]]:
        """Add the next token; yields names of events and their fields."""
        delta = self._turn.push(piece)
        logprobs = [logprob_object(one, self._run.tokenizer) for one in delta.logprobs]
        for part in delta.parts:
            if isinstance(part, Call):
                yield from self._close()
                yield from self._call(part)
            else:
                yield from self._text(part, logprobs)
                logprobs = []
        if logprobs:
            yield from self._text("", logprobs)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            if not self.items:
                yield from self._text("", [])
            yield from self._close()

    def _place(self, **more: Any) -> Event:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}

    def _text(self, text: str, logprobs: list[Event]) -> Iterator[tuple[str, Event]]:
        if not self.items or self.items[-1]["status"] != "in_progress":
            self.items.append(
                {
                    "type": "message",
                    "id": f"msg_{uuid.uuid4().hex}",
                    "status": "in_progress",
                    "role": "assistant",
                    "content": [],
                }
            )
            yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(self.items[-1])}
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield "response.content_part.added", self._place(content_index=0, part=empty)
            self.items[-1]["content"] = [{**empty, "logprobs": []}]
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield "response.output_text.delta", self._place(content_index=0, delta=text, logprobs=logprobs)

    def _close(self) -> Iterator[tuple[str, Event]]:
        """Complete the last item, if it is an unfinished message."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return
        item = self.items[-1]
        part = item["content"][0]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield "response.output_text.done", self._place(content_index=0, **text)
        yield "response.content_part.done", self._place(content_index=0, part=part)
        item["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _call(self, call: Call) -> Iterator[tuple[str, Event]]:
        item: Event = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.id, "name": call.name}
        self.items.append({**item, "arguments": call.arguments, "status": "completed"})
        index = len(self.items) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", self._place(delta=call.arguments)
        yield "response.function_call_arguments.done", self._place(name=call.name, arguments=call.arguments)
        yield "response.output_item.done", {"output_index": index, "item": self.items[-1]}


def _response(run: Run, body: ResponsesRequest, output: _Output) -> ResponseObject:
    """The response object, with the settings of the request."""
    params = run.request.params
    status = {None: "in_progress", "length": "incomplete"}.get(output.finish_reason, "completed")
    usage = run.usage()
    given = body.model_dump(mode="json", by_alias=True, include={"text", "tools", "tool_choice"}, exclude_none=True)
    return ResponseObject.model_validate(
        {
            "id": run.id,
            "created_at": run.created,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": run.model,
            "output": list(output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": params.logprobs or 0,
            "text": given.get("text", {"format": {"type": "text"}}),
            "tools": given.get("tools", []),
            "tool_choice": given.get("tool_choice", "auto"),
            "truncation": body.truncation,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": body.reasoning.summary if body.reasoning else None,
            },
            "metadata": body.metadata or {},
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }
    )
