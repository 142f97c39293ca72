"""Model files: reads every published layout, writes today's Hub layout."""

from aria.checkpoint.adapter import StoredAdapter, load_adapter, read_adapter, save_adapter
from aria.checkpoint.convert import Converted, convert
from aria.checkpoint.layouts import LAYOUTS, Layout, detect
from aria.checkpoint.load import (
    WEIGHT_PATTERNS,
    Checkpoint,
    find_weights,
    load_into,
    load_model,
    parameter_shapes,
    read_index,
)
from aria.checkpoint.remote import read_remote
from aria.checkpoint.save import save_checkpoint

__all__ = [
    "LAYOUTS",
    "WEIGHT_PATTERNS",
    "Checkpoint",
    "Converted",
    "Layout",
    "StoredAdapter",
    "convert",
    "detect",
    "find_weights",
    "load_adapter",
    "load_into",
    "load_model",
    "parameter_shapes",
    "read_adapter",
    "read_index",
    "read_remote",
    "save_adapter",
    "save_checkpoint",
]
