"""Pixels and memory are reserved before decoding, and files are opened once."""

from __future__ import annotations

import base64
import gc
import io
import os
import socket
import struct
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aria.media import cache as media_cache
from aria.media import document, open, read, rgb, video
from aria.media.budgets import RECEIVED_MEMORY, MemoryBudget, PixelBudget
from aria.media.cache import MediaCache
from aria.media.fetch import fetch
from aria.media.limits import MediaSettings
from aria.media.open import OpenedMedia, open_media
from aria.media.read import Page, ScaledImage, read_clip, read_document, read_image
from aria.processor import AriaImageProcessor, load_image
from aria.processor.image import NeededSizes
from aria.processor.image_inputs import read_image_inputs
from aria.workers import BusyError, NotReady
from tests.helpers.made_media import clip, pdf
from tests.helpers.media_site import site
from tests.hostile.bad_drawings import nested_forms

WORKERS = [0, 1]
"""Decode in this process, and in a worker process."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def icon(image: bytes) -> bytes:
    """An icon whose directory says 16 x 16 pixels, with another image."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 22) + image


# The same in a worker


@pytest.mark.parametrize("workers", WORKERS)
def test_every_kind_of_media_is_read_the_same_in_process_and_in_a_worker(workers: int, tmp_path: Path) -> None:
    settings = MediaSettings(workers=workers)
    picture = noise(60, 40)
    (tmp_path / "a.png").write_bytes(encoded(picture))
    for source in (encoded(picture), tmp_path / "a.png"):
        assert np.array_equal(np.asarray(load_image(source, settings)), np.asarray(picture))
    here = MediaSettings()
    pages, expected = (
        read_document(open_media(pdf((200, 100), (100, 200), text="Hello"), "document", one), settings=one)
        for one in (settings, here)
    )
    assert [page.number for page in pages] == [1, 2] and pages[0].total == 2
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(pages, expected, strict=True))
    frames, wanted = (
        read_clip(open_media(clip(20), "video", one), num_frames=4, settings=one) for one in (settings, here)
    )
    assert [frame.seconds for frame in frames] == [frame.seconds for frame in wanted]
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(frames, wanted, strict=True))


@pytest.mark.parametrize("workers", WORKERS)
def test_errors_are_the_same_in_process_and_in_a_worker(workers: int) -> None:
    settings = MediaSettings(workers=workers)
    for kind, function in (("image", load_image), ("document", read_document), ("video", read_clip)):
        medium = b"nothing" if kind == "image" else open_media(b"nothing", kind, settings)
        asked: dict[str, Any] = {"num_frames": 1} if kind == "video" else {}
        with pytest.raises(ValueError, match="7 bytes"):
            function(medium, settings=settings, **asked)  # type: ignore[operator]


# Pixels


def test_pixels_of_pages_are_counted_before_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "_render", lambda *_: pytest.fail("a page was drawn"))
    large = open_media(pdf(*[(2999, 2999)] * 64), "document", MediaSettings())
    with pytest.raises(ValueError, match="more than the 400,000,000 pixels allowed in total"):
        read_document(large, spend=PixelBudget(400_000_000).spend)
    mixed = open_media(pdf((100, 100), (100_000, 100_000)), "document", MediaSettings())
    with pytest.raises(ValueError, match=r"page 2 of .* would be 200000 x 200000 pixels"):
        read_document(mixed)


def test_pixels_of_frames_are_counted_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "decode", lambda *_, **__: pytest.fail("a frame was decoded"))
    with pytest.raises(ValueError, match="more than the 100,000 pixels"):
        read_clip(open_media(clip(20), "video", MediaSettings()), num_frames=20, spend=PixelBudget(100_000).spend)


def test_pixels_of_images_are_counted_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "upright_rgb", lambda *_: pytest.fail("a picture was decoded"))
    with pytest.raises(ValueError, match="more than the 2,000 pixels"):
        load_image(encoded(noise(60, 40)), MediaSettings(), PixelBudget(2_000))


