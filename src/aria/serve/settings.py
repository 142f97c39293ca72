"""`ServerSettings`: what whoever runs a server decides about it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network

from aria.processor import MediaSettings

_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server allows, and what it is called.

    Raises:
        ValueError: a value out of its limits.
    """

    model_names: tuple[str, ...] = ("aria-nano",)
    """Names that requests may ask for; the first is the one that answers tell."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route that does work; none: no key is asked for."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser, or ``("*",)``."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that clients may call the server by (the header ``Host``), beside loopback names and IP addresses:
    ``aria.example``, ``*.example``, or ``*`` for any. Empty: no others without keys, since a page of another site can
    make its own name lead here; any with keys."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks of reverse proxies, whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed."""
    max_connections: int = 2048
    """Open at a time; at the limit the one that has been idle longest makes way."""
    max_connections_per_address: int = 512
    """The same for one address (one /64 network of IPv6); those of trusted proxies have no such limit."""
    max_header_bytes: int = 32 << 10
    """Of a request's first line and headers."""
    header_seconds: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_seconds: float = 300.0
    """For the whole body of a request."""
    idle_seconds: float = 75.0
    """Without a request, before a connection is closed. Load balancers keep theirs for a minute, and who closes first
    should not be the server."""
    write_seconds: float = 60.0
    """That a client may take to read what is buffered for it (64 KiB), before its connection is closed."""
    request_seconds: float | None = 3600.0
    """For a request as a whole, from its headers to the last byte of its answer; None: no limit."""
    held_body_bytes: int = 1 << 30
    """Memory for all bodies at a time, from their first bytes to the ends of their requests; one client may have half
    of it. A body beyond it waits for a moment and is then refused with status 503."""
    max_body: int = 256 << 20
    """Bytes of a request's body. Media in data: URIs are part of it, a third larger than the file."""
    max_media: int = 512
    """Images, clips and documents of one request."""
    max_queue: int = 256
    """Requests beyond those that the model answers at a time; more are told to come again."""
    max_concurrency_per_key: int | None = None
    """Requests of one key (of one client's address, where no keys are asked for) at a time; None: any number."""
    max_choices: int = 128
    """Answers that one request may ask for: its prompts times ``n``."""
    media: MediaSettings = field(default_factory=MediaSettings.untrusted)
    """What pictures, clips and documents may cost, and where they may come from; the server's own files, and addresses
    of its network, only where this says so."""
    media_threads: int = 64
    """Requests whose media are fetched and read at a time; ``media.workers`` of them decode."""
    allow_adapter_updates: bool = False
    """Whether clients may load and unload adapters: whoever may do that reads folders of the server and the Hub."""
    named_media_bytes: int = 1 << 30
    """Memory for images and clips that clients name by a uuid, to send it alone in later requests."""
    temperature: float | None = None
    """Of requests that have none. None: what the model's ``generation_config.json`` asks for, as in vLLM, else 1, as in
    OpenAI's interface."""
    step_seconds: float | None = None
    """The longest that a step of the model may take. Beyond it the server counts as unhealthy until the step is over.
    First steps compile kernels for up to a minute where nothing was warmed up; those of large models on CPUs may take
    longer. None: 120, or 4 for small models on a CPU; ``float("inf")``: no limit."""
    drain_seconds: float = 30.0
    """How long running requests may go on after the server was told to end."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_body", 1),
            ("max_queue", 0),
            ("max_choices", 1),
            ("max_media", 0),
            ("max_connections", 1),
            ("max_connections_per_address", 1),
            ("max_header_bytes", 1024),
            ("held_body_bytes", 1),
            ("media_threads", 1),
            ("named_media_bytes", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in (
            "header_seconds",
            "body_seconds",
            "idle_seconds",
            "write_seconds",
            "request_seconds",
            "step_seconds",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if self.max_concurrency_per_key is not None and self.max_concurrency_per_key < 1:
            raise ValueError(f"max_concurrency_per_key is {self.max_concurrency_per_key}; expected at least 1, or None")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}; expected 0 to 2")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; expected 0 or more")
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
