"""Pictures -> picture tokens: encoded in portions that fit, and kept.

C crops, S side of a crop in pixels, Q picture tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aria.engine.pictures import PictureCache
from aria.engine.request import Picture
from aria.model import Aria


class Encoder:
    """Encodes pictures once.

    Args:
        model: its vision tower and projector are used.
        cache_bytes: memory for what was encoded.
    """

    def __init__(self, model: Aria, cache_bytes: int):
        self._model = model
        self.cache = PictureCache(cache_bytes)

    def features(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Picture tokens ``(Q, D)`` of each picture."""
        return [picture.data for picture in pictures]
