"""``aria chat``: one question, or a conversation at the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aria.cli.conversation import Conversation, say, talk
from aria.cli.options import (
    Adapter,
    Device,
    Dtype,
    FrequencyPenalty,
    IgnoreEos,
    MaxImageSize,
    MaxTokens,
    MediaWorkers,
    MinP,
    MinTokens,
    Model,
    NumFrames,
    Pages,
    PresencePenalty,
    RepetitionPenalty,
    Revision,
    Schema,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    app,
    err,
    read_adapters,
    read_schema,
    share_work,
)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; without one, a conversation starts.")] = None,
    model: Model = None,
    adapter: Adapter = None,
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="Image file or address; repeatable.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Clip, after the images; repeatable.")] = None,
    document: Annotated[list[str] | None, typer.Option(help="PDF, after the clips; repeatable.")] = None,
    max_image_size: MaxImageSize = None,
    split: Annotated[bool, typer.Option("--split", help="Split images into tiles, for fine print.")] = False,
    num_frames: NumFrames = None,
    pages: Pages = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    schema: Schema = None,
    max_tokens: MaxTokens = 512,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    media_workers: MediaWorkers = None,
    revision: Revision = None,
) -> None:
    """Ask one question about images, clips and documents, or hold a conversation."""
    from aria.engine import Engine, SamplingParams
    from aria.processor import AriaProcessor, MediaSettings

    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
        stop=stop, ignore_eos=ignore_eos, seed=seed, json_schema=read_schema(schema),
    )  # fmt: skip
    sizes: dict[str, Any] = {"split_image": True} if split else {}
    if max_image_size is not None:
        sizes["max_image_size"] = max_image_size
    settings = {
        "image": sizes,
        "video": sizes if num_frames is None else {**sizes, "num_frames": num_frames},
        "document": sizes if pages is None else {**sizes, "pages": pages},
    }
    adapters = read_adapters([adapter] if adapter else ())
    conversation = Conversation(system, settings, params, next(iter(adapters), None))
    media = MediaSettings(workers=media_workers)
    if image or video or document:
        # Before the weights are read, which may take minutes.
        processor = AriaProcessor.from_pretrained(model, revision=revision)
        processor.media = media
        for kind, sources in (("image", image), ("video", video), ("document", document)):
            for source in sources or []:
                conversation.show(kind, source, processor)
    engine = Engine(model, revision=revision, dtype=dtype, device=device, adapters=adapters)
    engine.processor.media = media
    share_work(engine)
    if question is not None:
        say(conversation.ask(engine, question))
        return
    err.print("[dim]/image FILE shows an image, /help lists all commands, Ctrl-D leaves[/dim]")
    talk(engine, conversation)
