"""Packed batches of tokens and drawing commands, planned by worker processes.

``loader(Plan(...))`` yields the dicts that the recipe's README documents; ``render.Renderer`` draws them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from recipes.nano.assets.archive import FOLDER, Assets
from recipes.nano.draw import commands
from recipes.nano.scenes import stories
from recipes.nano.scenes.planner import SHARES, Planner
from recipes.nano.scenes.scene import IMAGE, STORIES, TASKS, Story
from recipes.nano.text import dialogue, tokenizer
from recipes.nano.train import batches
from recipes.nano.train.batches import Turns

PICTURES_PER_FILLER = 4  # the rest of the stream is cut into N / 4 pieces (at least 4), so that none is long


@dataclass(frozen=True)
class Kind:
    """A kind of batch; batches of a kind have the same shapes.

    Attributes:
        size: Side of the images in pixels.
        tokens: Tokens of the packed stream per image.
        longest: Maximum tokens of a sequence; conversations are drawn again until they fit.
        images: Minimum and maximum number of images of a conversation.
        shares: Shares of the tasks.
    """

    size: int
    tokens: int
    longest: int
    images: tuple[int, int]
    shares: Mapping[str, float]


KINDS = {
    "small": Kind(224, 208, 400, (1, 1), dict(zip(TASKS, SHARES[224], strict=True))),
    "large": Kind(448, 288, 512, (1, 1), dict(zip(TASKS, SHARES[448], strict=True))),
    "several": Kind(224, 116, 512, (2, 6), {"clips": 0.55, "several": 0.45}),
    "long": Kind(224, 92, 4096, (10, 48), {"search": 1.0}),
}


def small_talk(rng: Random) -> Turns:
    """Draw a conversation of one or two turns without an image."""
    return [dialogue.small_talk(rng) for _ in range(rng.choice((1, 1, 2)))]


@dataclass(frozen=True)
class Plan:
    """Configuration of image batches; it (without ``first`` and ``workers``) and n determine the content of batch n.

    Attributes:
        seed: Seed of the run.
        images: Images per batch, by kind.
        cycle: Kinds of successive batches.
        shares: Shares of tasks that override those of ``KINDS``.
        assets: File of the assets.
        workers: Worker processes; 0 plans in this process.
        growth: Batches over which words grow to their full length.
        first: Number of the first batch; not 0 in a resumed run.
        talk: Draws conversations without an image; worker processes have to be able to import it.
        talk_every: Images per conversation without an image.
    """

    seed: int
    images: Mapping[str, int] = field(default_factory=lambda: {"small": 512, "large": 128, "several": 512, "long": 512})
    cycle: tuple[str, ...] = ("small", "small", "small", "large")
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    assets: Path = FOLDER / "assets.npz"
    workers: int = 4
    growth: int = 3500
    first: int = 0
    talk: Callable[[Random], Turns] = small_talk
    talk_every: int = 32

    def __post_init__(self) -> None:
        for kind in {*self.cycle, *self.images, *self.shares}:
            if kind not in KINDS:
                raise ValueError(f"a plan's kinds of batches should be among {', '.join(KINDS)}, but one is {kind!r}")
        for kind, shares in self.shares.items():
            if unknown := sorted(set(shares) - set(KINDS[kind].shares)):
                raise ValueError(f"tasks of {kind!r} should be among {', '.join(KINDS[kind].shares)}, not {unknown}")


def loader(plan: Plan, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
    """Yield batches endlessly, in order, from ``plan.first`` on; a worker makes every ``plan.workers``-th of them."""
    return batches.loader(Batches(plan), plan.workers, pin_memory)


class Batches(IterableDataset):
    """The endless sequence of a plan's batches, or this worker's share of it."""

    def __init__(self, plan: Plan, assets: Assets | None = None) -> None:
        self.plan, self.assets = plan, assets

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, step = (info.id, info.num_workers) if info else (0, 1)
        assets = self.assets or Assets.load(self.plan.assets, images=False)
        for number in itertools.count(self.plan.first + worker, step):
            kind = self.plan.cycle[number % len(self.plan.cycle)]
            rng = Random(self.plan.seed * 1_000_003 + number)
            grown = min(1.0, number / self.plan.growth)
            batch = make_batch(assets, rng, kind, self.plan.images[kind], grown, self.plan)
            yield batches.bundle(batch) if info else batch


def make_batch(
    assets: Assets, rng: Random, kind: str, images: int, grown: float = 1.0, plan: Plan | None = None
) -> dict[str, Any]:
    """Plan, tokenize and pack one batch of CPU tensors.

    Args:
        assets: What images are made of.
        rng: Source of all choices.
        kind: Key of :data:`KINDS`.
        images: Number of images.
        grown: Growth of words, 0 to 1.
        plan: Its ``shares``, ``talk`` and ``talk_every`` are used.
    """
    plan = plan or Plan(seed=0)
    shape, shares = KINDS[kind], plan.shares.get(kind, KINDS[kind].shares)
    planner = Planner(assets, shape.size, rng)
    talks = images // plan.talk_every
    most, fillers = -(-images // shape.images[0]), max(4, images // PICTURES_PER_FILLER)
    capacity = images * shape.tokens
    planned = [_story(planner, count, shares, grown) for count in deal(images, shape.images, rng)]
    sequences = [batches.tokens(story.turns, shape.size) for story in planned]
    sequences += [batches.tokens(plan.talk(rng)) for _ in range(talks)]
    # Replace conversations until all fit, so that the stream has a fixed shape. If the sum is too large, replace the
    # one that exceeds its share most: a conversation about many images is always long.
    lengths = np.array([len(ids) for ids, _ in sequences])
    shares_of = np.array([shape.tokens * len(story.scenes) for story in planned] + [0] * talks)
    while lengths.sum() > capacity or lengths.max() > shape.longest:
        longest = int((lengths if lengths.max() > shape.longest else lengths - shares_of).argmax())
        if longest < len(planned):
            planned[longest] = _story(planner, len(planned[longest].scenes), shares, grown)
            sequences[longest] = batches.tokens(planned[longest].turns, shape.size)
        else:
            sequences[longest] = batches.tokens(plan.talk(rng))
        lengths[longest] = len(sequences[longest][0])
    # The number of pieces does not depend on the number of conversations.
    pieces = fillers + most + talks - len(sequences)
    filler = np.diff(np.linspace(0, capacity - lengths.sum(), pieces + 1).astype(np.int64))
    assert filler.max() <= shape.longest, f"{filler.max()} tokens of filler in a piece, room for {shape.longest}"
    all_lengths = np.concatenate([lengths, filler])
    starts = np.concatenate([[0], np.cumsum(all_lengths)])
    used = int(lengths.sum())
    input_ids = np.full(capacity, tokenizer.PAD_TOKEN_ID, np.int64)
    labels = np.full(capacity, -100, np.int64)
    input_ids[:used] = np.concatenate([ids for ids, _ in sequences])
    labels[:used] = np.concatenate([wanted for _, wanted in sequences])
    task = [(*TASKS, *STORIES).index(story.task) for story in planned for _ in story.scenes]
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "labels": labels,
        "weights": batches.answer_weights(labels),
        "positions": np.arange(capacity) - np.repeat(starts[:-1], all_lengths),
        "cu_seqlens": starts.astype(np.int32),
        "task": np.array(task, np.int64),
        **commands.pack([scene for story in planned for scene in story.scenes], assets),
    }
    batch = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}
    return batch | {
        "kind": kind,
        "size": shape.size,
        "max_seqlen": shape.longest,
        "num_tokens": used,
        "seed": rng.getrandbits(62),
    }


def deal(images: int, bounds: tuple[int, int], rng: Random) -> list[int]:
    """Draw numbers within ``bounds`` that add up to ``images``; only the last may be smaller."""
    low, high = bounds
    counts: list[int] = []
    left = images
    while left > high:
        counts.append(rng.randint(low, max(low, min(high, left - low))))
        left -= counts[-1]
    return [*counts, left] if left else counts


def _story(planner: Planner, images: int, shares: Mapping[str, float], grown: float) -> Story:
    """Plan a conversation about ``images`` images, of a task drawn by ``shares``."""
    task = planner.rng.choices(tuple(shares), tuple(shares.values()))[0]
    if task in STORIES:
        makers = {"clips": stories.clip, "several": stories.several, "search": stories.search}
        return makers[task](planner, images)
    scene = planner.plan(grown, task)
    (question, answer), *rest = scene.turns
    return Story(task, [scene], [(IMAGE + question, answer), *rest])


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move the tensors of a batch to ``device``, asynchronously from pinned memory."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
