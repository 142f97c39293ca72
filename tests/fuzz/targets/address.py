"""Sources of media: data: URIs as Python decodes them, no local file where none is allowed, and only http(s)
addresses are fetched."""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from aria.media import open as opening
from aria.media.limits import MediaSettings

SETTINGS = MediaSettings(image_bytes=2048, local_folders=(Path(__file__).parent / "nothing",))
WORDS = (
    *(
        "data:",
        "image/png",
        ";base64,",
        "; base64",
        ",",
        "%2B",
        "%",
        "==",
        "-_",
        "\n",
        "http://",
        "https://",
        "file://",
    ),
    *("ftp://", "../", "/", "~", "\\\\host\\share", "\0", "C:"),
)


def fuzz(data: bytes) -> None:
    source = data.decode("utf-8", "surrogateescape")
    fetched: list[str] = []

    def fetch(url: str, *_: object) -> bytes:
        fetched.append(url)
        return b"body"

    try:
        # So small that escapes and groups of base64 lie across the ends of pieces.
        with mock.patch.object(opening, "fetch", fetch), mock.patch.object(opening, "_CHUNK", 3 + len(data) % 13):
            opened = opening.open_media(source, "image", SETTINGS)
    except ValueError as error:
        assert len(str(error)) < 2000, "a message as long as the address"
        return
    assert isinstance(opened.data, bytes), f"a file was opened: {opened.data}"
    if fetched:
        assert fetched == [source.strip()]
        assert fetched[0].lower().startswith(("http://", "https://"))
        return
    assert len(opened.data) <= SETTINGS.image_bytes
    expected = _read(source.strip())
    assert expected is None or opened.data == expected


def _read(uri: str) -> bytes | None:
    """The content of a data: URI that is written as the standard says; None for others."""
    header, _, body = uri.partition(",")
    assert header[:5].lower() == "data:", "neither a data: URI nor an address, but it was read"
    if header.endswith(";base64") != ("base64" in header.lower()):
        return None
    try:
        content = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(content, validate=True) if header.endswith(";base64") else content
    except (binascii.Error, UnicodeEncodeError):
        return None


def seeds() -> Iterator[bytes]:
    for content in (b"hello", bytes(range(256))):
        yield b"data:image/png;base64," + base64.b64encode(content)
        yield b"data:;charset=x;base64," + base64.urlsafe_b64encode(content).rstrip(b"=")
        yield b"data:," + urllib.parse.quote_from_bytes(content).encode()
    yield b" HTTPS://example.org/a.png "
    yield b"file:///etc/passwd"
    yield b"../../etc/passwd"
