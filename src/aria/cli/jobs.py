"""``aria describe`` and ``aria batch``: many answers, one line each, resumable."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from aria.cli import options
from aria.cli.options import app, err


@app.command()
@options.with_options(sampling=options.SAMPLING, media=options.MEDIA_WORKERS)
def describe(
    paths: Annotated[list[str], typer.Argument(metavar="FILE_OR_FOLDER...", help="Images, videos, PDFs, folders.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSONL file; resumes if it exists. Default: stdout.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Default: asks for a description.")] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    schema: options.Schema = None,
    max_image_size: options.MaxImageSize = None,
    split: Annotated[
        bool | None, typer.Option("--split/--no-split", help="Split images into tiles; default: documents only.")
    ] = None,
    num_frames: options.NumFrames = None,
    pages: options.Pages = None,
    at_once: options.AtOnce = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    *,
    sampling: dict[str, Any],
    media: dict[str, Any],
) -> None:
    """Describe images, videos and PDFs as JSON Lines. Rerun to resume."""
    from aria.engine import Engine, SamplingParams
    from aria.hub import model_name
    from aria.jobs import BatchJob, Describer, find_media
    from aria.media.limits import MediaSettings

    files, others = find_media(paths)
    parts = {"max_image_size": max_image_size, "split_image": split, "num_frames": num_frames, "pages": pages}
    settings = {name: value for name, value in parts.items() if value is not None}
    params = SamplingParams(**sampling, json_schema=options.read_schema(schema))
    adapters = options.read_adapters([adapter] if adapter else ())
    name = next(iter(adapters), None)
    weights = {
        "base": _base(model, revision),
        "adapter": None if name is None else _location(adapters[name]),
    }
    describer = Describer(name or model_name(model), params, prompt, settings, name, weights)
    with _output(out_file) as output:
        job = BatchJob(describer, files, output)

        def load() -> Engine:
            engine = Engine(model, revision=revision, dtype=dtype, device=device, adapters=adapters)
            engine.processor.media = MediaSettings(**media)
            if params.json_schema is not None:
                engine.grammars.compile(params.json_schema)  # an unusable schema is not the fault of a file
            return engine

        _run_job(job, "describing", load, at_once, skipped=others)


@app.command()
@options.with_options(media=options.REQUEST_MEDIA)
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="JSONL file of requests in OpenAI's batch format.")],
    responses: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file; resumes if it exists.")],
    model: options.Model = None,
    served_model_name: options.ServedNames = None,
    adapter: options.Adapters = None,
    at_once: options.AtOnce = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    *,
    media: dict[str, Any],
) -> None:
    """Answer a file of requests as the server would, one line each. Rerun to resume."""
    try:
        from aria.serve.batch import BatchFile, find_lines
    except ImportError as error:
        raise ValueError(f"{error}; batches need more packages: pip install 'aria-moe[serve]'") from error
    from aria.engine import Engine
    from aria.hub import model_name
    from aria.jobs import BatchJob, Journal
    from aria.media.limits import MediaSettings
    from aria.serve.settings import ServerSettings

    if responses.exists() and responses.samefile(requests):
        raise ValueError(f"{responses} is the input; name another file for the responses")
    settings = MediaSettings.untrusted(**media)
    lines = find_lines(requests)
    names = tuple(served_model_name or (model_name(model),))
    adapters = options.read_adapters(adapter or (), taken=names)

    def load() -> Engine:
        engine = Engine(model, revision=revision, dtype=dtype, device=device, adapters=adapters)
        engine.processor.media = settings
        return engine

    places = {name: _location(folder) for name, folder in adapters.items()}
    work = BatchFile(
        requests, ServerSettings(model_names=names, media=settings), base=_base(model, revision), adapters=places
    )
    with Journal(responses) as output, contextlib.closing(work):
        _run_job(BatchJob(work, lines, output), "answering", load, at_once)


def _base(model: str | None, revision: str | None) -> str:
    """Path or repository of a model, with its revision."""
    place = "aria-nano" if model is None else _location(model)
    return place if revision is None else f"{place}@{revision}"


def _location(path_or_repo_id: str) -> str:
    """Absolute path of a model or an adapter, or the name of its Hub repository."""
    path = Path(path_or_repo_id).expanduser()
    return str(path.resolve()) if path.exists() else path_or_repo_id


def _output(file: Path | None) -> contextlib.AbstractContextManager[Any]:
    """The output: a file that is resumed, or standard output."""
    from aria.jobs import Journal, RecordStream

    return contextlib.nullcontext(RecordStream(sys.stdout.buffer)) if file is None else Journal(file)


def _run_job(job: Any, title: str, load: Callable[[], Any], at_once: int | None, *, skipped: int = 0) -> None:
    """Run the rest of a job with a progress bar; exit code 1 if any item failed, now or in an earlier run."""
    import asyncio

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from aria.engine import AsyncEngine

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stopped = False
    if job.todo:
        engine = load()
        options.share_work(engine)
        most = at_once or engine.max_batch
        with (
            AsyncEngine(engine=engine) as running,
            Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress,
        ):
            task = progress.add_task(title, total=len(job.todo))
            try:
                asyncio.run(job.run(running, at_once=most, progress=lambda: progress.advance(task)))
            except KeyboardInterrupt:
                stopped = True
    finished = job.counts
    counts = {"done": finished.done, "done before": finished.before, "failed": finished.failed, "skipped": skipped}
    summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "done")
    err.print(f"{summary}; stopped, rerun to resume" if stopped else summary)
    if stopped:
        raise typer.Exit(130)
    if finished.failed:
        raise typer.Exit(1)
