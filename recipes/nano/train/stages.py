"""The four stages of nano's training, as factories for ``aria train recipes/nano/*.toml``.

``[data] factory`` of a recipe names the stage, ``[model] factory`` makes the :class:`Learner`, new or from the previous
stage, and ``[objective] factory`` computes its losses. The data of each stage is defined here; durations and learning
rates are in the TOML files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from aria.checkpoint import Checkpoint, parameter_shapes
from aria.config import AriaConfig
from aria.model import Aria
from aria.train.objective import Losses, Step
from aria.train.recipe import Recipe
from aria.train.state import trained_weights
from recipes.nano.assets.archive import FOLDER, Assets
from recipes.nano.scenes import scene as scenes
from recipes.nano.text import tokenizer
from recipes.nano.train import text_batches
from recipes.nano.train.cuda_graphs import Replayed
from recipes.nano.train.image_batches import Plan
from recipes.nano.train.learner import Learner, Stages
from recipes.nano.train.model import nano_config, tiny_config
from recipes.nano.train.prefetch import prefetch
from recipes.nano.train.rendered_batches import RenderedBatches
from recipes.nano.train.text_batches import Texts

Batch = dict[str, Any]
TEXT = "text"

LANGUAGE = {"definitions": 0.45, "sums": 0.15, "reckoning": 0.06, "words": 0.1, "facts": 0.07, "talk": 0.07}
REHEARSED = {**LANGUAGE, "unknown words": 0.06, "beyond": 0.05, "no picture": 0.05}
ANSWERS_ONLY = Stages(queries=0.0, answers=0.0, settled=0.0, beside=0.0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The training data of one stage, and its losses.

    Attributes:
        cycle: Kinds of successive batches: ``text`` or keys of :data:`recipes.nano.train.image_batches.KINDS`.
        texts: Share of each kind of text.
        longest: Maximum number of tokens of a text with a needle.
        shares: Shares of tasks within a kind of batch, where they differ from the kind's own.
        teaching: Schedule of the dense losses beside the answers.
        growth: Image batches over which words grow to their full length.
    """

    cycle: tuple[str, ...]
    texts: Mapping[str, float]
    longest: int = 512
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    teaching: Stages = ANSWERS_ONLY
    growth: int = 1


STAGES = {
    "language": Stage(
        cycle=(TEXT,), texts={**LANGUAGE, text_batches.PLAIN: 0.1, text_batches.VERBAL: 0.35, text_batches.NEEDLES: 0.1}
    ),
    # Two text batches per nine image batches: a fifth of the steps, a twentieth of the time.
    "seeing": Stage(
        cycle=("small", "large", "small", "several", TEXT, "small", "large", "small", "several", "small", TEXT),
        texts={**LANGUAGE, text_batches.VERBAL: 0.25, text_batches.NEEDLES: 0.1},
        teaching=Stages(),
        growth=2500,
    ),
    # Up to eight times the longest sequence of the second stage, 512 tokens.
    "long": Stage(
        cycle=(TEXT, "long", TEXT, "several", TEXT, "long", "small", "large"),
        texts={text_batches.NEEDLES: 3.0, text_batches.VERBAL: 0.2, **LANGUAGE},
        longest=4096,
        teaching=Stages(queries=0.0, answers=0.0, settled=0.0, kept=0.25),
    ),
    "answers": Stage(
        cycle=("small", "large", TEXT, "small", "several", TEXT, "small", "large", "long"),
        texts={**REHEARSED, text_batches.VERBAL: 0.1, text_batches.NEEDLES: 0.3},
        longest=4096,
        teaching=Stages(queries=0.0, answers=0.0, settled=0.0, kept=0.25),
    ),
}


