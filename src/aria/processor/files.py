"""The JSON files of the processor: names, reading, and the table of crop sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aria.config import CONFIG_NAME, AriaConfig
from aria.hub import read_json

PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "tokenizer.model"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SIZE_CONVERSION: dict[int, int] = {490: 128, 980: 256}
"""Published crop sizes: side in pixels -> tokens per crop."""


def read_size_conversion(folder: Path) -> dict[int, int]:
    """Read crop size -> tokens per crop, from ``config.json``, ``processor_config.json`` or the published table."""
    if (folder / CONFIG_NAME).is_file():
        return AriaConfig.from_pretrained(folder).image_sizes()
    file = folder / PROCESSOR_CONFIG
    table = read_json(file).get("size_conversion") if file.is_file() else None
    if table is None:
        return dict(SIZE_CONVERSION)
    try:
        sizes = {int(size): int(tokens) for size, tokens in table.items()}
    except (AttributeError, TypeError, ValueError):
        sizes = {}
    if not sizes or min(*sizes, *sizes.values()) < 1:
        raise ValueError(f"{file}: size_conversion should map crop sizes to tokens, but is {table!r:.100}")
    return sizes


def read_image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read ``preprocessor_config.json``, or the part of ``processor_config.json`` that transformers 5 writes instead.

    Returns:
        The file, for messages, and the settings.
    """
    file = folder / PROCESSOR_CONFIG
    if not (folder / PREPROCESSOR_CONFIG).is_file() and file.is_file():
        settings = read_json(file).get("image_processor")
        if isinstance(settings, dict):
            return file, settings
        if settings is not None:
            raise ValueError(f"{file}: image_processor should be an object, but is {settings!r:.100}")
    return folder / PREPROCESSOR_CONFIG, read_json(folder / PREPROCESSOR_CONFIG)
