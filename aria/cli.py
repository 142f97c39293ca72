"""The command line: what stands behind ``aria chat``, ``aria serve`` and the other commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="aria",
    help="Aria, the open multimodal mixture-of-experts model. Without --model, the packaged nano model answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

SMALL_MODEL = 100_000_000
"""Active parameters under which one core of a CPU does all the work."""
HELP = (
    "/image FILE      show a picture with the next question\n"
    "/video FILE      a clip\n"
    "/document FILE   a PDF\n"
    "/reset           forget the conversation\n"
    "/quit            leave"
)

Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub repository; default: packaged nano.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.")]
MaxImageSize = Annotated[int | None, typer.Option(help="Side of a crop in pixels; default: the model's.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy, up to 2.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this probability together.")]
TopK = Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
AtOnce = Annotated[
    int | None, typer.Option(min=1, help="Most files or requests in flight; default: what the engine runs together.")
]
ServedNames = Annotated[
    list[str] | None, typer.Option(help="What requests call the model; repeatable. Default: aria-nano, or its folder.")
]
AllowLocal = Annotated[list[Path] | None, typer.Option(help="Folder whose files requests may name; repeatable.")]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private-addresses", help="Requests may fetch from this machine and its network.")
]


def _version(asked: bool) -> None:
    if asked:
        out.print(version("aria-moe"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Options of all commands; :func:`main` takes ``--debug`` out of the arguments wherever it stands."""


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; without one, a conversation starts.")] = None,
    model: Model = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Picture file or address; repeatable.")
    ] = None,
    video: Annotated[list[str] | None, typer.Option(help="Clip, after the pictures; repeatable.")] = None,
    document: Annotated[list[str] | None, typer.Option(help="PDF, after the clips; repeatable.")] = None,
    max_image_size: MaxImageSize = None,
    split: Annotated[bool, typer.Option("--split", help="Cut pictures into tiles, for fine print.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Ask one question about pictures, clips and documents, or hold a conversation."""
    from aria.engine import Engine, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    settings: dict[str, Any] = {"split_image": True} if split else {}
    if max_image_size is not None:
        settings["max_image_size"] = max_image_size
    conversation = _Conversation(system, settings)
    for kind, sources in (("image", image), ("video", video), ("document", document)):
        for source in sources or []:
            conversation.show(kind, source)
    engine = Engine(model, revision=revision, dtype=dtype, device=device)
    _share_work(engine)
    if question is not None:
        _say(conversation.ask(engine, question, params))
        return
    err.print(f"[dim]{escape(HELP)}[/dim]")
    _talk(engine, conversation, params)


@app.command()
def describe(
    paths: Annotated[list[str], typer.Argument(metavar="FILE_OR_FOLDER...", help="Pictures, clips, PDFs, folders.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSONL file; one that is there is gone on with. Default: stdout.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Default: a description of what it is.")] = None,
    model: Model = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", help="File with a JSON schema that every answer follows.")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    max_image_size: MaxImageSize = None,
    split: Annotated[
        bool | None, typer.Option("--split/--no-split", help="Cut pictures into tiles; default: documents only.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip; default: 128.")] = None,
    pages: Annotated[str | None, typer.Option(help="Pages of a document, such as 1-3,7; default: all.")] = None,
    at_once: AtOnce = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Tell of pictures, clips and PDFs, one line of JSON each. Run again, it goes on where it was stopped."""
    from aria.engine import Engine, SamplingParams
    from aria.hub import model_name, read_json
    from aria.jobs import Describer, Job, find_media

    media, others = find_media(paths)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    if schema is not None:
        sampling["json_schema"] = read_json(schema)
    parts = {"max_image_size": max_image_size, "split_image": split, "num_frames": num_frames, "pages": pages}
    settings = {name: value for name, value in parts.items() if value is not None}
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    with _output(out_file) as output:
        job = Job(Describer(model_name(model), params, prompt, settings), media, output)

        def load() -> Engine:
            engine = Engine(model, revision=revision, dtype=dtype, device=device)
            if params.json_schema is not None:
                engine.grammars.compile(params.json_schema)  # a schema that cannot be followed is no file's fault
            return engine

        _run_job(job, "describing", load, at_once, passed_over=others)


@app.command()
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="JSONL file of requests in OpenAI's batch format.")],
    responses: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file; one that is there is gone on with.")],
    model: Model = None,
    served_model_name: ServedNames = None,
    allow_local: AllowLocal = None,
    allow_private_addresses: AllowPrivate = False,
    at_once: AtOnce = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Answer a file of requests as the server would, a line each. Run again, it goes on where it was stopped."""
    try:
        from aria.serve.batch import Batch, find_lines
    except ImportError as error:
        raise ValueError(f"{error}; batches need more packages: pip install 'aria-moe[serve]'") from error
    from aria.engine import Engine
    from aria.hub import model_name
    from aria.jobs import Job, Journal
    from aria.processor.media import MediaSettings
    from aria.serve.settings import ServerSettings

    if responses.exists() and responses.samefile(requests):
        raise ValueError(f"{responses} is the input; name another file for the responses")
    media = MediaSettings(local_folders=tuple(allow_local or ()), private_addresses=allow_private_addresses)
    lines = find_lines(requests)
    names = tuple(served_model_name or (model_name(model),))

    def load() -> Engine:
        engine = Engine(model, revision=revision, dtype=dtype, device=device)
        engine.processor.media = media
        return engine

    with Journal(responses) as output, contextlib.closing(Batch(requests, ServerSettings(model_names=names))) as work:
        _run_job(Job(work, lines, output), "answering", load, at_once)


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub repository; default: packaged nano.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ARIA_API_KEY", help="Asked of every client; repeatable. In the environment: with spaces."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key a line.")] = None,
    served_model_name: ServedNames = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Pages of this origin may call the server; repeatable, * is any.")
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request, media in it included.")] = 256 << 20,
    max_queue: Annotated[int, typer.Option(help="Requests that wait; more are told to come again.")] = 256,
    max_concurrency_per_key: Annotated[int | None, typer.Option(help="Requests of one key at a time.")] = None,
    default_temperature: Annotated[float, typer.Option(help="Where a request says nothing.")] = 1.0,
    drain_seconds: Annotated[float, typer.Option(help="For running requests, once told to end.")] = 30.0,
    allow_local: AllowLocal = None,
    allow_private_addresses: AllowPrivate = False,
    max_image_bytes: Annotated[int, typer.Option(help="Of a picture.")] = 64 << 20,
    max_video_bytes: Annotated[int, typer.Option(help="Of a clip.")] = 1 << 30,
    max_document_bytes: Annotated[int, typer.Option(help="Of a PDF.")] = 256 << 20,
    max_clip_seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 4 * 3600.0,
    max_frames: Annotated[int, typer.Option(help="Frames taken of a clip.")] = 256,
    max_pages: Annotated[int, typer.Option(help="Pages taken of a document.")] = 64,
    max_prompt_pixels: Annotated[int, typer.Option(help="Of all that one request shows.")] = 400_000_000,
    fetch_seconds: Annotated[float, typer.Option(help="For fetching a medium from its address.")] = 120.0,
    media_threads: Annotated[int, typer.Option(help="Requests whose media are read at a time.")] = 8,
    clip_decoder: Annotated[str, typer.Option(help="cpu, cuda:N, or auto: the model's GPU where it can.")] = "auto",
    warm_up: Annotated[
        bool,
        typer.Option("--warm-up/--no-warm-up", help="First do what first requests would wait for: minutes on a GPU."),
    ] = True,
    dtype: Dtype = None,
    device: Device = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most answers that grow together.")] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache holds; default: what fits.")] = None,
    memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug or trace.")] = "info",
    revision: Revision = None,
) -> None:
    """Answer OpenAI's clients, and people at a chat page in their browser."""
    try:
        from aria.serve.app import create_app
        from aria.serve.run import run
    except ImportError as error:
        raise ValueError(f"{error}; the server needs more packages: pip install 'aria-moe[serve]'") from error
    from aria.engine import AsyncEngine, Engine
    from aria.hub import model_name
    from aria.processor.media import MediaSettings
    from aria.serve.limits import open_to_strangers
    from aria.serve.settings import ServerSettings

    keys = list(api_key or ())
    if api_key_file is not None:
        keys += [line.strip() for line in api_key_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    settings = ServerSettings(
        model_names=tuple(served_model_name or [model_name(model)]),
        api_keys=tuple(keys),
        cors_origins=tuple(cors_origin or ()),
        max_body=max_body,
        max_queue=max_queue,
        max_concurrency_per_key=max_concurrency_per_key,
        temperature=default_temperature,
        drain_seconds=drain_seconds,
        media_threads=media_threads,
        media=MediaSettings(
            local_folders=tuple(allow_local or ()),
            private_addresses=allow_private_addresses,
            image_bytes=max_image_bytes,
            video_bytes=max_video_bytes,
            document_bytes=max_document_bytes,
            clip_seconds=max_clip_seconds,
            max_frames=max_frames,
            max_pages=max_pages,
            prompt_pixels=max_prompt_pixels,
            total_timeout=fetch_seconds,
            clip_decoder=clip_decoder,
        ),
    )
    if open_to_strangers(host, keys):
        err.print(f"[yellow]warning:[/yellow] anybody who reaches {escape(host)} may use this server; set --api-key")
    engine = Engine(
        model, revision=revision, dtype=dtype, device=device, memory_utilization=memory_utilization,
        max_model_len=max_model_len, max_batch=max_batch, cache_tokens=cache_tokens,
    )  # fmt: skip
    _share_work(engine)
    if warm_up:
        engine.warm_up()

    def ready(address: str) -> None:
        out.print(f"chat at {address}, API at {address}/v1", highlight=False, soft_wrap=True)

    with AsyncEngine(engine=engine) as answering:
        run(create_app(answering, settings), host=host, port=port, log_level=log_level, ready=ready)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Folder, weights file or Hub repository; default: nano.")] = None,
    revision: Revision = None,
) -> None:
    """Say what a model is: layout, parameters by part, memory, and what fits on this machine."""
    from aria.inspection import report

    report(model, revision=revision, console=out)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, weights file or Hub repository, any layout.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; weights that it holds are replaced.")],
    revision: Revision = None,
) -> None:
    """Rewrite a model of any layout in today's Hub layout, weights a tensor at a time, and what the processor reads."""
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
        task = progress.add_task("converting", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        done = convert_checkpoint(source, target, revision=revision, progress=show)
    out.print(f"{target}: {done.tensors} tensors, {done.layout} layout rewritten as today's Hub layout")
    out.print(f"beside them: {', '.join(done.companions) or 'nothing'}")
    needed = ("tokenizer.model", "preprocessor_config.json")
    if missing := [name for name in needed if not (target / name).is_file()]:
        out.print(f"the processor still needs {' and '.join(missing)}; copy them there")
        return
    from aria.processor import AriaProcessor

    # The files of the original repositories lack what transformers' processor asks for.
    AriaProcessor.from_pretrained(target).save_pretrained(target)
    out.print("the processor's files are complete, also for transformers")


def _output(file: Path | None) -> contextlib.AbstractContextManager[Any]:
    """Where records go: a file that is gone on with, or standard output."""
    from aria.jobs import Journal, Stream

    return contextlib.nullcontext(Stream(sys.stdout.buffer)) if file is None else Journal(file)


def _run_job(job: Any, title: str, load: Callable[[], Any], at_once: int | None, *, passed_over: int = 0) -> None:
    """Do what is left of a job under a progress bar; exit code 1 if any item failed, now or in an earlier run."""
    import asyncio

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from aria.engine import AsyncEngine

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stopped = False
    if job.todo:
        engine = load()
        _share_work(engine)
        most = at_once or engine.core.scheduler.max_rows
        with (
            AsyncEngine(engine=engine) as running,
            Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress,
        ):
            task = progress.add_task(title, total=len(job.todo))
            try:
                asyncio.run(job.run(running, at_once=most, progress=lambda: progress.advance(task)))
            except KeyboardInterrupt:
                stopped = True
    tally = job.tally
    counts = {"done": tally.done, "done before": tally.before, "failed": tally.failed, "passed over": passed_over}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "done")
    err.print(f"{said}; stopped, the same command goes on" if stopped else said)
    if stopped:
        raise typer.Exit(130)
    if tally.failed:
        raise typer.Exit(1)


