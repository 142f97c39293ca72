"""Decoding: transparency, orientation, odd metadata, and the depths of grey that files come in."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_media import NOISE, encoded, pixels

from aria.processor import MediaSettings, load_image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_transparent_pixels_are_composited_on_the_background() -> None:
    red_half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    keyed = encoded(Image.new("RGB", (4, 4), (0, 0, 0)), "PNG", transparency=(0, 0, 0))
    black = np.zeros((4, 4, 4), np.uint8)
    for source in (
        clear,
        *(encoded(clear, kind) for kind in ("PNG", "WEBP", "TIFF", "TGA", "GIF", "ICO", "JPEG2000")),
        grey,
        encoded(grey),
        clear.convert("RGBa"),
        grey.convert("La"),
        encoded(palette, "PNG", transparency=1),
        encoded(palette, "GIF", transparency=1),
        encoded(palette, "PNG", transparency=bytes([255, 0])),
        keyed,
        encoded(Image.new("L", (4, 4), 0), "PNG", transparency=0),
        black,
        black.astype("uint16"),
        black.astype("float32"),
        torch.from_numpy(black).permute(2, 0, 1),
    ):
        assert (pixels(source) == 255).all(), source
        assert (np.asarray(load_image(source, MediaSettings(background="#0000ff"))) == [0, 0, 255]).all()
    assert pixels(red_half)[0, 0].tolist() == [255, 127, 127]
    with pytest.raises(ValueError, match="background is 'snowy'; expected a colour"):
        MediaSettings(background="snowy")


def test_an_orientation_is_applied_beside_metadata_that_cannot_be_rewritten() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = b"H"  # a resolution that is no number, which Pillow reads and cannot write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = encoded(Image.new("RGB", (8, 4)), "JPEG")
    # Pillow does not write such a tag: an undefined value (type 7) stands in the file's own bytes.
    tags = struct.pack("<H", 2) + struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")
    tags += struct.pack("<HHI4s", 0x011A, 7, 1, b"H\0\0\0") + struct.pack("<I", 0)
    block = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + tags
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert load_image(data).size == (4, 8)


@pytest.mark.parametrize("error", [TypeError("odd"), KeyError("odd"), AttributeError("odd"), ZeroDivisionError("odd")])
def test_whatever_a_decoder_raises_is_an_error_about_the_file(error: Exception, monkeypatch: Any) -> None:
    data = encoded(NOISE)

    def fails(self: Any) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    with pytest.raises(ValueError, match=r"cannot be read \(.*odd.*\); the file may be truncated or damaged"):
        load_image(data)


def test_long_texts_and_profiles_in_a_png_are_passed_over() -> None:
    tags = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, 3, 1) + b"\6\0\0\0" + bytes(4)
    exif = f"\nexif\n{len(tags):8}\n{tags.hex()}\n".encode()
    plain = encoded(Image.new("RGB", (8, 4), "red"))
    long = zlib.compress(bytes(2 << 20))
    texts = {
        b"zTXt": b"Comment\0\0" + long,
        b"iTXt": b"Comment\0\1\0en\0\0" + long,
        b"tEXt": b"parameters\0" + b"a" * (2 << 20),
        b"iCCP": b"profile\0\0" + long,
    }
    for name, body in texts.items():
        for place in (33, len(plain) - 12):  # behind the header, and before the end
            data = plain[:place] + png_chunk(name, body) + plain[place:]
            assert (pixels(data) == [255, 0, 0]).all(), name
    # Those that say how the picture is turned are still read.
    turned = plain[:33] + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif)) + plain[33:]
    assert load_image(turned).size == (4, 8)
    assert load_image(turned[:33] + png_chunk(b"zTXt", texts[b"zTXt"]) + turned[33:]).size == (4, 8)


def test_sixteen_bit_tiff_with_white_as_zero() -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    data = bytearray(encoded(Image.fromarray(values), "TIFF"))
    at = bytes(data).index(struct.pack("<HHI", 262, 3, 1))
    assert pixels(bytes(data))[0, :, 0].tolist() == [0, 128, 255]
    data[at + 8] = 0
    assert pixels(bytes(data))[0, :, 0].tolist() == [255, 127, 0]