def test_images_of_an_icon_are_counted() -> None:
    """Pillow decodes one of them to get the size of the icon."""
    bomb = icon(encoded(Image.new("1", (13_000, 13_000))))
    with pytest.raises(ValueError, match="declares 13000 x 13000 pixels, more than the 120,000,000"):
        load_image(bomb)
    with pytest.raises(ValueError, match="more than the 2,000 pixels"):
        load_image(icon(encoded(noise(60, 40))), MediaSettings(), PixelBudget(2_000))
    assert load_image(icon(encoded(noise(60, 40)))).size == (60, 40)
    assert load_image(encoded(noise(32, 32), "ICO", sizes=[(32, 32)], bitmap_format="bmp")).size == (32, 32)


# Memory


@pytest.mark.slow
def test_a_budget_lets_small_requests_pass_waiting_large_ones() -> None:
    budget = MemoryBudget()
    budget.reserve(600, 1000)
    with pytest.raises(NotReady):
        budget.reserve(200, 1000)
    budget.reserve(50, 1000)
    with pytest.raises(ValueError, match="would take 1,001 bytes of memory, but 1,000 are allowed"):
        budget.reserve(1001, 1000)
    budget.release(600)
    budget.reserve(700, 1000)
    budget.reserve(10_000, None)
    assert budget.reserved == 50 + 700 + 10_000
    array = np.zeros(700, np.uint8)
    budget.track(array)
    view = array[3:]
    del array
    gc.collect()
    assert budget.reserved == 10_750 and view.size == 697
    del view
    gc.collect()
    assert budget.reserved == 10_050


def test_a_request_for_the_whole_budget_is_granted_alone() -> None:
    budget = MemoryBudget()
    budget.reserve(1000, 1000)
    with pytest.raises(NotReady):
        budget.reserve(1, 1000)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> MemoryBudget:
    """A separate budget: other memory of the process may be released at any moment."""
    budget = MemoryBudget()
    monkeypatch.setattr(read, "DECODE_MEMORY", budget)
    monkeypatch.setattr(media_cache, "DECODE_MEMORY", budget)
    return budget


@pytest.mark.parametrize("workers", WORKERS)
def test_memory_is_released_after_success_and_errors(workers: int, decoded: MemoryBudget) -> None:
    settings = MediaSettings(workers=workers, decoded_bytes=1 << 30)
    image = read_image(open_media(encoded(noise(60, 40)), "image", settings), settings, lambda _: None)
    assert decoded.reserved == 60 * 40 * 3
    del image
    gc.collect()
    cut = encoded(noise(60, 40))[:2000]
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_image(open_media(cut, "image", settings), settings, lambda _: None)
    with pytest.raises(ValueError, match="no more"):
        read_image(open_media(encoded(noise(60, 40)), "image", settings), settings, refuse)
    with pytest.raises(ValueError, match="bytes of memory, but 1,000 are allowed"):
        load_image(encoded(noise(60, 40)), MediaSettings(workers=workers, decoded_bytes=1000))
    assert not decoded.reserved


def refuse(pixels: int) -> None:
    raise ValueError("no more")


@pytest.mark.slow
def test_media_that_do_not_fit_wait(decoded: MemoryBudget) -> None:
    settings = MediaSettings(workers=2, decoded_bytes=1 << 20, image_timeout=60)
    picture = encoded(noise(200, 150))
    decoded.reserve(900_000, None)
    done: list[int] = []

    def load() -> None:
        load_image(picture, settings)
        done.append(decoded.reserved)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(0.5)
    assert not done
    decoded.release(900_000)
    thread.join(30)
    assert done and decoded.reserved <= 200 * 150 * 3
    decoded.reserve(900_000, None)
    with pytest.raises(BusyError, match="try again later"):
        load_image(picture, MediaSettings(workers=2, decoded_bytes=settings.decoded_bytes, image_timeout=0.5))
    decoded.release(900_000)


def test_caches_are_evicted_when_memory_is_short(decoded: MemoryBudget) -> None:
    cache = MediaCache()
    pages = [Page(1, ScaledImage.from_array(np.zeros((100, 100, 3), np.uint8)), 1)]
    cache.get("a", lambda: pages, 1 << 20)
    cache.free(1)
    assert cache.nbytes == 0
    cache.get("a", lambda: pages, 1 << 20)
    decoded.reserve(1000, None)
    with pytest.raises(NotReady):
        decoded.reserve(100, decoded.reserved + 10)
    decoded.release(1000)
    assert cache.nbytes == 0, "asked for memory, a cache gives back what it has"