class _Conversation:
    """Messages so far, and the media that the next question brings."""

    def __init__(self, system: str | None, settings: dict[str, Any]):
        self._settings = settings
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = list(self._start)
        self.media: list[dict[str, Any]] = []

    def show(self, kind: str, source: str) -> None:
        """Read a picture once, now: it may be gone by the next turn, and a wrong one need not wait for the model.

        Clips and documents are fetched now too, but stay where they are if they are files: those may be large.
        """
        from aria.processor import MediaSettings, load_image
        from aria.processor.media import open_medium

        medium = load_image(source) if kind == "image" else open_medium(source, kind, MediaSettings()).data
        self.media.append({"type": kind, kind: medium, **self._settings})

    def ask(self, engine: Any, question: str, params: Any) -> Iterable[str]:
        """The answer, piece by piece. A question that fails leaves the conversation as it was."""
        asked = {"role": "user", "content": [*self.media, {"type": "text", "text": question}]}
        answer = ""
        for piece in engine.stream([*self.messages, asked], params):
            answer += piece
            yield piece
        self.messages += [asked, {"role": "assistant", "content": answer}]
        self.media = []


def _share_work(engine: Any) -> None:
    """On the CPU a small model runs on one core: its steps are over before two have agreed on them.

    Measured on nano, 2 cores: 0.28 s an answer on one; on both 0.3 s at best, 4 s while something else runs.
    """
    import torch

    small = engine.model.config.active_parameters() < SMALL_MODEL
    if engine.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _say(pieces: Iterable[str]) -> None:
    for piece in pieces:
        out.file.write(piece)
        out.file.flush()
    out.file.write("\n")


def _talk(engine: Any, conversation: _Conversation, params: Any) -> None:
    """Questions from the terminal until /quit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history at the prompt, where the platform has it)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            err.print()
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        try:
            if command == "/reset":
                conversation.reset()
            elif command in ("/image", "/video", "/document"):
                _show(conversation, command.removeprefix("/"), rest.strip())
            elif command.startswith("/"):
                err.print(escape(f"unknown command {command}\n{HELP}"))
            else:
                _say(conversation.ask(engine, line, params))
        except KeyboardInterrupt:
            err.print("\n[dim]stopped[/dim]")
        except (ValueError, OSError) as error:
            err.print(f"[red]error:[/red] {escape(str(error))}")


def _show(conversation: _Conversation, kind: str, file: str) -> None:
    if not file:
        raise ValueError(f"which {kind}? /{kind} FILE")
    conversation.show(kind, file)
    err.print(f"[dim]{escape(file)} comes with the next question[/dim]")


def main() -> None:
    """Entry point of ``aria``: an error is one line and exit code 2; ``--debug`` shows where it came from."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="aria")
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        err.print(f"[red]error:[/red] {escape(said)}", soft_wrap=True)
        sys.exit(2)
