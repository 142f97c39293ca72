"""``aria inspect``, ``aria convert`` and ``aria merge``: examine and rewrite model files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aria.cli.options import Revision, app, err, out

if TYPE_CHECKING:
    from aria.checkpoint import Converted


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Folder, weights file or Hub repository; default: nano.")] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's layout, parameters by part, memory use, and what fits on this machine."""
    from aria.inspection import inspect_model, report

    found = inspect_model(model, revision=revision)
    if as_json:
        out.print_json(data=found)
    else:
        report(found, out)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, weights file or Hub repository, any layout.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; existing weights are replaced.")],
    revision: Revision = None,
) -> None:
    """Convert a model and its processor from any layout to today's Hub layout, one tensor at a time."""
    done = _rewrite("converting", source, target, revision=revision)
    _print_line(f"{target}: {done.tensors} tensors, {done.layout} layout converted to today's Hub layout")
    _print_line(f"other files: {', '.join(done.companions) or 'none'}")
    _complete(target)


def _print_line(line: str) -> None:
    """Print a line without wrapping or markup, since it contains paths."""
    out.print(line, soft_wrap=True, markup=False, highlight=False)


def _complete(target: Path) -> None:
    """Rewrite the processor's files: those of the original repositories lack entries that transformers needs."""
    needed = ("tokenizer.model", "preprocessor_config.json")
    if missing := [name for name in needed if not (target / name).is_file()]:
        out.print(f"the processor needs {' and '.join(missing)}; copy them there")
        return
    from aria.processor import AriaProcessor

    AriaProcessor.from_pretrained(target).save_pretrained(target)
    out.print("the processor's files are complete, also for transformers")


def _rewrite(
    doing: str, source: str | None, target: Path, *, revision: str | None, adapter: str | None = None
) -> Converted:
    """:func:`aria.checkpoint.convert` with a progress bar."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from aria.checkpoint import convert as convert_checkpoint

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(doing, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return convert_checkpoint(source, target, revision=revision, adapter=adapter, progress=show)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub repository in PEFT's format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; existing weights are replaced.")],
    model: Annotated[
        str | None, typer.Option(help="Base model of the adapter; default: the one that its folder names, else nano.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a model with an adapter merged into its weights, in today's Hub layout, one tensor at a time."""
    from aria.checkpoint.adapter import base_of

    # The revision in the folder belongs to the base model in the folder.
    base, trained_at = (model, None) if model is not None else base_of(adapter)
    done = _rewrite("merging", base, target, revision=revision or trained_at, adapter=adapter)
    _print_line(f"{target}: {done.tensors} tensors of {base or 'nano'} with {adapter} merged")
    _complete(target)
