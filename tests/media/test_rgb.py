"""Decoding images: transparency, orientation, malformed metadata, and bit depths of grey."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aria.processor import MediaSettings, load_image
from tests.helpers.images import NOISE, encoded, pixels


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
    with pytest.raises(ValueError, match="background is 'snowy'; expected a color"):
        MediaSettings(background="snowy")


def test_an_orientation_is_applied_beside_metadata_that_cannot_be_rewritten() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = b"H"  # a resolution that is no number, which Pillow reads and cannot write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = encoded(Image.new("RGB", (8, 4)), "JPEG")
    # Pillow does not write such a tag: an undefined value (type 7), written as raw bytes.
    tags = struct.pack("<H", 2) + struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")
    tags += struct.pack("<HHI4s", 0x011A, 7, 1, b"H\0\0\0") + struct.pack("<I", 0)
    block = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + tags
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert load_image(data).size == (4, 8)


@pytest.mark.parametrize("error", [TypeError("odd"), KeyError("odd"), AttributeError("odd"), ZeroDivisionError("odd")])
def test_decoder_errors_name_the_file(error: Exception, monkeypatch: Any) -> None:
    data = encoded(NOISE)

    def fails(self: Any) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    with pytest.raises(ValueError, match=r"cannot be read \(.*odd.*\); the file may be truncated or damaged"):
        load_image(data)


def test_long_texts_and_profiles_in_a_png_are_ignored() -> None:
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
    # Texts with the orientation are still read.
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


def png(row: bytes, width: int, depth: int, color: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "color", "row", "key"), [
    (1, 0, b"\x40", b"\0\0"), (2, 0, b"\x40", b"\0\1"), (4, 0, b"\x70", b"\0\7"), (8, 0, b"\x7f\0", b"\0\x7f"),
    (16, 0, b"\x7f\xff\0\0", b"\x7f\xff"), (8, 2, b"\1\2\3\0\0\0", b"\0\1\0\2\0\3"),
    (16, 2, b"\1\2\3\4\5\6\0\0\0\0\0\0", b"\1\2\3\4\5\6"),
])  # fmt: skip
def test_a_transparent_colour_of_a_png_is_that_colour_at_every_depth(
    depth: int, color: int, row: bytes, key: bytes
) -> None:
    shown = pixels(png(row, 2, depth, color, png_chunk(b"tRNS", key)))[0]
    assert shown[0].tolist() == [255] * 3
    assert shown[1].tolist() == ([255] * 3 if depth == 1 else [0] * 3)


def test_damaged_ancillary_chunks_are_ignored() -> None:
    plain = encoded(Image.new("RGB", (8, 4), "red"))
    bodies = {b"pHYs": b"", b"gAMA": b"1", b"cHRM": b"1", b"sRGB": b"", b"iCCP": b"", b"acTL": b"", b"fcTL": b"1",
              b"fdAT": b"1", b"tRNS": b"1", b"zTXt": b"a\0\1b", b"eXIf": b"odd"}  # fmt: skip
    for name, body in bodies.items():
        chunk = png_chunk(name, body)
        for damaged in (chunk, chunk[:-4] + b"\0\0\0\0"):
            for place in (33, len(plain) - 12):
                assert (pixels(plain[:place] + damaged + plain[place:]) == [255, 0, 0]).all(), name
    # Compressed with a small window, with a long keyword and language.
    pack = zlib.compressobj(wbits=9)
    long = pack.compress(bytes(2 << 20)) + pack.flush()
    text = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0" + b"x" * 300 + b"\0" + b"x" * 300 + b"\0" + long)
    assert (pixels(plain[:33] + text + plain[33:]) == [255, 0, 0]).all()


def test_damaged_segments_of_a_jpeg_are_ignored() -> None:
    plain = encoded(Image.new("RGB", (8, 4), "red"), "JPEG")
    expected = pixels(plain)
    bodies = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xED, b"Photoshop 3.0\x008BIM\1"), (0xEE, b"Adobe\0"),
              (0xE1, b"Exif\0\0"), (0xE2, b"MPF\0II*\0\x08\0\0\0\0\0"), (0xFE, b""))  # fmt: skip
    for marker, body in bodies:
        segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
        for padding in (b"", b"\xff\xff"):
            assert (pixels(plain[:2] + padding + segment + plain[2:]) == expected).all(), body
        junk = b"\0\1"  # which decoders skip
        assert (pixels(plain[:2] + segment + junk + plain[2:]) == expected).all(), body


def test_avif_orientation_comes_from_its_boxes_and_not_exif() -> None:
    tags = struct.pack("<H", 2) + struct.pack("<HHII", 0x010E, 2, 4, 0x646464) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"II*\0" + struct.pack("<I", 8) + tags + bytes(4)
    data = encoded(Image.new("RGB", (64, 32)), "AVIF", exif=exif)
    entry = data.index(struct.pack("<HHI", 0x010E, 2, 4))
    data = data[:entry] + struct.pack("<HHI", 0x011A, 7, 4) + data[entry + 8 :]  # a resolution that is no number
    assert load_image(data).size == (32, 64)


def tiff(order: str, bits: int, photometric: int, row: bytes, format: int = 1, compression: int = 1) -> bytes:
    if compression == 8:
        row = zlib.compress(row)
    tags = {256: 2, 257: 1, 258: bits, 259: compression, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row),
            339: format}  # fmt: skip
    row += bytes(len(row) % 2)
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    start = ("II*\0" if order == "<" else "MM\0*").encode() + struct.pack(order + "I", 8 + len(row))
    return start + row + struct.pack(order + "H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(("order", "bits", "row", "format"), [
    ("<", 1, b"\x40", 1), (">", 8, b"\0\xff", 1), ("<", 12, b"\0\x0f\xff", 1), ("<", 16, b"\0\0\xff\xff", 1),
    (">", 16, b"\0\0\xff\xff", 1), ("<", 32, struct.pack("<ff", 0, 1), 3), ("<", 32, struct.pack("<ii", 0, 65535), 2),
])  # fmt: skip
def test_tiffs_of_every_depth_are_grey_from_black_to_white(
    order: str, bits: int, row: bytes, format: int, compression: int
) -> None:
    assert pixels(tiff(order, bits, 1, row, format, compression))[0, :, 0].tolist() == [0, 255]
    assert pixels(tiff(order, bits, 0, row, format, compression))[0, :, 0].tolist() == [255, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "ICO", "BMP", "TGA", "PPM"])
def test_damage_anywhere_is_a_value_error(kind: str) -> None:
    data = encoded(NOISE, kind)
    rng = np.random.default_rng(0)
    damaged = [data[: len(data) * tenth // 10] for tenth in range(10)]
    for _ in range(20):
        copy = np.frombuffer(data, np.uint8).copy()
        copy[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
        damaged.append(copy.tobytes())
    refused = 0
    for one in damaged:
        try:
            load_image(one)
        except ValueError as error:
            refused += 1
            assert "cannot be read ()" not in str(error), "no reason is given"
    assert refused >= 5
