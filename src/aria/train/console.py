"""What a person reads of a run: where its numbers go, and what came of it."""

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
"""Folder in the run's: the adapter, or the whole model with its processor."""


def rounded_epochs(recipe: Recipe, stream: Any) -> list[str]:
    """What to say where a budget of epochs is no whole number of rows."""
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
            # Begun anew, it is another run than one that was in this folder before.
            (out / WANDB_ID_NAME).unlink(missing_ok=True)
        sinks.append(Wandb(out, recipe.log.wandb, as_table(recipe)))
    return Reporter(sinks, console)


def say_end(
    reporter: Reporter, reason: str, trainer: Trainer, report: Any, out: Path, *, beside: ModelSettings | None
) -> None:
    """Say what came of it; ``beside``: the model that an adapter was trained beside."""
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
            # Chat's own default is nano, which other models' adapters do not fit.
            base = ("-m", beside.path), ("--revision", beside.revision), ("--adapter", out / EXPORT)
            use = " ".join(f"{option} {value}" for option, value in base if value is not None)
        reporter.say(f"written to {out / EXPORT}; to talk to it: aria chat {use}")
    else:
        reporter.say(f"saved at step {position.step} in {out}; rerun to resume")
