"""Calls of functions as the model writes them, in answers that it learns from and in those that it gives.

Aria has no format of its own for them. This one is widespread among open models: a call is
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the model is told of the functions.

    Args:
        tools: ``name``, and ``description`` and ``parameters`` (JSON Schema) where they are known.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call functions. These are known, one a line:\n{listed}\n"
        f'To call one, write {OPEN}{{"name": "the function", "arguments": {{...}}}}{CLOSE} and end your answer; '
        "several calls may follow each other. Results come in messages of the role tool."
    )


def written(name: str, arguments: str) -> str:
    """A call as it stands in the conversation.

    Raises:
        ValueError: the arguments are not JSON.
    """
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        raise ValueError(f"the arguments of {name!r} should be JSON in a string, but are {arguments!r:.80}") from None
    return f"{OPEN}{json.dumps({'name': name, 'arguments': parsed}, ensure_ascii=False)}{CLOSE}"
