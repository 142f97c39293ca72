"""Work in threads ends when the coroutine that waits for it is cancelled."""

import asyncio
import base64
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from aria.media import container, document
from aria.media.fetch import fetch
from aria.media.open import open_media
from aria.media.read import read_clip, read_document
from aria.processor import AriaImageProcessor, MediaSettings
from aria.processor.image_inputs import read_image_inputs
from aria.serve.settings import ServerSettings
from aria.workers.cancellation import Cancelled, check_cancelled, map_in_context, run_cancellable
from tests.helpers.made_media import clip, endless_page
from tests.helpers.media_site import site
from tests.helpers.serving import PICTURES, idle, running, until

OPEN = MediaSettings(private_addresses=True, connect_timeout=3600, read_timeout=3600, total_timeout=3600)
PATIENCE = 120
"""Seconds after which something counts as hung. The work cancelled here would take an hour."""


def cancelled(work: Callable[[], Any], began: threading.Event) -> BaseException | None:
    """Cancel work once it has begun; returns what its thread raised."""
    ended: list[BaseException] = []

    def watched() -> None:
        try:
            work()
        except BaseException as error:
            ended.append(error)
            raise

    async def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            task = asyncio.create_task(run_cancellable(pool, watched))
            assert await asyncio.to_thread(began.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The only thread is free again.
            await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(pool, lambda: None), PATIENCE)

    asyncio.run(run())
    return ended[0] if ended else None


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na"])
def test_a_download_stops(sent: bytes) -> None:
    began, over = threading.Event(), threading.Event()

    def answer(handler: Any) -> None:
        handler.wfile.write(sent)
        began.set()
        over.wait(PATIENCE)

    with site(answer) as address:
        assert isinstance(cancelled(lambda: fetch(address, 100, OPEN), began), Cancelled)
        over.set()


def test_a_handshake_stops() -> None:
    taken: list[socket.socket] = []
    began = threading.Event()

    def take() -> None:
        taken.append(silent.accept()[0])
        taken[0].recv(1)
        began.set()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=take, daemon=True).start()
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        assert isinstance(cancelled(lambda: fetch(url, 100, OPEN), began), Cancelled)
    taken[0].close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses connections")
def test_connecting_stops() -> None:
    began, clients = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        for _ in range(3):
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            clients[-1].connect_ex(full.getsockname())

        def work() -> None:
            began.set()
            fetch(f"http://127.0.0.1:{full.getsockname()[1]}/", 100, OPEN)

        assert isinstance(cancelled(work, began), Cancelled)
        for client in clients:
            client.close()


def test_rendering_a_page_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    began, draw = threading.Event(), document._draw
    monkeypatch.setattr(document, "_draw", lambda *given: (began.set(), draw(*given)))
    opened = open_media(endless_page(), "document", OPEN)
    settings = MediaSettings(decode_timeout=3600)
    assert isinstance(cancelled(lambda: read_document(opened, None, settings), began), Cancelled)


def test_decoding_a_clip_stops_in_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets repeat endlessly, so that only the cancellation ends the threads."""
    began, packets = threading.Event(), container._packets

    def endless(*given: Any) -> Any:
        if threading.current_thread().name.startswith("decoder"):
            began.set()
            while True:
                given[2].check()
        yield from packets(*given)

    class Named(ThreadPoolExecutor):
        def __init__(self, workers: int):
            super().__init__(workers, thread_name_prefix="decoder")

    monkeypatch.setattr(container, "_packets", endless)
    monkeypatch.setattr("aria.media.video.ThreadPoolExecutor", Named)
    opened = open_media(clip(60, g="10"), "video", OPEN)
    assert isinstance(cancelled(lambda: read_clip(opened, num_frames=6), began), Cancelled)
    assert not any(thread.name.startswith("decoder") for thread in threading.enumerate())


def test_images_stop_between_and_within() -> None:
    began = threading.Event()

    picture = (PICTURES / "word.png").read_bytes()

    def work() -> None:
        began.set()
        while True:
            read_image_inputs([picture, Image.new("RGB", (8, 8))], AriaImageProcessor(), [{}, {}])

    assert isinstance(cancelled(work, began), Cancelled)


def test_threads_of_threads_are_cancelled_too() -> None:
    began = threading.Event()

    def wait(_: int) -> None:
        began.set()
        while True:
            check_cancelled()

    def work() -> None:
        with ThreadPoolExecutor(3) as pool:
            map_in_context(pool, wait, range(3))

    assert isinstance(cancelled(work, began), Cancelled)


def test_finished_and_unawaited_work_is_not_cancelled() -> None:
    check_cancelled()

    async def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            assert await run_cancellable(pool, lambda: 7) == 7
            assert await asyncio.get_running_loop().run_in_executor(pool, check_cancelled) is None

    asyncio.run(run())


def test_client_disconnects_free_the_servers_threads() -> None:
    """As many clients as there are media threads request an endless address and disconnect."""
    arrived, over = threading.Semaphore(0), threading.Event()

    def answer(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        arrived.release()
        over.wait(PATIENCE)

    settings = ServerSettings(media_threads=2, media=OPEN)
    with site(answer) as address, running(settings) as live:
        host, port = live.address.removeprefix("http://").split(":")
        body = (
            b'{"max_tokens": 1, "messages": [{"role": "user", "content": '
            b'[{"type": "image_url", "image_url": {"url": "%s"}}]}]}' % address.encode()
        )
        request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        clients = []
        for _ in range(2):
            client = socket.create_connection((host, int(port)))
            client.sendall(request + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            clients.append(client)
        for _ in clients:
            assert arrived.acquire(timeout=PATIENCE)
        for client in clients:
            client.close()
        url = "data:image/png;base64," + base64.b64encode((PICTURES / "word.png").read_bytes()).decode()
        assert live.chat([{"type": "image_url", "image_url": {"url": url}}], max_tokens=1).choices
        over.set()
        until(idle)