# Sizes


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("mode", [None, "authors", "pad"])
def test_large_images_are_resized_while_they_are_read(workers: int, mode: str | None) -> None:
    process = AriaImageProcessor(max_image_size=490)
    own = {"max_image_size": 490, "split_image": mode is not None, "split_mode": mode}
    picture = noise(3000, 2000)
    [image] = read_image_inputs([encoded(picture)], process, [own], MediaSettings(workers=workers))
    [whole] = read_image_inputs([picture], process, [own])
    assert sum(page.nbytes for page in image.pages) < 3000 * 2000 * 3 / 2
    crops, expected = image.load(), whole.load()
    assert crops.extents == expected.extents and crops.pixels.equal(expected.pixels)


def test_small_images_keep_their_size() -> None:
    process = AriaImageProcessor()
    assert NeededSizes(process)(300, 200) == [] and NeededSizes(process, split_image=True)(1500, 1000) == []
    assert NeededSizes(process)(1500, 1000) == [(980, 653)]
    turned = Image.Exif()
    turned[0x0112] = 6
    [image] = read_image_inputs([encoded(noise(2000, 1000), "JPEG", exif=turned)], process, [{}])
    assert image.pages[0].shape == (980, 490, 3), "the size counts as it is seen"


def test_split_frames_and_pages_are_resized_too() -> None:
    sizes = NeededSizes(AriaImageProcessor(max_image_size=490, sizes=(490,)), split_image=True)
    [page] = read_document(open_media(pdf((1000, 1000)), "document", MediaSettings()), sizes=sizes)
    assert page.image.size == (2000, 2000)
    assert [array.shape[:2] for array in page.image.arrays] == [(height, width) for width, height in sizes(2000, 2000)]


# Deadlines


def test_an_endless_document_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MediaSettings(workers=1, decode_timeout=1.0)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="took longer than 1 s"):
        read_document(open_media(nested_forms(Random(0), 9, 10), "document", settings), settings=settings)
    assert time.monotonic() - begin < 20 and read.shared_workers(settings).busy == 0


# Opening


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_file_that_is_swapped_for_a_link_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    (allowed / "inner").mkdir(parents=True)
    secret.mkdir()
    for folder in (allowed, allowed / "inner", secret):
        (folder / "a.png").write_bytes(encoded(noise(4, 4)))
    settings = MediaSettings(local_folders=(allowed,))
    check = open._check_path

    def swap_file(*given: Any) -> Path:
        path = check(*given)
        path.unlink()
        path.symlink_to(secret / "a.png")
        return path

    def swap_folder(*given: Any) -> Path:
        path = check(*given)
        path.parent.rename(tmp_path / "moved")
        path.parent.symlink_to(secret)
        return path

    for swap, path in ((swap_file, allowed / "a.png"), (swap_folder, allowed / "inner" / "a.png")):
        monkeypatch.setattr(open, "_check_path", check)
        assert open_media(path, "image", settings).data == path
        monkeypatch.setattr(open, "_check_path", swap)
        with pytest.raises(ValueError, match="cannot be opened"):
            open_media(path, "image", settings)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_file_that_is_swapped_for_a_pipe_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(4, 4)))
    check = open._check_path

    def swap(*given: Any) -> Path:
        found = check(*given)
        found.unlink()
        os.mkfifo(found)
        return found

    monkeypatch.setattr(open, "_check_path", swap)
    with pytest.raises(ValueError, match="a folder or a device"):
        open_media(path, "image", MediaSettings())


def test_an_opened_file_is_read_even_if_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(60, 40)))
    opened = open_media(path, "image", MediaSettings())
    (tmp_path / "b").write_bytes(b"other")
    (tmp_path / "b").replace(path)
    assert read_image(opened, MediaSettings(workers=1), lambda _: None).size == (60, 40)


# Files in memory


