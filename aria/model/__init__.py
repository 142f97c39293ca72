"""The organs of Aria as modules on one device: no files, no tokenizer, no batch axis."""

from aria.model.aria import Aria
from aria.model.context import Cached, Context, Packed
from aria.model.vision import PackedPatches, pack_patches

__all__ = ["Aria", "Cached", "Context", "Packed", "PackedPatches", "pack_patches"]
