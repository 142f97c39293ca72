"""LRU cache of image tokens, so that the same image is not encoded twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class ImageCache:
    """Image tokens by content key, with eviction of the least recently used.

    Args:
        capacity: Bytes. Larger entries are not cached.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._features

    def get(self, key: Hashable) -> Tensor | None:
        """Return image tokens ``(Q, D)``, or None if they are not cached."""
        features = self._features.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def clear(self) -> None:
        """Empty the cache."""
        self._features.clear()
        self.nbytes = 0

    def put(self, key: Hashable, features_QD: Tensor) -> None:
        """Cache image tokens, evicting the least recently used ones if the capacity is exceeded."""
        if features_QD.nbytes > self.capacity:
            return
        old = self._features.pop(key, None)
        self.nbytes += features_QD.nbytes - (0 if old is None else old.nbytes)
        self._features[key] = features_QD
        while self.nbytes > self.capacity:
            self.nbytes -= self._features.popitem(last=False)[1].nbytes
