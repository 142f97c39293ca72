"""Generated data sets, and a processor with Aria's rules, a small vocabulary and small images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aria import AriaConfig, AriaImageProcessor, AriaProcessor
from aria.processor import AriaTokenizer
from aria.train.batch import Batch
from aria.train.data import DataSettings, DataStream
from tests.helpers import made_media, small_tokenizer
from tests.helpers.tiny import tiny_config

SIZES = {28: 4, 56: 9}
"""Side of a crop -> tokens."""
TOKENS = 160
"""Tokens of a batch of :func:`stream`."""


@functools.cache
def processor() -> AriaProcessor:
    images = AriaImageProcessor(max_image_size=56, min_image_size=14, sizes=tuple(SIZES))
    return AriaProcessor(images, AriaTokenizer(small_tokenizer.model()), size_conversion=SIZES)


def config() -> AriaConfig:
    made = tiny_config(vocab_size=processor().tokenizer.vocab_size)
    return dataclasses.replace(made, image_token_index=processor().tokenizer.image_token_id)


def picture(folder: Path, name: str, size: tuple[int, int] = (60, 40), shade: int = 0) -> str:
    """Write an image into a folder and return its name."""
    array = np.random.default_rng(shade).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return name


def clip(folder: Path, name: str = "clip.mp4", frames: int = 50) -> str:
    (folder / name).write_bytes(made_media.clip(frames))
    return name


def jsonl(file: Path, rows: Iterable[Any]) -> Path:
    """Write rows as lines; bytes and strings are written unchanged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
             for row in rows)  # fmt: skip
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """Make a row of one question and one answer."""
    return {"messages": [said("user", question), said("assistant", answer)], **more}


def stream(path: Path, *, rank=0, world=1, seed=3, tokens=TOKENS, passes=None, **settings) -> DataStream:
    made = DataSettings(**{"paths": (str(path),), "lookahead": 3, "prefetch": 2, "workers": 2, **settings})
    return DataStream(made, processor(), config(), tokens=tokens, rank=rank, world=world, seed=seed, passes=passes)


def take(stream: DataStream, count: int) -> list[Batch]:
    batches = iter(stream)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def plain(batch: Batch) -> Any:
    crops = [(crops.pixels.tolist(), crops.extents) for crops in batch.crops]
    return batch.input_ids.tolist(), batch.targets.tolist(), batch.lengths, batch.filler, crops, batch.labels
