"""`NamedMedia`: images and videos that clients name by uuid, kept so that later requests can reference them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aria.media.open import open_media
from aria.processor import MediaSettings
from aria.serve.errors import ApiError

_FORGOTTEN = "media_not_cached"


class NamedMedia:
    """LRU cache of media by client, kind and uuid. Thread-safe.

    Clients cannot reference each other's media.

    Args:
        capacity: Maximum size of all media in bytes, before decoding and without base64.
    """

    def __init__(self, capacity: int):
        self.nbytes = 0
        self._capacity = capacity
        self._kept: OrderedDict[tuple[bytes, str, str], bytes | Path] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(
        self, client: bytes, messages: Sequence[Mapping[str, Any]], settings: MediaSettings
    ) -> list[Mapping[str, Any]]:
        """Replace media that have a ``uuid`` by their content; those that come with a URL are opened and kept.

        Raises:
            ApiError: 400, no medium is kept under a uuid.
            ValueError, OSError: A medium cannot be read, see :func:`aria.media.open.open_media`.
        """
        return [self._message(client, message, settings) for message in messages]

    def _message(self, client: bytes, message: Mapping[str, Any], settings: MediaSettings) -> Mapping[str, Any]:
        content = message["content"]
        if isinstance(content, str) or not any("uuid" in part for part in content):
            return message
        return {**message, "content": [self._part(client, part, settings) for part in content]}

    def _part(self, client: bytes, part: Mapping[str, Any], settings: MediaSettings) -> Mapping[str, Any]:
        if "uuid" not in part:
            return part
        kind, key = part["type"], (client, part["type"], part["uuid"])
        if "url" in part:
            medium = open_media(part["url"], kind, settings).data
            self._keep(key, medium)
        else:
            medium = self._find(key)
        rest = {name: value for name, value in part.items() if name not in ("uuid", "url")}
        return {**rest, "path" if isinstance(medium, Path) else kind: medium}

    def _find(self, key: tuple[bytes, str, str]) -> bytes | Path:
        with self._lock:
            if key not in self._kept:
                message = f"no {key[1]} is kept under the uuid {key[2]!r:.80}; send it with its url"
                raise ApiError(400, message, param="messages", code=_FORGOTTEN)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _keep(self, key: tuple[bytes, str, str], medium: bytes | Path) -> None:
        with self._lock:
            self.nbytes -= _size(key, self._kept.pop(key, None))
            self._kept[key] = medium
            self.nbytes += _size(key, medium)
            while self.nbytes > self._capacity:
                self.nbytes -= _size(*self._kept.popitem(last=False))


def _size(key: tuple[bytes, str, str], medium: bytes | Path | None) -> int:
    """Size of an entry in bytes, key included; files of the server are not held in memory."""
    if medium is None:
        return 0
    return 512 + len(key[2]) + (len(medium) if isinstance(medium, bytes) else 0)
