"""The components of Aria as modules on one device: no files, no tokenizer, no batch axis."""

from aria.model.aria import Aria
from aria.model.context import Context, Packed, Paged, PagedCache
from aria.model.patches import PackedPatches, pack_crops, pack_patches

__all__ = [
    "Aria",
    "Context",
    "Packed",
    "PackedPatches",
    "Paged",
    "PagedCache",
    "pack_crops",
    "pack_patches",
]
