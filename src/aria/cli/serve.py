"""``aria serve``: the server and its chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from aria.cli import options
from aria.cli.options import app, err, out
from aria.serve.settings import ServerSettings


@app.command()
@options.with_options(limits=options.Options(ServerSettings, panel="Server"), media=options.ALL_MEDIA)
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub repository; default: packaged nano.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ARIA_API_KEY", help="Key that clients must send; repeatable. Environment: by spaces."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of API keys, one per line.")] = None,
    served_model_name: options.ServedNames = None,
    adapter: options.Adapters = None,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up",
            help="Compile kernels and capture CUDA graphs before serving; takes minutes on a GPU.",
        ),
    ] = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_model_len: Annotated[int | None, typer.Option(help="Maximum number of tokens of prompt and answer.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Maximum number of concurrent sequences.")] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Size of the KV cache in tokens; default: what fits.")
    ] = None,
    memory_utilization: Annotated[float, typer.Option(help="Fraction of GPU memory to use.")] = 0.9,
    access_log: Annotated[
        bool,
        typer.Option("--access-log/--no-access-log", help="Log one line per request, without its contents."),
    ] = True,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug or trace.")] = "info",
    revision: options.Revision = None,
    *,
    limits: dict[str, Any],
    media: dict[str, Any],
) -> None:
    """Serve OpenAI's API and a chat page."""
    try:
        from aria.serve.app import create_app
        from aria.serve.run import run
    except ImportError as error:
        raise ValueError(f"{error}; the server needs more packages: pip install 'aria-moe[serve]'") from error
    from aria.engine import AsyncEngine, Engine
    from aria.hub import model_name
    from aria.media.limits import MediaSettings
    from aria.media.read import shared_workers
    from aria.serve.admission import allows_anonymous_access

    keys = list(api_key or ())
    if api_key_file is not None:
        keys += options.read_keys(api_key_file)
    hosts = list(limits.pop("allowed_hosts"))
    if (hosts or not keys) and host and ":" not in host:  # IP addresses are allowed anyway
        hosts.append(host)
    settings = ServerSettings(
        model_names=tuple(served_model_name or [model_name(model)]),
        api_keys=tuple(keys),
        allowed_hosts=tuple(hosts),
        media=MediaSettings.untrusted(**media),
        **limits,
    )
    adapters = options.read_adapters(adapter or (), taken=settings.model_names)
    if allows_anonymous_access(host, keys):
        err.print(f"[yellow]warning:[/yellow] anybody who reaches {escape(host)} may use this server; set --api-key")
    engine = Engine(
        model, revision=revision, dtype=dtype, device=device, memory_utilization=memory_utilization,
        max_model_len=max_model_len, max_batch=max_batch, cache_tokens=cache_tokens, adapters=adapters,
    )  # fmt: skip
    options.share_work(engine)
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