def test_received_bytes_are_reserved_until_released(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(60, 40))
    uri = "data:;base64," + base64.b64encode(data).decode()
    settings = MediaSettings(decoded_bytes=RECEIVED_MEMORY.reserved + 4 * len(data), image_timeout=0.2)
    before = RECEIVED_MEMORY.reserved
    opened = open_media(uri, "image", settings)
    assert 0 <= RECEIVED_MEMORY.reserved - before - len(data) < 100
    RECEIVED_MEMORY.reserve(3 * len(data), None)
    with pytest.raises(BusyError, match="waiting to be read"):
        open_media(uri, "image", settings)
    RECEIVED_MEMORY.release(3 * len(data))
    with pytest.raises(ValueError, match="not valid base64"):
        open_media(uri + "!", "image", settings)
    del opened
    gc.collect()
    assert RECEIVED_MEMORY.reserved == before


def test_fetched_bytes_are_reserved_as_they_arrive() -> None:
    before, held = RECEIVED_MEMORY.reserved, []

    def hold(nbytes: int) -> None:
        held.append(nbytes)
        if len(held) == 3:
            raise ValueError("enough")

    with site(lambda _: (200, {}, bytes(5 << 20))) as address:
        settings = MediaSettings(private_addresses=True)
        with pytest.raises(ValueError, match="enough"):
            fetch(f"{address}/large", 1 << 30, settings, hold)
        opened = open_media(f"{address}/large", "image", settings)
        assert RECEIVED_MEMORY.reserved - before == 5 << 20
    del opened
    gc.collect()
    assert RECEIVED_MEMORY.reserved == before


def test_slow_name_resolution_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="does not respond in time"):
        fetch("http://slow.example/", 1000, MediaSettings(connect_timeout=0.3))
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    "answer",
    [None, {}, {"size": 1}, {"size": [0, 4]}, {"size": [1.5, 4]}, {"size": ["a", "b"]}, {"size": [1 << 40, 1]}],
)
def test_invalid_results_of_a_worker_are_rejected(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A worker may be compromised by the file that it reads."""

    def lie(job: Any, *_: Any) -> Any:
        job.array((4, 4, 3))
        return answer

    monkeypatch.setattr(rgb, "read", lie)
    with pytest.raises(ValueError, match="the file may be damaged"):
        load_image(b"x")
    monkeypatch.setattr(rgb, "read", lambda job, *_: job.array((4, 4)) is None or {"size": [4, 4]})
    with pytest.raises(ValueError, match="the file may be damaged"):
        load_image(b"x")
    for arguments in ((0, 4), (True, 4), ("4", 4), (4,), (4, 4, 4), (1 << 30, 4)):
        monkeypatch.setattr(rgb, "read", lambda job, *_, arguments=arguments: job.call("sizes", *arguments))
        with pytest.raises(ValueError, match="expected two numbers from 1"):
            load_image(b"x")
    for arguments in ((-1, 4), (4, 0.5), (None, 4)):
        monkeypatch.setattr(rgb, "read", lambda job, *_, arguments=arguments: job.call("take", *arguments))
        with pytest.raises(ValueError, match="expected pixel and byte counts"):
            load_image(b"x")


@pytest.mark.parametrize("moments", [(0, None), (0, "1"), (0.5,), ([0],)], ids=["none", "text", "fraction", "list"])
def test_invalid_times_from_a_worker_are_rejected(monkeypatch: pytest.MonkeyPatch, moments: Any) -> None:
    def lie(job: Any, *_: Any) -> Any:
        for _ in moments:
            job.array((4, 4, 3))
        return {"frames": [(moment, 0, 1, 4, 4, 1) for moment in moments]}

    monkeypatch.setattr(video, "read", lie)
    with pytest.raises(ValueError, match="the file may be damaged"):
        read_clip(OpenedMedia(b"x", "the clip"), num_frames=2, settings=MediaSettings(clip_decoder="cpu"))


@pytest.mark.parametrize(
    "plan",
    [
        None, [(4, 3), 0, (1, 0), False, None, [], []], [(4, 3), 0, (1, "2"), False, None, [], []],
        [(4, 3), 0, (1, 2), False, None, [(0, None)], []], [(4, 3), 0, (1, 2), False, None, [], [("a", [], [])]],
    ],
    ids=["nothing", "unit of zero", "unit of text", "no time", "key of text"],
)  # fmt: skip
def test_an_invalid_plan_from_a_worker_is_rejected(plan: Any) -> None:
    with pytest.raises(ValueError, match="the file may be damaged"):
        read._parse_plan(plan, "the clip")
