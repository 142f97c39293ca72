"""`Traffic`: the requests that do work, and what they hold, until all that they caused has ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from ipaddress import IPv6Address, ip_address
from typing import Any, TypeVar

from aria.serve.errors import ApiError, overloaded
from aria.serve.settings import ServerSettings

T = TypeVar("T")

ROOM_SECONDS = 2.0
"""That a body waits for memory which others hold."""


class Traffic:
    """Counts requests that do work. All of it happens on one event loop.

    Args:
        places: requests that may do work at a time.
        settings: what one client may do, and how much memory bodies may hold.

    Attributes:
        places: see above.
        draining: whether the server is about to end: new work is refused.
        held_bytes: memory of all bodies.
    """

    def __init__(self, places: int, settings: ServerSettings):
        self.places = places
        self.draining = False
        self._settings = settings
        self._works: set[Work] = set()
        self._active: set[Work] = set()
        self._by_client: Counter[bytes] = Counter()
        self._held: Counter[bytes] = Counter()
        self.held_bytes = 0
        self._freed = asyncio.Event()

    @property
    def running(self) -> int:
        """Requests that have a place, also those whose client has left while a thread of theirs is still at work."""
        return sum(work.placed for work in self._works)

    @property
    def active(self) -> int:
        """Requests that somebody still waits for."""
        return len(self._active)

    @contextlib.contextmanager
    def work(self, client: bytes) -> Iterator[Work]:
        """One request of a client, from its headers on.

        Raises:
            ApiError: 503, the server is about to end; 429, the client has too many.
        """
        self.check_open()
        most = self._settings.max_concurrency_per_key
        if most is not None and self._by_client[client] >= most:
            raise overloaded(f"{most} requests at a time are allowed; wait for one of yours", status=429)
        self.check_places()
        work = Work(self, client)
        token = _current.set(work)
        self._works.add(work)
        self._active.add(work)
        self._by_client[client] += 1
        try:
            yield work
        finally:
            _current.reset(token)
            self._active.discard(work)
            work.release()

    def check_open(self) -> None:
        """Refuse new work of a server that is about to end.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise overloaded("the server is about to end; ask another one", wait=5)

    def check_places(self) -> None:
        """Refuse work that there is no place for.

        Raises:
            ApiError: 503.
        """
        if self.running >= self.places:
            raise overloaded("all places are taken, in the queue too; come again")

    def drain(self) -> None:
        """Refuse new work from now on, and requests whose bodies are not complete."""
        self.draining = True
        for work in list(self._active):
            if not work.placed:
                work.end(overloaded("the server is about to end; ask another one", wait=5))

    def end_all(self, error: ApiError) -> None:
        """End all requests; those that wait for an answer get the error."""
        for work in list(self._active):
            work.end(error)

    def room_for(self, client: bytes, nbytes: int) -> bool:
        """Whether a client's bodies may take so many bytes more."""
        most = self._settings.held_body_bytes
        return self.held_bytes + nbytes <= most and self._held[client] + nbytes <= self.share

    @property
    def share(self) -> int:
        """Bytes that the bodies of one client may hold: half of what all may, or what one body of the largest size
        takes."""
        most = self._settings.held_body_bytes
        return max(most // 2, min(most, 2 * self._settings.max_body))

    def _hold(self, client: bytes, nbytes: int) -> None:
        self.held_bytes += nbytes
        self._held[client] += nbytes
        if nbytes < 0:
            self._freed.set()
        if not self._held[client]:
            del self._held[client]

    def _forget(self, work: Work) -> None:
        self._works.discard(work)
        self._hold(work.client, -work.nbytes)
        self._by_client[work.client] -= 1
        if not self._by_client[work.client]:
            del self._by_client[work.client]


class Work:
    """One request: counted among those of its client until all that it caused has ended, threads included.

    Attributes:
        client: who sent it.
        placed: whether it has one of the places of requests that do work.
        nbytes: memory that its body holds.
        error: what it was ended with.
    """

    def __init__(self, traffic: Traffic, client: bytes):
        self.client = client
        self.placed = False
        self.nbytes = 0
        self.error: ApiError | None = None
        self._traffic = traffic
        self._users = 1
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[None]:
        """A deadline for the block, which :meth:`end` brings forward.

        Raises:
            ApiError: 504, it took longer; or what the work was ended with.
        """
        try:
            async with asyncio.timeout(None if seconds is None or math.isinf(seconds) else seconds) as self._timeout:
                yield
        except TimeoutError:
            if not self.over:
                raise
            raise self.reason from None

    @property
    def over(self) -> bool:
        """Whether it has been ended: what is awaited in the block of :meth:`within` was cancelled for that."""
        return self._timeout is not None and self._timeout.expired()

    @property
    def reason(self) -> ApiError:
        """Why it is over."""
        return self.error or ApiError(
            504, "the request took longer than this server allows (--request-seconds)", code="request_timeout"
        )

    def end(self, error: ApiError) -> None:
        """End it with an error, which its client gets if it still can."""
        if self.error is None and self._timeout is not None and not self.over:
            self.error = error
            with contextlib.suppress(RuntimeError):  # it is leaving the block
                self._timeout.reschedule(asyncio.get_running_loop().time())

    async def hold(self, nbytes: int) -> None:
        """Account for the memory that its body takes now, and wait for others to free some if that is too much.

        Raises:
            ApiError: 413, it is more than there is for all; 503, others did not free enough of it in time.
        """
        more = nbytes - self.nbytes
        if nbytes > self._traffic.share:
            message = (
                f"the body takes {nbytes:,} bytes of memory, and {self._traffic.share:,} are the most of one client"
            )
            raise ApiError(413, message, code="body_too_large")
        if more > 0 and not self._traffic.room_for(self.client, more):
            try:
                async with asyncio.timeout(ROOM_SECONDS):
                    while not self._traffic.room_for(self.client, more):
                        self._traffic._freed.clear()
                        await self._traffic._freed.wait()
            except TimeoutError:
                raise overloaded("other requests' bodies take all the memory that there is for them") from None
        self.nbytes += more
        self._traffic._hold(self.client, more)

    def start(self) -> None:
        """Take a place, now that the body is there.

        Raises:
            ApiError: 503, there is none, or the server is about to end.
        """
        self._traffic.check_open()
        self._traffic.check_places()
        self.placed = True

    def keep(self) -> Callable[[], None]:
        """Count it until the function that is returned has been called, from any thread."""
        self._users += 1
        loop = asyncio.get_running_loop()

        def release() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.release)

        return release

    def release(self) -> None:
        """One that works for it has ended."""
        self._users -= 1
        if not self._users:
            self._traffic._forget(self)


_current: ContextVar[Work | None] = ContextVar("work", default=None)


def current_work() -> Work | None:
    """The request that this task works for; None where it is no request of a server's."""
    return _current.get()


class WorkThreads(ThreadPoolExecutor):
    """Threads whose tasks count as work of the request that they are submitted for, until they have ended."""

    def __init__(self, count: int, name: str):
        super().__init__(count, name)

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future = super().submit(function, *args, **kwargs)
        if (work := current_work()) is not None:
            release = work.keep()
            future.add_done_callback(lambda _: release())
        return future


def client_of(address: str) -> str:
    """Who an address stands for: itself, or its network, where it is one of IPv6: any host has 2^64 of these."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return address
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return f"{IPv6Address(int(ip) >> 64 << 64)}/64" if not ip.is_loopback else address
