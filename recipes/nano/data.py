"""Worker processes plan scenes; the training process gets packed batches of tokens and drawing commands.

``loader(Plan(...))`` yields dicts as the recipe's README describes them; drawing them is ``render.Renderer``'s part.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from recipes.nano import commands, dialogue, scenes, tokenizer
from recipes.nano.assets import FOLDER, Assets
from recipes.nano.planner import Planner
from recipes.nano.scenes import Scene

TOKENS_PER_PICTURE = {224: 176, 448: 256}  # of the packed stream; sequences are drawn again until they fit
MAX_SEQLEN = {224: 288, 448: 512}
PICTURES_PER_TALK = 32  # one sequence of text alone for so many pictures
PICTURES_PER_FILLER = 4  # the rest of the stream is cut into that many pieces (at least 4), so that none is long


@dataclass(frozen=True)
class Plan:
    """What a run draws. The content of batch n depends on this (but for ``first`` and ``workers``) and on n alone.

    ``pictures``: pictures a batch, by size. ``cycle``: sizes of successive batches. ``growth``: batches over which
    words grow to their full length. ``first``: number of the first batch, 0 but for a run that goes on.
    """

    seed: int
    pictures: Mapping[int, int] = field(default_factory=lambda: {224: 512, 448: 128})
    cycle: tuple[int, ...] = (224, 224, 224, 448)
    assets: Path = FOLDER / "assets.npz"
    workers: int = 4
    growth: int = 3500
    first: int = 0


def loader(plan: Plan, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
    """Batches without end, in order, from ``plan.first`` on; worker w makes every ``plan.workers``-th of them."""
    dataset = Batches(plan)
    if plan.workers == 0:
        return iter(dataset)
    bundles = DataLoader(
        dataset,
        batch_size=None,
        num_workers=plan.workers,
        prefetch_factor=4,
        pin_memory=pin_memory,
        multiprocessing_context="spawn",
    )
    return map(unbundle, bundles)


def bundle(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with all tensors in one: workers hand over a file descriptor for each, slowly and from few."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    rest = {key: value for key, value in batch.items() if key not in tensors}
    content, fields = bytearray(), []
    for key, tensor in tensors.items():
        fields.append((key, tensor.dtype, tuple(tensor.shape), len(content)))
        content += tensor.numpy().tobytes()
        content += bytes(-len(content) % 8)  # every part starts aligned for any dtype
    return {"rest": rest, "fields": fields, "buffer": torch.frombuffer(content, dtype=torch.uint8)}


def unbundle(bundled: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`bundle` was given; the tensors are views of one buffer."""
    buffer: torch.Tensor = bundled["buffer"]
    batch = dict(bundled["rest"])
    for key, dtype, shape, start in bundled["fields"]:
        count = int(np.prod(shape)) * dtype.itemsize
        batch[key] = buffer[start : start + count].view(dtype).view(shape)
    return batch


class Batches(IterableDataset):
    """The endless sequence of batches of a plan, or this worker's share of it."""

    def __init__(self, plan: Plan, assets: Assets | None = None) -> None:
        self.plan, self.assets = plan, assets

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, step = (info.id, info.num_workers) if info else (0, 1)
        assets = self.assets or Assets.load(self.plan.assets, pictures=False)
        for number in itertools.count(self.plan.first + worker, step):
            size = self.plan.cycle[number % len(self.plan.cycle)]
            rng = Random(self.plan.seed * 1_000_003 + number)
            grown = min(1.0, number / self.plan.growth)
            batch = make_batch(assets, rng, size, self.plan.pictures[size], grown)
            yield bundle(batch) if info else batch


def make_batch(assets: Assets, rng: Random, size: int, pictures: int, grown: float = 1.0) -> dict[str, Any]:
    """Plan, tokenize and pack one batch; tensors on the CPU. ``grown``, 0..1, makes words longer."""
    planner = Planner(assets, size, rng)
    count = pictures + pictures // PICTURES_PER_TALK
    fillers = max(4, pictures // PICTURES_PER_FILLER)
    room = pictures * TOKENS_PER_PICTURE[size]
    planned: list[Scene] = [planner.plan(grown) for _ in range(pictures)]
    sequences = [tokens(scene.turns, size) for scene in planned] + [_talk(rng) for _ in range(count - pictures)]
    # Replace the longest conversations until all fit: shapes of the stream must not depend on luck.
    lengths = np.array([len(ids) for ids, _ in sequences])
    while lengths.sum() > room or lengths.max() > MAX_SEQLEN[size]:
        longest = int(lengths.argmax())
        if longest < pictures:
            planned[longest] = planner.plan(grown)
            sequences[longest] = tokens(planned[longest].turns, size)
        else:
            sequences[longest] = _talk(rng)
        lengths[longest] = len(sequences[longest][0])
    filler = np.diff(np.linspace(0, room - lengths.sum(), fillers + 1).astype(np.int64))
    assert filler.max() <= MAX_SEQLEN[size], f"{filler.max()} tokens of filler in a piece, room for {MAX_SEQLEN[size]}"
    all_lengths = np.concatenate([lengths, filler])
    starts = np.concatenate([[0], np.cumsum(all_lengths)])
    used = int(lengths.sum())
    input_ids = np.full(room, tokenizer.PAD_TOKEN_ID, np.int64)
    labels = np.full(room, -100, np.int64)
    input_ids[:used] = np.concatenate([ids for ids, _ in sequences])
    labels[:used] = np.concatenate([wanted for _, wanted in sequences])
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "labels": labels,
        "positions": np.arange(room) - np.repeat(starts[:-1], all_lengths),
        "cu_seqlens": starts.astype(np.int32),
        "task": np.array([scenes.TASKS.index(scene.task) for scene in planned], np.int64),
        **commands.pack(planned, assets),
    }
    batch = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}
    return batch | {
        "size": size,
        "max_seqlen": MAX_SEQLEN[size],
        "num_tokens": used,
        "seed": rng.getrandbits(62),
    }


def _talk(rng: Random) -> tuple[np.ndarray, np.ndarray]:
    """A conversation without a picture, of one turn or two."""
    return tokens([dialogue.small_talk(rng) for _ in range(rng.choice((1, 1, 2)))], None)


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on ``device``, copied without waiting where the memory is pinned."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def tokens(turns: list[tuple[str, str]], size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and unshifted labels of a conversation about a picture of ``size``, or about none."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in dialogue.conversation(turns, picture=size is not None):
        piece = _answer(text) if learnt else _prompt(text, size)
        ids += piece
        labels += piece if learnt else [-100] * len(piece)
    return np.array(ids, np.int64), np.array(labels, np.int64)


@lru_cache(maxsize=16384)
def _prompt(text: str, size: int | None) -> list[int]:
    """Ids of a question with its markers, the image token repeated once for each query."""
    ids = tokenizer.encode(text)
    if size is None:
        return ids
    image = tokenizer.IMAGE_TOKEN_ID
    return [copy for token in ids for copy in [token] * (tokenizer.QUERIES[size] if token == image else 1)]


@lru_cache(maxsize=16384)
def _answer(text: str) -> list[int]:
    return tokenizer.encode(text)
