"""Pictures -> picture tokens: encoded in portions that fit, and kept.

C crops, S side of a crop in pixels, Q picture tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from aria import ops
from aria.engine.graphs import Graphs
from aria.engine.request import Picture
from aria.model import Aria, PackedPatches, pack_crops
from aria.model.picture_cache import PictureCache
from aria.processor.pictures import PictureInput, load_crops

MOST_PATCHES = {"cuda": 80_000, "cpu": 10_000}
"""Patches of one pass through the vision tower, so that a clip of any length takes the memory of 16 large pictures."""

GRAPH_PATCHES = 20_000
"""Up to so many patches, launching the tower's operations takes longer than they do: these run as graphs."""
MOST_GRAPHS = 32


class Encoder:
    """Encodes pictures, each once as long as there is memory to keep it, and once for each adapter that changes it.

    Args:
        models: whose vision tower and projector are used: without an adapter the one under None, and by the keys of
            adapters those that these change; it may change between steps.
        cache_bytes: memory for what was encoded.
        mean, std: of the three channels, as the image processor's settings have them.
    """

    def __init__(
        self,
        models: Mapping[str | None, Aria],
        cache_bytes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self._models, self._mean, self._std = models, tuple(mean), tuple(std)
        self._config = models[None].config.vision
        self._weight = models[None].multi_modal_projector.query
        self.device = self._weight.device
        self.cache = PictureCache(cache_bytes)
        with torch.inference_mode():
            self._graphs = Graphs(self._weight.device, MOST_GRAPHS) if ops.inference_kernels(self._weight) else None

    def patches(self, picture: PictureInput) -> int:
        """What encoding a picture costs, in patches of the vision tower: those that are not only padding."""
        side = self._config.patch_size
        return sum(-(-height // side) * -(-width // side) for height, width in picture.picture.extents)

    def holds(self, picture: Picture, adapter: str | None) -> bool:
        """Whether :meth:`features` would have nothing to encode. ``adapter`` as there."""
        if isinstance(picture.data, Tensor):
            return True
        return _key(picture.data, adapter if adapter in self._models else None) in self.cache

    def forget_graphs(self) -> None:
        """Drop all graphs, which keep the models that they run."""
        if self._graphs is not None:
            self._graphs.clear()

    @ops.on_own_device
    def features(self, pictures: Sequence[Picture], adapter: str | None = None) -> list[Tensor]:
        """Picture tokens ``(Q, D)`` of each picture, whose ``data`` is a `PictureInput`, or picture tokens already.

        ``adapter``: whose vision tower and projector encode them; one that does not change these is as good as None.
        """
        adapter = adapter if adapter in self._models else None
        found: dict[int, Tensor] = {}
        missing: dict[bytes, PictureInput] = {}
        for i, picture in enumerate(pictures):
            if isinstance(picture.data, Tensor):
                found[i] = picture.data
            elif (kept := self.cache.get(_key(picture.data, adapter))) is not None:
                found[i] = kept
            else:
                missing[picture.data.key] = picture.data
        made: dict[bytes, Tensor] = {}
        for portion in self._portions(list(missing.values())):
            for new, features_QD in zip(portion, self._encode(portion, adapter), strict=True):
                # A part of a larger tensor would keep all of it in memory.
                made[new.key] = features_QD.clone()
                self.cache.put(_key(new, adapter), made[new.key])
        return [found[i] if i in found else made[picture.data.key] for i, picture in enumerate(pictures)]

    def _portions(self, pictures: Sequence[PictureInput]) -> Iterator[list[PictureInput]]:
        """Pictures of one crop size, in portions of at most :data:`MOST_PATCHES` (or one picture)."""
        most = MOST_PATCHES["cuda" if self._weight.is_cuda else "cpu"]
        by_size = sorted(pictures, key=lambda picture: picture.picture.size)
        for _, alike in groupby(by_size, lambda picture: picture.picture.size):
            portion: list[PictureInput] = []
            patches = 0
            for picture in alike:
                more = self.patches(picture)
                if portion and patches + more > most:
                    yield portion
                    portion, patches = [], 0
                portion.append(picture)
                patches += more
            yield portion

    def _encode(self, pictures: Sequence[PictureInput], adapter: str | None) -> Sequence[Tensor]:
        crops = load_crops([picture.picture for picture in pictures], self._weight.device)
        patches = pack_crops(
            torch.cat([crop.pixels for crop in crops]),
            [extent for crop in crops for extent in crop.extents],
            self._mean,
            self._std,
            self._config,
            self._weight.dtype,
        )
        (features_QD,) = self._run(patches, adapter)
        assert features_QD is not None, "encoding gives features"
        return features_QD.split([picture.tokens for picture in pictures])

    def _run(self, patches: PackedPatches, adapter: str | None) -> tuple[Tensor | None, ...]:
        # A graph keeps its work, which should not keep the pictures of its first time.
        model, segments, grid = self._models[adapter], patches.segments, patches.grid_patches

        def work(pixels: Tensor, positions: Tensor) -> tuple[Tensor]:
            return (model.encode_images(PackedPatches(pixels, positions, segments, grid)),)

        if self._graphs is None or patches.segments.total > GRAPH_PATCHES:
            return work(patches.pixels, patches.positions)
        key = adapter, patches.segments.lengths, patches.grid_patches
        return self._graphs.run(key, work, patches.pixels, patches.positions)


def _key(picture: PictureInput, adapter: str | None) -> Hashable:
    """What picture tokens are kept by."""
    return picture.key, adapter
