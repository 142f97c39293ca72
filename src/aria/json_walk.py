"""Walk parsed JSON without recursion, so that deeply nested input cannot exhaust the stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CONTAINERS = (dict, list, tuple)


def iter_containers(value: Any) -> Iterator[tuple[Any, Any, int]]:
    """Iterate over the objects and lists of parsed JSON, without recursion.

    Yields:
        The dict, list or tuple; its trail of keys, as nested pairs ``((None, "a"), 0)``; and its depth, from 1. Callers
        should stop at a depth, because values made in Python may contain themselves.
    """
    waiting: list[tuple[Any, Any, int]] = [(value, None, 1)] if isinstance(value, _CONTAINERS) else []
    while waiting:
        node, trail, depth = waiting.pop()
        yield node, trail, depth
        members = node.items() if isinstance(node, dict) else enumerate(node)
        waiting += [(one, (trail, key), depth + 1) for key, one in members if isinstance(one, _CONTAINERS)]


def trail_keys(trail: Any) -> list[Any]:
    """The keys of a trail from :func:`iter_containers`, outermost first."""
    keys = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    return keys[::-1]
