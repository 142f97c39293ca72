"""OpenAI's batch format: a file of requests -> a file of responses, for ``aria batch``."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aria.engine import AsyncEngine
from aria.grammars.limits import check_json
from aria.serve.endpoints import ENDPOINTS, answer
from aria.serve.errors import unexpected
from aria.serve.service import Service
from aria.serve.settings import ServerSettings

_log = logging.getLogger(__name__)

MAX_REPORTED = 10
"""Maximum number of errors about an input file that are reported."""
MAX_LINE_BYTES = ServerSettings.max_body
"""Maximum size of a line."""
_KEYS = ("custom_id", "method", "url", "body")
_HEAVY = ("video_url", "file", "input_file")
"""Types of content parts that hold many images each."""
_ID = re.compile(r"batch_req_([0-9a-f]{24})([0-9a-f]{16})", re.ASCII)
"""The ``id`` of a response: digests of the request and of the weights. Ids of earlier versions are shorter and carry no
digests."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request of the input file, whose body is read only when it is answered."""

    custom_id: str
    start: int
    """Offset of its first byte in the file."""
    heavy: bool
    """Whether it contains videos or documents."""
    digest: str
    """Digest of the request, independent of JSON formatting."""
    model: str | None
    """The model that it names."""


def find_lines(path: str | os.PathLike[str]) -> list[Line]:
    """List the requests of an input file; bodies are validated only when they are answered. Empty lines are skipped.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Invalid lines or repeated ``custom_id``s; the message has the numbers of the first such lines.
    """
    lines: dict[str, Line] = {}
    numbers: dict[str, int] = {}
    faults: list[str] = []
    start = 0
    with Path(path).open("rb") as file:
        for number, (content, size) in enumerate(_lines(file), 1):
            try:
                if size > MAX_LINE_BYTES:
                    raise ValueError(f"it has {size:,} bytes; at most {MAX_LINE_BYTES:,} are read")
                if content.strip():
                    request = _read(content)
                    custom_id = request["custom_id"]
                    if custom_id in lines:
                        raise ValueError(f"the custom_id {custom_id!r:.80} is line {numbers[custom_id]}'s already")
                    model = request["body"].get("model")
                    lines[custom_id] = Line(
                        custom_id,
                        start,
                        _is_heavy(request["body"]),
                        _digest(custom_id, request["url"], request["body"])[:24],
                        model if isinstance(model, str) else None,
                    )
                    numbers[custom_id] = number
            except ValueError as error:
                faults.append(f"line {number}: {error}")
            start += size
    if faults:
        more = f"; and {len(faults) - MAX_REPORTED} more" if len(faults) > MAX_REPORTED else ""
        raise ValueError(f"{path} is not a batch that can be run; {'; '.join(faults[:MAX_REPORTED])}{more}")
    return list(lines.values())


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines and their sizes; lines that are too long are truncated."""
    while content := file.readline(MAX_LINE_BYTES + 1):
        size, end = len(content), content[-1:]
        while size > MAX_LINE_BYTES and end != b"\n" and (rest := file.readline(1 << 20)):
            size, end = size + len(rest), rest[-1:]
        yield content, size


def _read(content: bytes) -> dict[str, Any]:
    try:
        request = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    check_json(request, math.inf)
    if not isinstance(request, dict):
        raise ValueError(f"expected an object with {', '.join(_KEYS)}")
    if missing := [key for key in _KEYS if key not in request]:
        raise ValueError(f"{' and '.join(missing)} missing")
    if unknown := sorted(request.keys() - set(_KEYS)):
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    if not isinstance(request["custom_id"], str) or not request["custom_id"]:
        raise ValueError(f"custom_id is {request['custom_id']!r:.80}; expected a non-empty string")
    if request["method"] != "POST":
        raise ValueError(f"method is {request['method']!r:.80}; expected 'POST'")
    if request["url"] not in ENDPOINTS:
        raise ValueError(f"url is {request['url']!r:.80}; expected one of {', '.join(ENDPOINTS)}")
    if not isinstance(request["body"], dict):
        raise ValueError(f"body is {request['body']!r:.80}; expected an object")
    return request


def _is_heavy(body: Mapping[str, Any]) -> bool:
    return any(isinstance(part, dict) and part.get("type") in _HEAVY for part in _parts(body))


def _parts(body: Mapping[str, Any]) -> Iterator[Any]:
    """Content parts of an unvalidated body."""
    for key in ("messages", "input"):
        messages = body.get(key)
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            yield from content if isinstance(content, list) else ()


class BatchFile:
    """Answers the lines of an input file as the server would.

    Args:
        path: The input file.
        settings: Settings of the server; only limits on single requests apply.
        base: Path or repository of the model, to detect outputs of other models.
        adapters: The same for adapters, by name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: ServerSettings,
        *,
        base: str = "",
        adapters: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._settings = settings
        self._base, self._adapters = base, dict(adapters or {})
        self._service: Service | None = None

    def name(self, line: Line) -> str:
        """The ``custom_id``."""
        return line.custom_id

    def heavy(self, line: Line) -> bool:
        """Whether it contains videos or documents."""
        return line.heavy

    async def do(self, engine: AsyncEngine, line: Line) -> dict[str, Any]:
        """The response to a line, which may be an error of the request.

        Raises:
            OSError: The input file has changed.
            Exception: The engine failed.
        """
        if self._service is None:
            self._service = Service(engine, self._settings)
        request = await asyncio.to_thread(self._request, line)  # it may contain large media
        return self._record(line, *await answer(self._service, request["url"], request["body"]))

    def close(self) -> None:
        """Shut down the threads that read media."""
        if self._service is not None:
            self._service.close()

    def give_up(self, line: Line, error: Exception) -> dict[str, Any]:
        """The response to a line on which the engine failed."""
        record = self._record(line, 500, {})
        request_id = record["response"]["request_id"]
        record["response"]["body"] = unexpected(request_id).body()
        _log.error("%s (%s) failed", line.custom_id, request_id, exc_info=error)
        return record

    def recognize(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """``custom_id`` of a response, and whether it failed.

        Raises:
            ValueError: Not a line of a batch's output.
        """
        custom_id, response = record.get("custom_id"), record.get("response")
        if not isinstance(custom_id, str) or not isinstance(response, dict) or "error" not in record:
            raise ValueError(f"the output holds {str(record)[:80]}, not a response of a batch; name another file")
        return custom_id, record["error"] is not None or response.get("status_code") != 200

    def changed(self, line: Line, record: Mapping[str, Any]) -> str | None:
        """What has changed since a line was answered: the request, the model, or nothing (None)."""
        found = _ID.fullmatch(str(record.get("id")))
        if found is None:
            return None
        if found[1] != line.digest:
            return "the request"
        return "the model" if found[2] != self._weights(line) else None

    def _weights(self, line: Line) -> str:
        return _digest(self._base, self._adapters.get(line.model or ""))[:16]

    def _record(self, line: Line, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
        name = f"batch_req_{line.digest}{self._weights(line)}"
        return {"id": name, "custom_id": line.custom_id, "response": response, "error": None}

    def _request(self, line: Line) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(line.start)
            content = file.readline(MAX_LINE_BYTES)
        with contextlib.suppress(ValueError):
            request = _read(content)
            if _digest(request["custom_id"], request["url"], request["body"])[:24] == line.digest:
                return request
        raise OSError(f"{self.path} changed while it was being answered; rerun the command")


def _digest(*values: Any) -> str:
    """Digest of JSON values, independent of whitespace and the order of keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
