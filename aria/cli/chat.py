"""``aria chat``: one question, or a conversation at the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.markup import escape

from aria.cli.options import (
    Adapter,
    Device,
    Dtype,
    MaxImageSize,
    MaxTokens,
    Model,
    Revision,
    Seed,
    Temperature,
    TopK,
    TopP,
    app,
    err,
    out,
    read_adapters,
    share_work,
)

HELP = (
    "/image FILE      show a picture with the next question\n"
    "/video FILE      a clip\n"
    "/document FILE   a PDF\n"
    "/reset           forget the conversation\n"
    "/quit            leave"
)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; without one, a conversation starts.")] = None,
    model: Model = None,
    adapter: Adapter = None,
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
    adapters = read_adapters([adapter] if adapter else ())
    conversation = _Conversation(system, settings, next(iter(adapters), None))
    for kind, sources in (("image", image), ("video", video), ("document", document)):
        for source in sources or []:
            conversation.show(kind, source)
    engine = Engine(model, revision=revision, dtype=dtype, device=device, adapters=adapters)
    share_work(engine)
    if question is not None:
        _say(conversation.ask(engine, question, params))
        return
    err.print(f"[dim]{escape(HELP)}[/dim]")
    _talk(engine, conversation, params)


class _Conversation:
    """Messages so far, and the media that the next question brings."""

    def __init__(self, system: str | None, settings: dict[str, Any], adapter: str | None):
        self._settings, self._adapter = settings, adapter
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
        for piece in engine.stream([*self.messages, asked], params, adapter=self._adapter):
            answer += piece
            yield piece
        self.messages += [asked, {"role": "assistant", "content": answer}]
        self.media = []


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
