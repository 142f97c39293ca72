"""`ServerSettings`: names, keys and limits of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Annotated

from aria.media.limits import MediaSettings
from aria.settings import Setting, check_ranges

_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Names, keys and limits of a server. ``aria serve`` has an option for each field that names one.

    Raises:
        ValueError: A value is out of its range.
    """

    model_names: tuple[str, ...] = ("aria-nano",)
    """Names that requests may use for the model; responses carry the first."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route that runs the model. Empty: no key is required."""
    cors_origins: Annotated[
        tuple[str, ...],
        Setting(help="Origin whose pages may call the server; repeatable, * allows any.", option="--cors-origin"),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Setting(
            help="Host name that clients may use for the server, such as aria.example or *.example; repeatable, "
            "* allows any. Default: any if keys are set, otherwise localhost, --host and IP addresses.",
            option="--allowed-hosts",
        ),
    ] = ()
    """Compared with the header ``Host``. Loopback names and IP addresses are always allowed. Without keys no other name
    is, since a page of another site can point its own name at this server (DNS rebinding)."""
    trusted_proxies: Annotated[
        tuple[str, ...],
        Setting(
            help="Address or network of a reverse proxy whose X-Forwarded-For is trusted; repeatable.",
            option="--trusted-proxies",
        ),
    ] = ()
    """Their ``X-Forwarded-Proto`` is trusted as well."""
    max_connections: Annotated[
        int, Setting(help="Maximum number of open connections.", option="--max-connections", minimum=1)
    ] = 2048
    """At the limit, the connection that has been idle longest is closed for a new one."""
    max_connections_per_address: Annotated[
        int,
        Setting(
            help="Maximum number of open connections per client address.",
            option="--max-connections-per-address",
            minimum=1,
        ),
    ] = 512
    """One /64 network of IPv6 counts as one address; connections of trusted proxies are not limited."""
    max_header_bytes: Annotated[
        int,
        Setting(
            help="Maximum size of a request's headers.", option="--max-header-bytes", unit="bytes", minimum=1 << 10
        ),
    ] = 32 << 10
    """The first line counts as well."""
    header_seconds: Annotated[
        float,
        Setting(help="Time limit for receiving request headers.", option="--header-seconds", unit="seconds", above=0),
    ] = 10.0
    body_seconds: Annotated[
        float,
        Setting(help="Time limit for receiving a request body.", option="--body-seconds", unit="seconds", above=0),
    ] = 300.0
    idle_seconds: Annotated[
        float,
        Setting(help="Idle time after which a connection is closed.", option="--idle-seconds", unit="seconds", above=0),
    ] = 75.0
    """Load balancers keep idle connections for 60 s, and the server should not be the first to close."""
    write_seconds: Annotated[
        float,
        Setting(
            help="Time for a client to read buffered output before its connection is closed.",
            option="--write-seconds",
            unit="seconds",
            above=0,
        ),
    ] = 60.0
    """Up to 64 KiB are buffered."""
    request_seconds: Annotated[
        float | None,
        Setting(
            help="Time limit for a whole request; inf disables it.",
            option="--request-seconds",
            unit="seconds",
            above=0,
        ),
    ] = 3600.0
    """From the headers to the last byte of the response. None: no limit."""
    held_body_bytes: Annotated[
        int,
        Setting(help="Memory for all request bodies together.", option="--held-body-bytes", unit="bytes", minimum=1),
    ] = 1 << 30
    """Counted from a body's first byte to the end of its request; one client may hold half of it. A body that does not
    fit waits for a moment and is then refused with status 503."""
    max_body: Annotated[
        int,
        Setting(help="Maximum size of a request body, media included.", option="--max-body", unit="bytes", minimum=1),
    ] = 256 << 20
    """Media in data: URIs take a third more than their files."""
    max_media: Annotated[
        int,
        Setting(help="Maximum number of images, videos and documents per request.", option="--max-media", minimum=0),
    ] = 512
    max_queue: Annotated[
        int,
        Setting(
            help="Maximum number of waiting requests; further requests get 503 with Retry-After.",
            option="--max-queue",
            minimum=0,
        ),
    ] = 256
    max_concurrency_per_key: Annotated[
        int | None,
        Setting(
            help="Maximum number of concurrent requests per API key; default: unlimited.",
            option="--max-concurrency-per-key",
            minimum=1,
        ),
    ] = None
    """Per client address if no keys are set."""
    max_choices: Annotated[int, Setting(help="Maximum number of prompts times ``n`` in one request.", minimum=1)] = 128
    media: MediaSettings = field(default_factory=MediaSettings.untrusted)
    """Limits and permissions for images, videos and documents of requests."""
    media_threads: Annotated[
        int,
        Setting(
            help="Maximum number of requests whose media are fetched and read at a time.",
            option="--media-threads",
            minimum=1,
        ),
    ] = 64
    """``media.workers`` of them decode."""
    allow_adapter_updates: Annotated[
        bool,
        Setting(
            help="Let clients load and unload adapters, from any folder or the Hub.", option="--allow-adapter-updates"
        ),
    ] = False
    named_media_bytes: Annotated[
        int,
        Setting(
            help="Memory for media that requests reference by uuid.",
            option="--named-media-bytes",
            unit="bytes",
            minimum=0,
        ),
    ] = 1 << 30
    temperature: Annotated[
        float | None,
        Setting(
            help="Temperature of requests that set none; default: generation_config.json, else 1.",
            option="--default-temperature",
            minimum=0,
            maximum=2,
        ),
    ] = None
    """vLLM takes it from ``generation_config.json`` as well; 1 is OpenAI's default."""
    step_seconds: Annotated[
        float | None,
        Setting(
            help="Time limit for one step of the model; /health returns 503 while a step exceeds it. "
            "Default: 120, or 4 for small models on a CPU.",
            option="--step-seconds",
            unit="seconds",
            above=0,
        ),
    ] = None
    """First steps compile kernels for up to a minute without warm-up, and steps of large models on a CPU may take
    longer. ``float("inf")``: no limit."""
    drain_seconds: Annotated[
        float,
        Setting(
            help="Time for running requests to finish after a shutdown signal.",
            option="--drain-seconds",
            unit="seconds",
            minimum=0,
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.model_names:
            raise ValueError("model_names is empty; a model needs a name")
        if not all(self.api_keys):
            raise ValueError("an API key is empty; give every key at least one character")
        for proxy in self.trusted_proxies:
            try:
                ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f"trusted_proxies has {proxy!r}; expected an address or a network such as 10.0.0.0/8"
                ) from None
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"allowed_hosts has {host!r}; expected a name without scheme and port, such as aria.example, "
                    "*.example or *"
                )
