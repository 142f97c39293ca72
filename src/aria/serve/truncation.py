"""Dropping the oldest messages of conversations that are too long: ``truncation: "auto"`` of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aria.engine import ContextLengthError
from aria.processor.image_inputs import Prepared

Messages = Sequence[Mapping[str, Any]]

_STAY = ("system", "developer")
"""Roles whose messages are never dropped."""


def prepare_latest(
    messages: Messages, prepare: Callable[[Messages], Prepared], measure: Callable[[Messages], int], room: int
) -> Prepared:
    """Prepare a conversation, dropping as many of its oldest messages as necessary.

    System messages and the last message stay; results of a call are dropped together with the call.

    Args:
        messages: A conversation that does not fit.
        prepare: Raises :class:`ContextLengthError` if messages do not fit.
        measure: Number of tokens of some messages; raises the same error.
        room: Maximum number of prompt tokens.

    Raises:
        ContextLengthError: The messages that must stay do not fit either.
    """
    head = [message for message in messages if message["role"] in _STAY]
    rest = [message for message in messages if message["role"] not in _STAY]
    # A conversation cannot start with the result of a call.
    starts = [i for i, message in enumerate(rest) if message["role"] != "tool"]
    if len(starts) < 2:
        return prepare(messages)
    first, used = len(rest), measure(head) if head else 0
    for i in reversed(range(len(rest))):
        try:
            used += measure([rest[i]])
        except ContextLengthError:
            break
        if used > room:
            break
        first = i
    for start in starts[:-1]:
        if start >= first:
            # The parts may have fewer tokens than the whole.
            with suppress(ContextLengthError):
                return prepare([*head, *rest[start:]])
    return prepare([*head, *rest[starts[-1] :]])
