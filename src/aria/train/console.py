"""The console output of a run: where its metrics go, and how it ended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from aria.train.curve import LossCurve
from aria.train.data import DataStream
from aria.train.progress import LOG_NAME, WANDB_ID_NAME, JsonLines, Reporter, Sink, TensorBoard, Wandb, duration
from aria.train.recipe import ModelSettings, Recipe
from aria.train.settings import as_table
from aria.train.trainer import Trainer

EXPORT = "export"
"""Folder inside the run's folder, with the adapter, or the whole model with its processor."""


def rounded_epochs(recipe: Recipe, stream: Any) -> list[str]:
    """A line about a budget of epochs that is not a whole number of rows."""
    epochs = recipe.budget.epochs
    if epochs is None or not isinstance(stream, DataStream) or math.isclose(epochs * stream.rows, stream.rows_in_all):
        return []
    return [f"budget.epochs = {epochs:g} of {stream.rows:,} rows is rounded to {stream.rows_in_all:,} rows"]


def make_reporter(recipe: Recipe, out: Path, console: Console, step: int) -> Reporter:
    sinks: list[Sink] = [JsonLines(out / LOG_NAME, step), LossCurve(out / LOG_NAME)]
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out))
    if recipe.log.wandb is not None:
        if not step:
            # A run that starts over is another wandb run.
            (out / WANDB_ID_NAME).unlink(missing_ok=True)
        sinks.append(Wandb(out, recipe.log.wandb, as_table(recipe)))
    return Reporter(sinks, console)


def say_end(
    reporter: Reporter, reason: str, trainer: Trainer, report: Any, out: Path, *, beside: ModelSettings | None
) -> None:
    """Print how a run ended; ``beside`` is the base model of an adapter."""
    position, stream = trainer.position, trainer.stream
    passes = f", {stream.epochs:.4g} epochs of {stream.rows:,} rows" if isinstance(stream, DataStream) else ""
    steps = f"{position.step} step{'s' if position.step != 1 else ''}"
    spent = f", {duration(trainer.clock.spent)} of training" if trainer.clock.running else ""
    reporter.say(f"{reason}: {steps}, {position.tokens:,} tokens{passes}{spent}")
    if report:
        reporter.say(str(report))
    if reason in ("done", "data ended"):
        use = f"-m {out / EXPORT}"
        if beside is not None:
            # The default model of `aria chat` is nano, which adapters of other models do not fit.
            base = ("-m", beside.path), ("--revision", beside.revision), ("--adapter", out / EXPORT)
            use = " ".join(f"{option} {value}" for option, value in base if value is not None)
        reporter.say(f"written to {out / EXPORT}; to talk to it: aria chat {use}")
    else:
        reporter.say(f"saved at step {position.step} in {out}; rerun to resume")
