"""Cache of decoded frames and pages, for further questions about the same clip or document."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from aria.media.budgets import DECODE_MEMORY
from aria.media.read import Frame, Page

Read = TypeVar("Read", Frame, Page)


class MediaCache:
    """LRU cache of decoded media, keyed by the file and the reading options. Thread-safe.

    A chat sends its clip with every question, and the chat page asks for its token count before.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, tuple[Sequence[Frame | Page], int]] = OrderedDict()
        self._turn = threading.Lock()
        DECODE_MEMORY.on_shortage(self.free)

    def __reduce__(self) -> tuple[type[MediaCache], tuple[()]]:
        """Copies and pickles start empty."""
        return MediaCache, ()

    def get(self, key: Hashable, read: Callable[[], Sequence[Read]], capacity: int) -> Sequence[Read]:
        """Return the entry of a key, calling ``read`` if it is missing. At most ``capacity`` bytes are kept."""
        with self._turn:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]  # type: ignore[return-value]  # the entry has the type of its own read
        items = read()
        nbytes = sum(item.image.nbytes for item in items)
        for item in items:
            for array in item.image.arrays:
                array.flags.writeable = False  # shared with other readers
        with self._turn:
            if nbytes <= capacity and key not in self._kept:
                self._kept[key] = items, nbytes
                self.nbytes += nbytes
            self._shrink(capacity)
        return items

    def free(self, nbytes: int) -> None:
        """Evict at least this many bytes."""
        with self._turn:
            self._shrink(self.nbytes - nbytes)

    def _shrink(self, capacity: int) -> None:
        while self._kept and self.nbytes > capacity:
            self.nbytes -= self._kept.popitem(last=False)[1][1]
