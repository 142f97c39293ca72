"""Requests with small bodies that once crashed the server, or blocked it for minutes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from tests.hostile.bad_clips import mp4_announced
from tests.hostile.bad_documents import large_pages
from tests.hostile.bad_drawings import nested_forms
from tests.hostile.bad_images import LARGEST, progressive, tiny_webp
from tests.hostile.bad_schemas import SCHEMAS, chain, chat
from tests.hostile.server import asking


class Killer(NamedTuple):
    """Requests that are sent at the same time."""

    make: Callable[[], list[bytes]]
    seconds: float
    """Seconds within which each must be answered, generous for a busy machine."""
    slow: bool = False
    """Whether a deadline ends it."""
    statuses: tuple[int, ...] = (400,)


def form(schema: object) -> bytes:
    """A schema as the form of an answer."""
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def function(schema: object) -> bytes:
    """A schema as parameters of a function that has to be called."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return chat(tools=[tool], tool_choice="required")


KILLERS = {
    "4,000 references in a chain": Killer(lambda: [form(chain(4000))], 30),
    "the same for a function": Killer(lambda: [function(chain(4000))], 30),
    "60,000 names that are required": Killer(lambda: [form(SCHEMAS["required"]())], 30),
    "89 million samples in 580 bytes": Killer(lambda: [asking("video", mp4_announced(Random(1), 89_000_000))], 30),
    "64 pages of 36 million pixels in 6 KB": Killer(lambda: [asking("document", large_pages(Random(1), 64))], 30),
    "forms that draw each other 10^10 times": Killer(
        lambda: [asking("document", nested_forms(Random(1), 9, 10))], 160, slow=True
    ),
    "3,006 scans of 64 million pixels": Killer(
        lambda: [asking("image", progressive(8000, 3006))],
        60,
        slow=True,
        statuses=(200, 400),  # a fast processor decodes them within the deadline
    ),
    "12 times 3 x 118 million pixels in 40 bytes": Killer(
        lambda: [asking("image", tiny_webp(LARGEST, LARGEST - n), times=3) for n in range(12)],
        160,
        slow=True,
        statuses=(200, 400, 503),  # within all limits one at a time; memory is short for twelve
    ),
}
