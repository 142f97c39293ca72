"""Conversations that are too long, without their oldest messages: ``truncation: "auto"`` of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aria.engine import ContextLengthError
from aria.processor.image_inputs import Prepared

Messages = Sequence[Mapping[str, Any]]

_STAY = ("system", "developer")
"""Roles of messages that are never dropped."""


def prepare_latest(
    messages: Messages, prepare: Callable[[Messages], Prepared], measure: Callable[[Messages], int], room: int
) -> Prepared:
    """Prepare a conversation without as many of its oldest messages as it takes to fit.

    System messages stay, and so does the last message; results of a call are dropped together with the call.

    Args:
        messages: a conversation that does not fit as a whole.
        prepare: raises a :class:`ContextLengthError` where messages do not fit.
        measure: tokens of some messages, or the same error.
        room: tokens that the prompt should have at most.

    Raises:
        ContextLengthError: what has to stay does not fit either.
    """
    head = [message for message in messages if message["role"] in _STAY]
    rest = [message for message in messages if message["role"] not in _STAY]
    # A conversation does not begin with the result of a call.
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
            # Tokens of the parts may be fewer than those of the whole.
            with suppress(ContextLengthError):
                return prepare([*head, *rest[start:]])
    return prepare([*head, *rest[starts[-1] :]])
