"""Frames and pages that were read, kept for the next question about the same clip or document."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from aria.media.limits import DECODE_MEMORY
from aria.media.read import Frame, Page

Read = TypeVar("Read", Frame, Page)


class MediaCache:
    """What media were read as, by what they are and how they were read; the least recently used go first.

    A chat sends its clip with every question, and a page asks what it costs before. Any thread may use it.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, tuple[Sequence[Frame | Page], int]] = OrderedDict()
        self._turn = threading.Lock()
        DECODE_MEMORY.on_shortage(self.free)

    def __reduce__(self) -> tuple[type[MediaCache], tuple[()]]:
        """Copies, also those for other processes, begin empty."""
        return MediaCache, ()

    def get(self, key: Hashable, read: Callable[[], Sequence[Read]], capacity: int) -> Sequence[Read]:
        """What is kept under a key, or else what ``read`` gives. Of ``capacity`` bytes no more is kept."""
        with self._turn:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]  # type: ignore[return-value]  # a key holds what its own read gave
        pictures = read()
        nbytes = sum(picture.image.nbytes for picture in pictures)
        for picture in pictures:
            for array in picture.image.arrays:
                array.flags.writeable = False  # others will read it too
        with self._turn:
            if nbytes <= capacity and key not in self._kept:
                self._kept[key] = pictures, nbytes
                self.nbytes += nbytes
            self._shrink(capacity)
        return pictures

    def free(self, nbytes: int) -> None:
        """Keep so much less."""
        with self._turn:
            self._shrink(self.nbytes - nbytes)

    def _shrink(self, capacity: int) -> None:
        while self._kept and self.nbytes > capacity:
            self.nbytes -= self._kept.popitem(last=False)[1][1]
