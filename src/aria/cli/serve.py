"""``aria serve``: the server and its chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from aria.cli.options import (
    Adapters,
    AllowLocal,
    AllowPrivate,
    Device,
    Dtype,
    MediaWorkers,
    Revision,
    ServedNames,
    app,
    err,
    out,
    read_adapters,
    read_keys,
    share_work,
)


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
    adapter: Adapters = None,
    allow_adapter_updates: Annotated[
        bool,
        typer.Option(
            "--allow-adapter-updates", help="Clients may load and unload adapters, from any folder or the Hub."
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Pages of this origin may call the server; repeatable, * is any.")
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Names that clients may call the server by, such as aria.example or *.example; repeatable, * is any. "
            "Default: with keys any; without, localhost, --host and IP addresses."
        ),
    ] = None,
    trusted_proxies: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a reverse proxy whose X-Forwarded-For is believed; repeatable."),
    ] = None,
    max_connections: Annotated[int, typer.Option(help="Open at a time.")] = 2048,
    max_connections_per_address: Annotated[int, typer.Option(help="Open at a time from one address.")] = 512,
    max_header_bytes: Annotated[int, typer.Option(help="Of a request's headers.")] = 32 << 10,
    header_seconds: Annotated[float, typer.Option(help="For receiving a request's headers.")] = 10.0,
    body_seconds: Annotated[float, typer.Option(help="For receiving a request's body.")] = 300.0,
    idle_seconds: Annotated[float, typer.Option(help="Without a request, before a connection is closed.")] = 75.0,
    write_seconds: Annotated[
        float, typer.Option(help="For a client to read what waits for it, before its connection is closed.")
    ] = 60.0,
    request_seconds: Annotated[float, typer.Option(help="For a request as a whole; inf: no limit.")] = 3600.0,
    held_body_bytes: Annotated[int, typer.Option(help="Memory for the bodies of all requests.")] = 1 << 30,
    max_body: Annotated[int, typer.Option(help="Bytes of a request, media in it included.")] = 256 << 20,
    max_media: Annotated[int, typer.Option(help="Images, clips and documents of a request.")] = 512,
    max_queue: Annotated[int, typer.Option(help="Requests that wait; more are told to come again.")] = 256,
    max_concurrency_per_key: Annotated[int | None, typer.Option(help="Requests of one key at a time.")] = None,
    default_temperature: Annotated[
        float | None, typer.Option(help="Of requests without one; default: generation_config.json, else 1.")
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            help="For one step of the model; /health is a 503 while one takes longer. "
            "Default: 120, or 4 for small models on a CPU."
        ),
    ] = None,
    drain_seconds: Annotated[float, typer.Option(help="For running requests, once told to end.")] = 30.0,
    allow_local: AllowLocal = None,
    allow_private_addresses: AllowPrivate = False,
    max_image_bytes: Annotated[int, typer.Option(help="Of a picture.")] = 64 << 20,
    max_video_bytes: Annotated[int, typer.Option(help="Of a clip.")] = 1 << 30,
    max_document_bytes: Annotated[int, typer.Option(help="Of a PDF.")] = 256 << 20,
    max_clip_seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 4 * 3600.0,
    max_frames: Annotated[int, typer.Option(help="Frames taken of a clip.")] = 256,
    max_pages: Annotated[int, typer.Option(help="Pages taken of a document.")] = 64,
    image_background: Annotated[
        str, typer.Option(help="Color behind transparent pixels, such as white or #202020; none keeps stored colors.")
    ] = "white",
    max_prompt_pixels: Annotated[int, typer.Option(help="Of all that one request shows.")] = 400_000_000,
    fetch_seconds: Annotated[float, typer.Option(help="For fetching a medium from its address.")] = 120.0,
    media_threads: Annotated[int, typer.Option(help="Requests whose media are fetched and read at a time.")] = 64,
    media_workers: MediaWorkers = None,
    worker_bytes: Annotated[int, typer.Option(help="Memory that one such process may take.")] = 3 << 30,
    decoded_bytes: Annotated[int, typer.Option(help="Memory for decoding and its results, in all.")] = 2 << 30,
    image_seconds: Annotated[float, typer.Option(help="For decoding an image.")] = 30.0,
    decode_seconds: Annotated[float, typer.Option(help="For decoding a clip or a document.")] = 120.0,
    named_media_bytes: Annotated[int, typer.Option(help="Memory for media that requests name by a uuid.")] = 1 << 30,
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
    access_log: Annotated[
        bool,
        typer.Option("--access-log/--no-access-log", help="Log a line for each request, without its contents."),
    ] = True,
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
    from aria.media.limits import MediaSettings
    from aria.media.read import shared_workers
    from aria.serve.limits import open_to_strangers
    from aria.serve.settings import ServerSettings

    keys = list(api_key or ())
    if api_key_file is not None:
        keys += read_keys(api_key_file)
    hosts = list(allowed_hosts or ())
    if (hosts or not keys) and host and ":" not in host:  # addresses are allowed anyway
        hosts.append(host)
    settings = ServerSettings(
        model_names=tuple(served_model_name or [model_name(model)]),
        api_keys=tuple(keys),
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(hosts),
        trusted_proxies=tuple(trusted_proxies or ()),
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        max_header_bytes=max_header_bytes,
        header_seconds=header_seconds,
        body_seconds=body_seconds,
        idle_seconds=idle_seconds,
        write_seconds=write_seconds,
        request_seconds=request_seconds,
        held_body_bytes=held_body_bytes,
        max_body=max_body,
        max_media=max_media,
        max_queue=max_queue,
        max_concurrency_per_key=max_concurrency_per_key,
        temperature=default_temperature,
        step_seconds=step_seconds,
        drain_seconds=drain_seconds,
        media_threads=media_threads,
        allow_adapter_updates=allow_adapter_updates,
        named_media_bytes=named_media_bytes,
        media=MediaSettings.untrusted(
            local_folders=tuple(allow_local or ()),
            private_addresses=allow_private_addresses,
            image_bytes=max_image_bytes,
            video_bytes=max_video_bytes,
            document_bytes=max_document_bytes,
            clip_seconds=max_clip_seconds,
            max_frames=max_frames,
            max_pages=max_pages,
            prompt_pixels=max_prompt_pixels,
            background=None if image_background == "none" else image_background,
            total_timeout=fetch_seconds,
            clip_decoder=clip_decoder,
            workers=media_workers,
            worker_bytes=worker_bytes,
            decoded_bytes=decoded_bytes,
            image_timeout=image_seconds,
            decode_timeout=decode_seconds,
        ),
    )
    adapters = read_adapters(adapter or (), taken=settings.model_names)
    if open_to_strangers(host, keys):
        err.print(f"[yellow]warning:[/yellow] anybody who reaches {escape(host)} may use this server; set --api-key")
    engine = Engine(
        model, revision=revision, dtype=dtype, device=device, memory_utilization=memory_utilization,
        max_model_len=max_model_len, max_batch=max_batch, cache_tokens=cache_tokens, adapters=adapters,
    )  # fmt: skip
    share_work(engine)
    workers = shared_workers(settings.media)
    if workers is not None:
        workers.warm_up()
    if warm_up:
        engine.warm_up()

    def ready(address: str) -> None:
        out.print(f"chat at {address}, API at {address}/v1", highlight=False, soft_wrap=True)

    with AsyncEngine(engine=engine) as answering:
        server = create_app(answering, settings)
        run(server, host=host, port=port, log_level=log_level, access_log=access_log, ready=ready)
