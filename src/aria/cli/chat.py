"""``aria chat``: one question, or a conversation at the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aria.cli import options
from aria.cli.conversation import ChatSession, say, talk
from aria.cli.options import app, err


@app.command()
@options.with_options(sampling=options.SAMPLING, media=options.MEDIA_WORKERS)
def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; without it, a conversation starts.")] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="Image file or URL; repeatable.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video, after the images; repeatable.")] = None,
    document: Annotated[list[str] | None, typer.Option(help="PDF, after the videos; repeatable.")] = None,
    max_image_size: options.MaxImageSize = None,
    split: Annotated[bool, typer.Option("--split", help="Split images into tiles, for fine print.")] = False,
    num_frames: options.NumFrames = None,
    pages: options.Pages = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    schema: options.Schema = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    *,
    sampling: dict[str, Any],
    media: dict[str, Any],
) -> None:
    """Ask one question about images, videos and documents, or hold a conversation."""
    from aria.engine import Engine, SamplingParams
    from aria.processor import AriaProcessor, MediaSettings

    params = SamplingParams(**sampling, json_schema=options.read_schema(schema))
    sizes: dict[str, Any] = {"split_image": True} if split else {}
    if max_image_size is not None:
        sizes["max_image_size"] = max_image_size
    settings = {
        "image": sizes,
        "video": sizes if num_frames is None else {**sizes, "num_frames": num_frames},
        "document": sizes if pages is None else {**sizes, "pages": pages},
    }
    adapters = options.read_adapters([adapter] if adapter else ())
    conversation = ChatSession(system, settings, params, next(iter(adapters), None))
    media_settings = MediaSettings(**media)
    if image or video or document:
        # Before the weights are loaded, which may take minutes.
        processor = AriaProcessor.from_pretrained(model, revision=revision)
        processor.media = media_settings
        for kind, sources in (("image", image), ("video", video), ("document", document)):
            for source in sources or []:
                conversation.show(kind, source, processor)
    engine = Engine(model, revision=revision, dtype=dtype, device=device, adapters=adapters)
    engine.processor.media = media_settings
    options.share_work(engine)
    if question is not None:
        say(conversation.ask(engine, question))
        return
    err.print("[dim]/image FILE shows an image, /help lists all commands, Ctrl-D leaves[/dim]")
    talk(engine, conversation)
