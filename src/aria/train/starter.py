"""A first recipe with comments, which ``aria train --init`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from aria.config import AriaConfig
from aria.processor import AriaProcessor
from aria.train.data import DataSettings
from aria.train.data.encode import RowEncoder
from aria.train.data.report import RowError
from aria.train.data.sources import Sources
from aria.train.recipe import Recipe, parse_toml

SMALL = 100_000_000
"""Active parameters below which a model trains on a CPU, with a batch size measured on the data."""
MOST_ROWS = 100
"""Rows that are measured."""
EPOCHS = 3
STEPS = 30
"""Minimum steps of a small model's training, if the data are enough."""
HELD_OUT = ("test", "validation")
"""Splits of a folder for evaluation; the first that exists is used."""


class _Numbers(NamedTuple):
    tokens: int
    accumulate: int
    learning_rate: float
    dropout: float
    epochs: int
    log_every: int
    checkpointing: str


PUBLISHED = {
    "lora": _Numbers(4096, 8, 5e-5, 0.05, 1, 10, "none"),
    "full": _Numbers(8192, 4, 5e-6, 0.0, 1, 10, "full"),
}
"""The authors' settings for Aria."""


def starter_recipe(method: Literal["lora", "full"], data: Sequence[str], model: str | None = None) -> str:
    """A TOML recipe that works as it is.

    Args:
        method: LoRA, or all weights of projector and decoder.
        data: Data sets, as in ``[data] paths``.
        model: Folder or Hub repository; None is the packaged nano model.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: A data set is of an unknown kind, or none of its rows can be used.
    """
    sources = Sources(list(data))
    numbers = PUBLISHED[method]
    if model is None or Path(model).is_dir():
        config = AriaConfig.from_pretrained(model)
        if config.active_parameters() < SMALL:
            numbers = _measured(method, data, sources, AriaProcessor.from_pretrained(model), config)
    text = _TEMPLATE.format(
        what="Adapters (LoRA)" if method == "lora" else "Projector and decoder",
        method=json.dumps(method),
        model=f"path = {_quoted(model)}" if model is not None else '# path = "rhymes-ai/Aria"',
        paths=", ".join(map(_quoted, data)),
        rows=f"{len(sources):,}",
        targets=_LORA.format(dropout=numbers.dropout) if method == "lora" else _FULL,
        evaluate=_evaluate(data),
        **numbers._asdict(),
    )
    Recipe.from_table(parse_toml(text, "the recipe"))
    return text


def _measured(
    method: str, data: Sequence[str], sources: Sources, processor: AriaProcessor, config: AriaConfig
) -> _Numbers:
    """A batch size that fits the longest row read, and gives enough steps."""
    encoder = RowEncoder(processor, config, DataSettings(paths=tuple(data)), config.text.max_position_embeddings)
    lengths, problem = [], ""
    for row in range(min(MOST_ROWS, len(sources))):
        try:
            lengths.append([sample.tokens for sample in encoder(sources.read(row)).samples])
        except RowError as error:
            problem = problem or f"{sources.where(row)}: {error}"
    if not any(lengths):
        raise ValueError(f"none of the first {MOST_ROWS} rows of {', '.join(data)} can be trained on ({problem})")
    longest = max(max(samples) for samples in lengths if samples)
    total = sum(map(sum, lengths)) / len(lengths) * len(sources) * EPOCHS
    # Powers of two from 256 to 2048, or what the longest row needs.
    tokens = 1 << max(8, min(11, int(total / STEPS).bit_length() - 1), (longest - 1).bit_length())
    return _Numbers(tokens, 1, 2e-3 if method == "lora" else 2e-4, 0.0, EPOCHS, 1, "none")


def _evaluate(data: Sequence[str]) -> str:
    """``[evaluate]`` on the held-out split of a folder, or commented out."""
    for split in HELD_OUT:
        files = f"{split}.jsonl", f"{split}/state.json"
        folders = [folder for folder in data if any((Path(folder) / file).is_file() for file in files)]
        if folders:
            return f"[evaluate]\ndata = [{', '.join(map(_quoted, folders))}]\nsplit = {_quoted(split)}\n# every = 100"
    return '# [evaluate]\n# data = ["held-out.jsonl"]\n# every = 100'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
# {what} trained on your own data. docs/training.md explains every section, docs/data.md the formats of rows.
#
#   aria train THIS_FILE --dry-run    what it takes, and whether it fits
#   aria train THIS_FILE              train; rerun to resume

[model]
# Folder or Hub repository; without it, the packaged nano model.
{model}

[data]
# {rows} rows. Paths are relative to the working directory.
paths = [{paths}]
# Conversations longer than a batch are skipped; "drop_first" or "drop_last" drop turns instead.
too_long = "skip"
# Limits the memory of images, if the vision encoder trains too.
# max_crops = 32

[batch]
# Tokens of a micro-batch, into which conversations are packed. Fewer take less memory.
tokens = {tokens}
# Micro-batches of one optimizer step (gradient accumulation).
accumulate = {accumulate}

[targets]
method = {method}
{targets}

[optimizer]
# Tune this first: too low learns little, too high forgets what the model knew.
learning_rate = {learning_rate}
weight_decay = 0.1

[schedule]
# The rate rises over this fraction of the training, and falls to zero at its end.
kind = "cosine"
warmup = 0.05

[budget]
# Passes over the data.
epochs = {epochs}

[parallel]
# "full" recomputes layers in the backward pass: slower, with far less memory.
checkpointing = "{checkpointing}"

[checkpoint]
every_minutes = 15.0
keep = 2

[log]
# Steps per log line; log.jsonl, loss.tsv and loss.png are in the run's folder.
every = {log_every}

# Held-out loss, at the end and optionally every N steps.
{evaluate}
"""
_LORA = """\
# LoRA on every linear layer and all experts of the decoder. Higher ranks learn more and take more memory.
rank = 8
alpha = 32.0
dropout = {dropout}"""
_FULL = """\
freeze_vit = true
freeze_projector = false"""
