"""Evaluation on held-out data: their loss, and the model's answers to some of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aria.config import AriaConfig
from aria.model import Aria
from aria.processor import AriaProcessor
from aria.train.data import DataSettings, DataStream, questions
from aria.train.data.encode import RowEncoder
from aria.train.data.look import Look, look
from aria.train.data.report import Report, RowError
from aria.train.data.sources import Sources
from aria.train.loss import IGNORE_INDEX
from aria.train.objective import Losses, Step
from aria.train.progress import append_lines, drop_after
from aria.train.ranks import Ranks
from aria.train.recipe import Recipe
from aria.train.rng import preserved_random_states
from aria.train.trainer import Position
from aria.train.update import ParameterUpdate

SAMPLES_NAME = "samples.jsonl"
_OF_ANOTHER = "held-out data of another process failed; see its own message"

Sampler = Callable[[Aria, AriaProcessor, Sequence[Any], int], list[str]]
"""``(model, processor, conversations without their last answer, max_tokens) -> answers``."""


class Evaluation:
    """``[evaluate]`` of a recipe, which can run at any step.

    Args:
        model: The model, evaluated with its averaged weights if there are any.
        objective: The training objective; its router losses are not reported.
        recipe: The recipe.
        processor: Processor of the model.
        ranks: The processes that train together.
        update: Provides the averaged weights.
        out: Folder of the run, for the samples.
        position: Where the training is.
        sampler: Writes answers; None writes none.
    """

    def __init__(
        self,
        model: Aria,
        objective: Callable[[Any, Step], Losses],
        recipe: Recipe,
        processor: AriaProcessor,
        ranks: Ranks,
        update: ParameterUpdate,
        out: Path,
        position: Position,
        sampler: Sampler | None = None,
    ):
        self._model, self._objective, self._recipe, self._processor = model, objective, recipe, processor
        self._ranks, self._update, self._out, self._sampler = ranks, update, out, sampler
        self._position = position
        # Open during the whole run: every evaluation sees the same rows, or fails where a file was changed.
        evaluates = bool(recipe.evaluate.data)
        self._stream = held_out_stream(recipe, processor, model.config, ranks) if evaluates else None
        self._rows: int | None = None
        if ranks.rank == 0:
            drop_after(out / SAMPLES_NAME, position.step)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Compute held-out loss (a mean over targets) and accuracy, on the same rows at every call.

        Random states stay as they are. An error in the data of one rank is raised on all ranks.

        Returns:
            Metrics to log, with the rows that could not be used.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            # Later steps draw the same random numbers with and without an evaluation.
            with preserved_random_states(), self._update.averaged():
                found = self._loss()
                found |= self._write_samples()
        finally:
            for module, mode in modes:
                module.training = mode
        return found

    def _loss(self) -> dict[str, Any]:
        recipe, ranks, stream = self._recipe, self._ranks, self._stream
        assert stream is not None, "held-out data exist"
        failed: Exception | None = None
        if self._rows is None and recipe.evaluate.batches is not None:
            try:
                self._rows = stream.rows_that_fill(recipe.evaluate.batches)
            except Exception as error:
                failed = error
            if ranks.max(int(failed is not None)):
                raise failed or RuntimeError(_OF_ANOTHER)
        sums = torch.zeros(3, dtype=torch.float64)
        reading: Any = stream.once(self._rows)
        with contextlib.closing(reading) as batches:
            while True:
                failed = None
                try:
                    batch = next(batches, None)
                except Exception as error:
                    batch, failed = None, error
                # Ranks compute together: a rank without more data computes filler, and all stop where one fails.
                most = ranks.max(2 * int(failed is not None) + int(batch is not None))
                if most >= 2:
                    raise failed or RuntimeError(_OF_ANOTHER)
                if not most:
                    break
                batch = (stream.filler() if batch is None else batch).to(ranks.device)
                # With a denominator of one, losses are sums.
                metrics = self._objective(batch, Step(1.0, 1, 1.0)).metrics
                if missing := [name for name in ("loss", "accuracy") if name not in metrics]:
                    raise ValueError(
                        f"[evaluate] needs loss and accuracy among an objective's metrics, sums over the batch's "
                        f"targets divided by those of the step; this one has no {' and no '.join(missing)}, only "
                        f"{', '.join(metrics) or 'nothing'}"
                    )
                sums += torch.tensor([metrics["loss"].item(), metrics["accuracy"].item(), batch.labels])
        mine = _skipped(stream.report, "held-out")
        skipped = mine.get("held-out rows skipped", 0)
        counts = torch.tensor([stream.report.rows, skipped], dtype=torch.float64)
        total = ranks.sum(torch.cat([sums, counts]).to(ranks.device))
        loss, hits, labels, rows, unused = total.tolist()
        if not labels:
            raise ValueError(f"[evaluate] data {', '.join(recipe.evaluate.data)} have no targets that fit into a batch")
        found = {"held-out loss": loss / labels, "held-out accuracy": hits / labels, "held-out targets": round(labels)}
        found["held-out rows"] = f"{round(rows - unused):,} of {stream.rows:,} rows"
        if unused:
            found["held-out rows skipped"] = round(unused)
            # This rank's examples only: gathering others could collide with a checkpoint that is being written.
            found["held-out problems"] = mine.get("held-out problems", [])
        return found

    def _write_samples(self) -> dict[str, Any]:
        """Write the model's answers beside the true ones. Every rank computes them: all hold parts of the weights.

        Returns:
            What to log about rows that were skipped.
        """
        recipe, count = self._recipe, self._recipe.evaluate.samples
        if self._sampler is None or not count:
            return {}
        settings, report = held_out(recipe), Report()
        encoder = RowEncoder(self._processor, self._model.config, settings, recipe.batch.tokens)
        sources = None if self._stream is None else self._stream.sources
        asked = questions(settings, self._processor, count, encoder=encoder, report=report, sources=sources)
        if not asked:
            report.skip("no answer", f"{', '.join(recipe.evaluate.data)}: no conversation that an answer ends")
        lines = []
        for number, (messages, truth) in enumerate(asked, 1):
            try:
                [answer] = self._sampler(self._model, self._processor, [messages], recipe.evaluate.max_tokens)
            except ValueError as error:
                # Such as images of several sizes, which can be trained on but not generated from.
                report.skip("not answered", f"sample {number}, whose answer is {truth!r:.60}: {error}")
                continue
            line = {"step": self._position.step, "messages": messages, "truth": truth, "answer": answer}
            lines.append(json.dumps(line, ensure_ascii=False, default=str))
        if not self._ranks.rank:
            try:
                append_lines(self._out / SAMPLES_NAME, lines)
            except OSError as error:
                report.skip("not written", f"{SAMPLES_NAME} could not be written: {error}")
        return _skipped(report, "sample")


def _skipped(report: Report, what: str) -> dict[str, Any]:
    """Log entries about rows that could not be used; empty if all could."""
    if not report.skipped:
        return {}
    return {
        f"{what} rows skipped": sum(tally.count for tally in report.skipped.values()),
        f"{what} problems": [example for tally in report.skipped.values() for example in tally.examples],
    }


def held_out(recipe: Recipe) -> DataSettings:
    """``[data]`` of a recipe, for the held-out conversations: each once, in a random order given by the seed."""
    evaluate = recipe.evaluate
    return dataclasses.replace(recipe.data, paths=evaluate.data, mixer={}, split=evaluate.split, shuffle=True)


def check_held_out(recipe: Recipe, processor: AriaProcessor, config: AriaConfig, ranks: Ranks) -> Look:
    """Read this rank's share of some held-out rows before training, and find at least one that can be used.

    Raises:
        FileNotFoundError: The data do not exist.
        ValueError: No row has targets that fit into a batch.
    """
    settings = held_out(recipe)
    sources = Sources(settings.weights, settings.split)
    encoder = RowEncoder(processor, config, settings, recipe.batch.tokens)
    problem = ""
    for row in range(len(sources)):
        try:
            if any((sample.targets != IGNORE_INDEX).any() for sample in encoder(sources.read(row)).samples):
                return look(sources, encoder, settings, rank=ranks.data_rank, world=ranks.data_world)
        except RowError as error:
            problem = problem or f" ({sources.where(row)}: {error})"
    named = ", ".join(recipe.evaluate.data)
    raise ValueError(f"[evaluate] data {named} have no targets that fit into a batch{problem}")


def held_out_stream(recipe: Recipe, processor: AriaProcessor, config: AriaConfig, ranks: Ranks) -> DataStream:
    """Held-out batches of one rank, the same at every call."""
    return rank_stream(held_out(recipe), recipe, processor, config, ranks)


def rank_stream(
    settings: DataSettings,
    recipe: Recipe,
    processor: AriaProcessor,
    config: AriaConfig,
    ranks: Ranks,
    *,
    passes: float | None = None,
) -> DataStream:
    """Batches of one rank from the data sets of ``settings``; ``passes`` over them, or infinite."""
    return DataStream(
        settings,
        processor,
        config,
        tokens=recipe.batch.tokens,
        rank=ranks.data_rank,
        world=ranks.data_world,
        seed=recipe.seed,
        passes=passes,
    )
