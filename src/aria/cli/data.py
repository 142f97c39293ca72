"""``aria data check``: check training data before a training."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from aria.cli.options import Commands, MaxImageSize, Model, Revision, app, err, out

data = Commands(help="Data for training.")
app.add_typer(data, name="data")

_BAR = 40
_FIRST = 5
"""Rows of a problem that a table shows."""


@data.command()
def check(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="JSONL or Parquet files, folders, or hf:owner/name.")
    ],
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a batch: batch.tokens of the recipe.")] = 8192,
    per_step: Annotated[int, typer.Option(min=1, help="Batches per step: batch.accumulate times GPUs.")] = 1,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a row; default: those of a batch.")] = None,
    max_crops: Annotated[int | None, typer.Option(help="Maximum image crops of a batch; default: no limit.")] = None,
    too_long: Annotated[
        str, typer.Option(help="What to do with longer rows: skip, or drop_first or drop_last turns.")
    ] = "skip",
    labels: Annotated[
        str, typer.Option(help="Tokenize per_turn, as the authors trained, or joint, the whole conversation at once.")
    ] = "per_turn",
    split: Annotated[str, typer.Option(help="Split: NAME.jsonl of a folder, or a split of a data set.")] = "train",
    max_image_size: MaxImageSize = None,
    split_image: Annotated[
        bool | None, typer.Option("--split-image/--no-split-image", help="Split images into tiles.")
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Frames of a clip if the row does not set them.")] = 8,
    timestamps: Annotated[bool, typer.Option(help="Write [MM:SS] before each frame.")] = True,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads; default: one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    revision: Revision = None,
) -> None:
    """Read every row and all media as training would. Exit code 1 if any row cannot be used."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from aria.config import AriaConfig
    from aria.hub import NANO, model_name
    from aria.media.limits import available_cores
    from aria.processor import AriaProcessor
    from aria.train.data import DataSettings
    from aria.train.data.check import check_data
    from aria.train.settings import build

    settings = build(
        DataSettings,
        {
            "paths": paths,
            "max_length": max_length,
            "max_crops": max_crops,
            "too_long": too_long,
            "labels": labels,
            "split": split,
            "max_image_size": max_image_size,
            "split_image": split_image,
            "num_frames": num_frames,
            "timestamps": timestamps,
            "workers": available_cores() if workers is None else workers,
        },
    )
    config = AriaConfig.from_pretrained(model or NANO, revision=revision)
    processor = AriaProcessor.from_pretrained(model, revision=revision)
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        found = check_data(
            settings,
            processor,
            config,
            tokens=tokens,
            progress=lambda done, rows: bar.update(task, completed=done, total=rows),
        )
    if as_json:
        json.dump({"model": model_name(model), **found.to_dict()}, sys.stdout, ensure_ascii=False, indent=2)
        sys.stdout.write("\n")
    else:
        _show(found, model_name(model), per_step)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Any, model: str, per_step: int) -> None:
    """Print tables of problems and sizes, and the size of an epoch."""
    from rich.markup import escape
    from rich.table import Table

    rows = sum(found.rows.values())
    out.print(
        f"{rows:,} rows in {len(found.rows)} data sets, {found.usable:,} usable; tokens as {escape(model)} has them"
    )
    problems = [(kind, len(places), places[:_FIRST]) for kind, places in found.problems.items()]
    notes = [(kind, tally.count, tally.examples) for kind, tally in found.notes.items()]
    for title, kinds in (("problems", problems), ("notes", notes)):
        if kinds:
            table = Table(title, "rows", "first of them", title_justify="left")
            for kind, count, places in sorted(kinds, key=lambda one: -one[1]):
                table.add_row(escape(kind), f"{count:,}", escape("\n".join(places)))
            out.print(table)
    if any(count > len(places) for _, count, places in problems):
        out.print("--json names all rows that have a problem")
    if not found.sizes:
        return
    distribution = found.distribution()
    table = Table("of a sequence", "mean", "least", "median", "90 %", "99 %", "most")
    for name, spread in distribution.items():
        mean, *points = spread.values()
        table.add_row(name, f"{mean:,.1f}", *(f"{point:,.0f}" for point in points))
    out.print(table)
    histogram = found.histogram()
    most = max(count for _, count in histogram)
    for bound, count in histogram:
        out.print(f"{bound:>9,} tokens or less {'#' * round(_BAR * count / most):<{_BAR}} {count:,}", highlight=False)
    steps = -(-found.batches // per_step)
    out.print(
        f"an epoch: {len(found.sizes):,} sequences, {found.tokens:,} tokens, "
        f"{sum(size.num_crops for size in found.sizes):,} crops; {found.batches:,} batches of {found.batch_tokens:,} "
        f"tokens, {found.efficiency:.1%} full; {steps:,} steps"
    )