class Mixture:
    """A stage's batches; the seed determines batch n, wherever a run is resumed.

    Args:
        stage: Data of the stage.
        tokens: Tokens of a text batch; the number of images of a batch is proportional (256 small ones at 16,384).
        workers: Worker processes.
        seed: Seed of the run.
        device: Device that draws images.
    """

    def __init__(self, stage: Stage, *, tokens: int, workers: int, seed: int, device: torch.device | str):
        self.stage, self.device, self.number = stage, torch.device(device), 0
        image_kinds = tuple(kind for kind in stage.cycle if kind != TEXT)
        writers = workers if not image_kinds else max(min(workers, 1), workers // 6)
        self._texts = Texts(seed, stage.texts, tokens, longest=min(stage.longest, tokens), workers=writers)
        self.images: RenderedBatches | None = None
        if image_kinds:
            most = max(2, tokens // 64)
            # A large image has 1,024 patches; long conversations have as many tokens as others.
            counts = {"small": most, "large": max(1, most // 4), "several": most, "long": most}
            plan = Plan(
                seed=seed,
                images={kind: counts[kind] for kind in dict.fromkeys(image_kinds)},
                cycle=image_kinds,
                shares=stage.shares,
                workers=max(min(workers, 1), workers - writers),
                growth=stage.growth,
            )
            self.images = RenderedBatches(device, plan)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches so far."""
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the saved number of batches."""
        self.number = state["number"]

    def __iter__(self) -> Iterator[Batch]:
        """Yield drawn batches on the device, endlessly."""
        cycle = self.stage.cycle
        before = [cycle[n % len(cycle)] for n in range(self.number)]
        texts = images = None
        while True:
            if cycle[self.number % len(cycle)] == TEXT:
                texts = texts or self._text_batches(before.count(TEXT))
                batch = next(texts)
            else:
                assert self.images is not None
                images = images or self.images.batches(len(before) - before.count(TEXT))
                batch = next(images)
            self.number += 1
            yield batch

    def _text_batches(self, first: int) -> Iterator[Batch]:
        on_gpu = self.device.type == "cuda"
        return prefetch(text_batches.loader(replace(self._texts, first=first), pin_memory=on_gpu), self.device)

    def samples(self) -> Iterator[Batch]:
        """Yield one batch of each kind that training does not use."""
        if TEXT in self.stage.cycle:
            yield from prefetch([text_batches.make_batch(self._texts, Random("sample"))], self.device)
        if self.images is not None:
            yield from self.images.samples()


def stage_of(recipe: Recipe) -> Stage:
    """Return the stage that a recipe's ``[data] factory`` names.

    Raises:
        ValueError: It names none.
    """
    name = (recipe.data.factory or "").rpartition(":")[2]
    if name not in STAGES:
        raise ValueError(
            f"[data] factory should be recipes.nano.train.stages:NAME, one of {', '.join(STAGES)}, but is {name!r}"
        )
    return STAGES[name]


def _stream(recipe: Recipe, processor: Any, rank: int, world: int) -> Mixture:
    """``[data] factory``: make a stage's batches.

    Raises:
        ValueError: The world size is not 1; nano is trained on one GPU.
    """
    if world > 1:
        raise ValueError(f"nano is trained by one process, but the world size is {world}; start it without torchrun")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage = stage_of(recipe)
    return Mixture(stage, tokens=recipe.batch.tokens, workers=recipe.data.workers, seed=recipe.seed, device=device)


language = seeing = long = answers = partial(_stream)


def learner(recipe: Recipe, shape: Callable[[int], AriaConfig] = nano_config) -> Learner:
    """``[model] factory``: make nano with its dense heads, random or from the previous stage.

    With ``[model] path`` (the export of another run), weights are that run's float32 averages including dense heads if
    its checkpoint exists, else those of the export.
    """
    settings = recipe.model
    classes = len(scenes.dense_classes(Assets.load(FOLDER / "assets.npz", images=False).labels))
    if settings.path is None:
        # A multiple of 8 rows suits tensor cores; the last few are unused.
        config = shape(-(-tokenizer.vocab_size() // 8) * 8)
    else:
        config = AriaConfig.from_pretrained(settings.path)
    model = Learner(Aria(settings.configure(config)), classes, stage_of(recipe).teaching, seed=recipe.seed)
    if settings.path is not None:
        load(model, Path(settings.path))
    return model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def tiny_learner(recipe: Recipe) -> Learner:
    """``[model] factory``: the same with 0.2M parameters, for dry runs on a CPU."""
    return learner(recipe, tiny_config)


@torch.no_grad()
def load(model: Learner, export: Path) -> None:
    """Load the weights of a run's checkpoint, or else of its export.

    Raises:
        ValueError: They do not fit.
    """
    try:
        weights = trained_weights(export.parent)
    except FileNotFoundError:
        state = Checkpoint(export, parameter_shapes(model.aria.config)).load()
        weights = {f"aria.{name}": tensor for name, tensor in state.items()}
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    missing = sorted(name for name in parameters if name.startswith("aria.") and name not in weights)
    wrong = missing or sorted(name for name in weights if parameters[name].shape != weights[name].shape)
    if wrong:
        raise ValueError(f"{export} does not fit this model: {', '.join(wrong[:4])}")
    for name, value in weights.items():
        parameters[name].copy_(value)


def objective(model: nn.Module, recipe: Recipe, ranks: Any) -> Callable[[Batch, Step], Losses]:
    """``[objective] factory``: make the learner's losses; on CUDA compiled and replayed as CUDA graphs.

    Raises:
        ValueError: The recipe accumulates gradients, which CUDA graphs do not support here.
    """
    assert isinstance(model, Learner), "[model] factory should be of this module"
    torch.set_float32_matmul_precision("high")
    if ranks.device.type != "cuda":

        def losses(batch: Batch, step: Step) -> Losses:
            total, metrics = model.loss(batch, step.progress)
            return Losses(total / step.micro_batches, {name: m / step.micro_batches for name, m in metrics.items()})

        return losses
    if recipe.batch.accumulate != 1:
        raise ValueError(f"[batch] accumulate should be 1 for nano on a GPU, but is {recipe.batch.accumulate}")
    model.compile()
    replayed = Replayed(model)
    # Compile and capture every kind before the clock starts; later phases are captured when they begin.
    for batch in _stream(recipe, None, 0, 1).samples():
        replayed(batch, 1.0)
    model.zero_grad(set_to_none=True)

    def replay(batch: Batch, step: Step) -> Losses:
        total, metrics = replayed(batch, step.progress)
        # The gradients already exist, so the backward call of the loop has to end here.
        return Losses(total.clone().requires_grad_(), metrics)

    return replay
