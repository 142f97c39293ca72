"""Images -> image tokens: encoded in batches that fit into memory, and cached.

C crops, S side of a crop in pixels, Q image tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from aria import ops
from aria.engine.graphs import Graphs
from aria.model import Aria, PackedPatches, pack_crops
from aria.model.image_cache import ImageCache
from aria.processor.image_inputs import ImageInput, ImageSpan, load_crops

MOST_PATCHES = {"cuda": 80_000, "cpu": 10_000}
"""Maximum number of patches in one pass of the vision tower: a clip takes no more memory than 16 large images."""

GRAPH_PATCHES = 20_000
"""Up to this many patches, launching the operations takes longer than running them, so they run as CUDA graphs."""
MOST_GRAPHS = 32


class ImageEncoder:
    """Encodes images and caches their tokens, separately for each adapter that changes the encoder.

    Args:
        models: Models whose vision tower and projector encode: the base model under None, and by key of an adapter the
            variants that adapters change. It may change between steps.
        cache_bytes: Memory for cached image tokens.
        mean, std: Normalisation of the three channels, from the image processor's settings.
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
        self.cache = ImageCache(cache_bytes)
        with torch.inference_mode():
            self._graphs = Graphs(self._weight.device, MOST_GRAPHS) if ops.inference_kernels(self._weight) else None

    def patches(self, image: ImageInput) -> int:
        """What encoding an image costs, in patches of the vision tower; patches that are only padding do not count."""
        side = self._config.patch_size
        return sum(-(-height // side) * -(-width // side) for height, width in image.extents)

    def holds(self, span: ImageSpan, adapter: str | None) -> bool:
        """Whether :meth:`features` would find the image's tokens without encoding. ``adapter`` as there."""
        return isinstance(span.data, Tensor) or self._key(span, adapter) in self.cache

    def forget_graphs(self) -> None:
        """Drop all CUDA graphs, which keep their models in memory."""
        if self._graphs is not None:
            self._graphs.clear()

    @ops.on_own_device
    def features(self, spans: Sequence[ImageSpan], adapter: str | None = None) -> list[Tensor]:
        """Image tokens ``(Q, D)`` of each span, from the encoder or the cache.

        Args:
            spans: their ``data`` is an `ImageInput` to encode, or image tokens, which are returned as they are.
            adapter: key of the adapter whose vision tower and projector encode them; one that changes neither gives
                the same as None.
        """
        found: dict[int, Tensor] = {}
        missing: dict[Hashable, ImageSpan] = {}
        for i, span in enumerate(spans):
            if isinstance(span.data, Tensor):
                found[i] = span.data
            elif (cached := self.cache.get(self._key(span, adapter))) is not None:
                found[i] = cached
            else:
                missing[span.key] = span
        made: dict[Hashable, Tensor] = {}
        for portion in self._portions(list(missing.values())):
            for span, features_QD in zip(portion, self._encode(portion, adapter), strict=True):
                # A copy, because a slice would keep the whole tensor in memory.
                made[span.key] = features_QD.clone()
                self.cache.put(self._key(span, adapter), made[span.key])
        return [found[i] if i in found else made[span.key] for i, span in enumerate(spans)]

    def _portions(self, spans: Sequence[ImageSpan]) -> Iterator[list[ImageSpan]]:
        """Batches of images of one crop size, each of at most :data:`MOST_PATCHES` patches or a single image."""
        most = MOST_PATCHES["cuda" if self._weight.is_cuda else "cpu"]
        by_size = sorted(spans, key=lambda span: span.data.size)
        for _, same_size in groupby(by_size, lambda span: span.data.size):
            portion: list[ImageSpan] = []
            patches = 0
            for span in same_size:
                more = self.patches(span.data)
                if portion and patches + more > most:
                    yield portion
                    portion, patches = [], 0
                portion.append(span)
                patches += more
            yield portion

    def _encode(self, spans: Sequence[ImageSpan], adapter: str | None) -> Sequence[Tensor]:
        crops = load_crops([span.data for span in spans], self._weight.device)
        patches = pack_crops(
            torch.cat([crop.pixels for crop in crops]),
            [extent for crop in crops for extent in crop.extents],
            self._mean,
            self._std,
            self._config,
            self._weight.dtype,
        )
        (features_QD,) = self._run(patches, adapter if adapter in self._models else None)
        assert features_QD is not None, "encoding gives features"
        parts: Sequence[Tensor] = features_QD.split([span.tokens for span in spans])
        return parts

    def _run(self, patches: PackedPatches, adapter: str | None) -> tuple[Tensor | None, ...]:
        # A CUDA graph keeps its work alive, which therefore must not hold the pixels of its first run.
        model, segments, grid = self._models[adapter], patches.segments, patches.grid_patches

        def work(pixels: Tensor, positions: Tensor) -> tuple[Tensor]:
            return (model.encode_images(PackedPatches(pixels, positions, segments, grid)),)

        if self._graphs is None or patches.segments.total > GRAPH_PATCHES:
            return work(patches.pixels, patches.positions)
        key = adapter, patches.segments.lengths, patches.grid_patches
        return self._graphs.run(key, work, patches.pixels, patches.positions)

    def _key(self, span: ImageSpan, adapter: str | None) -> Hashable:
        """Key of an image's tokens in the cache: its content, and the adapter if it changes the encoder."""
        return span.key, adapter if adapter in self._models else None
