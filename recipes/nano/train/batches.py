"""Shared by image and text batches: tokens and labels of conversations, label weights, and transfer from workers."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from recipes.nano.text import dialogue, tokenizer

Turns = list[tuple[str, str]]


def loader(dataset: IterableDataset[dict[str, Any]], workers: int, pin_memory: bool) -> Iterator[dict[str, Any]]:
    """Yield the batches of an endless dataset in order, made by ``workers`` processes; 0 makes them in this process."""
    if workers == 0:
        return iter(dataset)
    bundles = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=pin_memory,
        multiprocessing_context="spawn",
    )
    return map(unbundle, bundles)


def bundle(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Pack all tensors into one: workers pass a file descriptor per tensor, which is slow, and descriptors are few."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    rest = {key: value for key, value in batch.items() if key not in tensors}
    content, fields = bytearray(), []
    for key, tensor in tensors.items():
        fields.append((key, tensor.dtype, tuple(tensor.shape), len(content)))
        content += tensor.numpy().tobytes()
        content += bytes(-len(content) % 8)  # align every part for any dtype
    return {"rest": rest, "fields": fields, "buffer": torch.frombuffer(content, dtype=torch.uint8)}


def unbundle(bundled: Mapping[str, Any]) -> dict[str, Any]:
    """Invert :func:`bundle`; the tensors are views of one buffer."""
    buffer: torch.Tensor = bundled["buffer"]
    batch = dict(bundled["rest"])
    for key, dtype, shape, start in bundled["fields"]:
        count = int(np.prod(shape)) * dtype.itemsize
        batch[key] = buffer[start : start + count].view(dtype).view(shape)
    return batch


def tokens(turns: Turns, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and unshifted labels of a conversation; its images have ``size`` pixels."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in dialogue.conversation(turns, image=False):
        piece = _short(text) if len(text) < 200 else tokenizer.encode(text)
        if learnt:
            labels += piece
        else:
            piece = _with_places(piece, size)
            labels += [-100] * len(piece)
        ids += piece
    return np.array(ids, np.int64), np.array(labels, np.int64)


def answer_weights(labels: np.ndarray) -> np.ndarray:
    """Weigh labels by one over the square root of their answer's length, so that short answers count enough.

    A text to read has ten times the letters of a colour, most of them easy.
    """
    learnt = labels != -100
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    weights = np.zeros(len(labels), np.float32)
    weights[learnt] = np.repeat(lengths**-0.5, lengths)
    return weights


def _with_places(ids: list[int], size: int) -> list[int]:
    """Repeat the image token once for each query."""
    image = tokenizer.IMAGE_TOKEN_ID
    if image not in ids:
        return ids
    places = [image] * tokenizer.QUERIES[size]
    return [copy for token in ids for copy in (places if token == image else (token,))]


@lru_cache(maxsize=16384)
def _short(text: str) -> list[int]:
    return tokenizer.encode(text)
