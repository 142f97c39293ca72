"""``aria train --dry-run``: what a training would take, without reading weights."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from aria.config import AriaConfig
from aria.processor import AriaProcessor
from aria.train.assemble import open_stream, outline
from aria.train.cost import Trained, batch_flops
from aria.train.data import DataStream
from aria.train.parallel import Parallel
from aria.train.preflight import Sampled, check, weights_dtype
from aria.train.progress import measured_rate
from aria.train.recipe import Recipe

SAMPLED = 4
"""Batches that are read to estimate steps and time."""


def dry_run(recipe: Recipe, out: Path | None = None) -> list[Table | str]:
    """What a training would take, and what of the model would train.

    Data that do not exist yet are no error: a last line says so, and steps and time are not estimated.

    Args:
        recipe: The recipe.
        out: Folder of the run, whose free disk space is compared.

    Returns:
        Tables and lines to print on rank 0; nothing on other ranks.

    Raises:
        ValueError: It does not fit into memory, or the recipe does not fit the model.
    """
    settings = recipe.model
    if settings.factory is not None:
        raise ValueError("[model] factory makes the model by code of its own, which only running it can measure")
    config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
    parallel = Parallel.start(recipe.parallel)
    try:
        rate = measured_rate(parallel.device, weights_dtype(recipe, config, parallel.device))
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        model, trainable = outline(recipe, config)
        sampled, density, notes = None, None, list[str]()
        try:
            stream, density = open_stream(recipe, processor, config, parallel, notes.append)
        except FileNotFoundError as error:
            notes.append(f"Training needs what does not exist yet: {error}")
        else:
            if isinstance(stream, DataStream):
                sampled = _sampled(stream, config, Trained.of(model, full=recipe.targets.method == "full"))
        plan = check(
            recipe,
            config,
            parallel.device,
            world=parallel.world,
            flops_rate=rate,
            sampled=sampled,
            density=density,
            out=out,
        )
        notes += [f"warning: {warning}" for warning in plan.storage.warnings()]
        return [] if parallel.rank else [trainable.table(), plan.table(), *filter(None, notes)]
    finally:
        parallel.close()


def _sampled(stream: DataStream, config: AriaConfig, trained: Trained) -> Sampled | None:
    """The mean cost of the first batches, and the number of batches in an epoch."""
    reading: Any = iter(stream)
    with contextlib.closing(reading) as batches:
        flops = [batch_flops(config, trained, b.lengths, b.labels, b.crops) for b in islice(batches, SAMPLED)]
    return Sampled(len(flops) / stream.epochs, sum(flops) / len(flops)) if stream.epochs else None
