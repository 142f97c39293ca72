"""`ActiveRequests`: the requests in progress and what they hold, until everything that they started has ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar

from aria.serve.errors import ApiError, overloaded
from aria.serve.settings import ServerSettings

T = TypeVar("T")

MEMORY_WAIT_SECONDS = 2.0
"""How long a request body waits for memory that other bodies hold."""


class ActiveRequests:
    """Admits requests and counts them, within limits on concurrency and memory. Used on one event loop.

    Args:
        capacity: Maximum number of requests that may run or queue.
        settings: Limits per client, and on memory for bodies.

    Attributes:
        capacity: See above.
        draining: Whether the server is shutting down; new requests are refused.
        held_bytes: Memory of all request bodies.
    """

    def __init__(self, capacity: int, settings: ServerSettings):
        self.capacity = capacity
        self.draining = False
        self._settings = settings
        self._requests: set[ActiveRequest] = set()
        self._awaited: set[ActiveRequest] = set()
        self._by_client: Counter[bytes] = Counter()
        self._held: Counter[bytes] = Counter()
        self.held_bytes = 0
        self._freed = asyncio.Event()

    @property
    def running(self) -> int:
        """Number of started requests, including those whose client has left while a thread still works for them."""
        return sum(request.started for request in self._requests)

    @property
    def active(self) -> int:
        """Number of requests whose client is still waiting."""
        return len(self._awaited)

    @contextlib.contextmanager
    def admit(self, client: bytes) -> Iterator[ActiveRequest]:
        """Admit a client's request once its headers have been received.

        Raises:
            ApiError: 503, the server is shutting down or full; 429, the client has too many requests.
        """
        self.check_accepting()
        most = self._settings.max_concurrency_per_key
        if most is not None and self._by_client[client] >= most:
            raise overloaded(f"at most {most} concurrent requests are allowed; wait for one to finish", status=429)
        self.check_capacity()
        request = ActiveRequest(self, client)
        token = _current.set(request)
        self._requests.add(request)
        self._awaited.add(request)
        self._by_client[client] += 1
        try:
            yield request
        finally:
            _current.reset(token)
            self._awaited.discard(request)
            request.release()

    def check_accepting(self) -> None:
        """Refuse new requests during shutdown.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise overloaded("the server is shutting down; use another one", wait=5)

    def check_capacity(self) -> None:
        """Refuse requests beyond the capacity.

        Raises:
            ApiError: 503.
        """
        if self.running >= self.capacity:
            raise overloaded("the queue is full; try again later")

    def drain(self) -> None:
        """Refuse new requests from now on, and those whose bodies are incomplete."""
        self.draining = True
        for request in list(self._awaited):
            if not request.started:
                request.cancel(overloaded("the server is shutting down; use another one", wait=5))

    def cancel_all(self, error: ApiError) -> None:
        """Cancel all requests; clients that are still waiting get the error."""
        for request in list(self._awaited):
            request.cancel(error)

    def fits(self, client: bytes, nbytes: int) -> bool:
        """Whether a client's bodies may take that many more bytes."""
        most = self._settings.held_body_bytes
        return self.held_bytes + nbytes <= most and self._held[client] + nbytes <= self.client_share

    @property
    def client_share(self) -> int:
        """Maximum memory for one client's bodies: half of the total, or what one body of maximum size takes."""
        most = self._settings.held_body_bytes
        return max(most // 2, min(most, 2 * self._settings.max_body))

    async def wait_for_memory(self, client: bytes, nbytes: int) -> None:
        """Wait until a client's bodies may take that many more bytes."""
        while not self.fits(client, nbytes):
            self._freed.clear()
            await self._freed.wait()

    def hold(self, client: bytes, nbytes: int) -> None:
        """Count memory of a client's bodies; negative numbers free it."""
        self.held_bytes += nbytes
        self._held[client] += nbytes
        if nbytes < 0:
            self._freed.set()
        if not self._held[client]:
            del self._held[client]

    def forget(self, request: ActiveRequest) -> None:
        """Stop counting a request, and free its memory."""
        self._requests.discard(request)
        self.hold(request.client, -request.nbytes)
        self._by_client[request.client] -= 1
        if not self._by_client[request.client]:
            del self._by_client[request.client]


class ActiveRequest:
    """A request, counted for its client until everything that it started has ended, threads included.

    Attributes:
        client: Who sent it.
        started: Whether its body is complete and it counts towards the capacity.
        nbytes: Memory that its body holds.
        error: What it was cancelled with.
    """

    def __init__(self, requests: ActiveRequests, client: bytes):
        self.client = client
        self.started = False
        self.nbytes = 0
        self.error: ApiError | None = None
        self._requests = requests
        self._users = 1
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float | None) -> AsyncIterator[None]:
        """A time limit for the block, which :meth:`cancel` brings forward.

        Raises:
            ApiError: 504, the time is over; or what the request was cancelled with.
        """
        try:
            async with asyncio.timeout(None if seconds is None or math.isinf(seconds) else seconds) as self._timeout:
                yield
        except TimeoutError:
            if not self.expired:
                raise
            raise self.reason from None

    @property
    def expired(self) -> bool:
        """Whether the time is over or the request was cancelled; the block of :meth:`deadline` is then cancelled."""
        return self._timeout is not None and self._timeout.expired()

    @property
    def reason(self) -> ApiError:
        """Why it has expired."""
        return self.error or ApiError(
            504, "the request took longer than this server allows (--request-seconds)", code="request_timeout"
        )

    def cancel(self, error: ApiError) -> None:
        """End it with an error, which its client gets if it still can."""
        if self.error is None and self._timeout is not None and not self.expired:
            self.error = error
            with contextlib.suppress(RuntimeError):  # the block is being left
                self._timeout.reschedule(asyncio.get_running_loop().time())

    async def hold(self, nbytes: int) -> None:
        """Account for the memory that its body takes now, and wait for other requests to free some if needed.

        Raises:
            ApiError: 413, it exceeds the client's share; 503, others did not free enough in time.
        """
        more = nbytes - self.nbytes
        share = self._requests.client_share
        if nbytes > share:
            message = f"the body takes {nbytes:,} bytes of memory; at most {share:,} are allowed per client"
            raise ApiError(413, message, code="body_too_large")
        if more > 0 and not self._requests.fits(self.client, more):
            try:
                async with asyncio.timeout(MEMORY_WAIT_SECONDS):
                    await self._requests.wait_for_memory(self.client, more)
            except TimeoutError:
                raise overloaded("the bodies of other requests take all memory that is set aside for them") from None
        self.nbytes += more
        self._requests.hold(self.client, more)

    def start(self) -> None:
        """Count it towards the capacity, now that its body is complete.

        Raises:
            ApiError: 503, the server is full or shutting down.
        """
        self._requests.check_accepting()
        self._requests.check_capacity()
        self.started = True

    def retain(self) -> Callable[[], None]:
        """Count it until the returned function has been called, from any thread."""
        self._users += 1
        loop = asyncio.get_running_loop()

        def release() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.release)

        return release

    def release(self) -> None:
        """One of its users has ended."""
        self._users -= 1
        if not self._users:
            self._requests.forget(self)


_current: ContextVar[ActiveRequest | None] = ContextVar("request", default=None)


def current_request() -> ActiveRequest | None:
    """The request that this task works for, if any."""
    return _current.get()


class RequestThreadPool(ThreadPoolExecutor):
    """A thread pool whose tasks keep the request that submitted them counted until they end."""

    def __init__(self, count: int, name: str):
        super().__init__(count, name)

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future = super().submit(function, *args, **kwargs)
        if (request := current_request()) is not None:
            release = request.retain()
            future.add_done_callback(lambda _: release())
        return future


def client_of(address: str) -> str:
    """The client that an address stands for: the address itself, or its /64 network for IPv6, since a host has 2^64."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, IPv4Address):
        return address
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return f"{IPv6Address(int(ip) >> 64 << 64)}/64" if not ip.is_loopback else address
