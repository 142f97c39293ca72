"""Loading images: every supported source, and clear errors for everything else."""

import base64
import http.server
import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aria.media.open import Base64, open_media
from aria.processor import MediaSettings, load_image
from tests.helpers.images import NOISE, encoded, pixels
from tests.helpers.media_site import site


def test_paths_bytes_and_data_uris_agree(tmp_path) -> None:
    data = encoded(NOISE)
    (tmp_path / "ä picture.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (tmp_path / "ä picture.png", str(tmp_path / "ä picture.png"), data, bytearray(data), uri, NOISE):
        assert np.array_equal(pixels(source), np.asarray(NOISE))


def test_percent_coded_data_uri() -> None:
    coded = "".join(f"%{byte:02x}" for byte in encoded(NOISE))
    assert np.array_equal(pixels(f"data:image/png,{coded}"), np.asarray(NOISE))


def test_data_uris_are_unquoted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.effect_noise((40, 40), 90))
    escaped = "".join(f"%{byte:02x}" for byte in data)
    mixed = "".join(chr(byte) if 48 <= byte < 58 else f"%{byte:02X}" for byte in data)
    for piece in (3, 4, 5, 64, 1 << 16):
        monkeypatch.setattr("aria.media.open._CHUNK", piece)
        for body in (escaped, mixed):
            assert open_media(f"data:image/png,{body}", "image", MediaSettings()).data == data
        spaced = "%20".join(base64.b64encode(data).decode()[i : i + 7] for i in range(0, len(data), 7))
        whole = base64.b64decode(spaced.replace("%20", ""))
        assert open_media(f"data:;base64,{spaced}", "image", MediaSettings()).data == whole


def test_base64_without_a_data_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.effect_noise((40, 40), 90))
    coded = base64.b64encode(data).decode()
    for piece in (3, 64, 1 << 16):
        monkeypatch.setattr("aria.media.open._CHUNK", piece)
        for text in (coded, coded.rstrip("="), f" {coded}\n"):
            assert open_media(Base64(text), "document", MediaSettings()).data == data
    with pytest.raises(ValueError, match="more than the 100 bytes"):
        open_media(Base64(coded), "document", MediaSettings(document_bytes=100))
    with pytest.raises(ValueError, match="not valid base64"):
        open_media(Base64("!"), "document", MediaSettings())
    # Only the beginning of a data: URI is searched for its comma.
    with pytest.raises(ValueError, match="is not a data: URI"):
        open_media("data:" + "a" * 10_000 + ",AAAA", "image", MediaSettings())


def test_decoder_errors_mean_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Image.Image) -> None:
        raise RuntimeError("Failed to decode image")  # as Pillow's AVIF does

    data = encoded(Image.new("RGB", (4, 4)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    with pytest.raises(ValueError, match="may be truncated or damaged"):
        load_image(data)


def test_missing_file_folder_and_unknown_kind(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no image at"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder, a device"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="begins with data:image/png;base64,"):
        load_image("iVBORw0KGgo" * 1000)
    with pytest.raises(TypeError, match="cannot be a int"):
        load_image(3)


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an image in a known format"):
        load_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncated_files(kind: str) -> None:
    data = encoded(NOISE, kind)
    with pytest.raises(ValueError, match=r"truncated or damaged|not an image"):
        load_image(data[: len(data) // 2])


def test_a_decompression_bomb_is_rejected_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    for side in (11_000, 60_000):
        header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        bomb = (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
        )
        with warnings.catch_warnings(), pytest.raises(ValueError, match="more than the 120,000,000"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            load_image(bomb)


def test_exif_orientation_is_applied(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 60, 20))
    turned = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (40, 60)
    assert np.asarray(turned)[30, 35, 2] > 200 and np.asarray(turned)[30, 5, 0] > 200
    with Image.open(io.BytesIO(encoded(image, "JPEG", exif=exif))) as lazy:
        assert load_image(lazy).size == (40, 60)


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 32768, 65535]], dtype=np.uint16)
    for source in (
        Image.fromarray(values),
        encoded(Image.fromarray(values)),
        values,
        encoded(Image.fromarray(values), "TIFF"),
    ):
        assert pixels(source)[0, :, 0].tolist() == [0, 0, 128, 255]
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I" and pixels(wide)[0, :, 0].tolist() == [0, 0, 128, 255]
    assert pixels(Image.fromarray(np.array([[0, 200]], dtype=np.int32)))[0, :, 0].tolist() == [0, 200]
    with pytest.raises(ValueError, match=r"expected 0\.\.65535"):
        load_image(Image.fromarray(np.array([[-1, 200]], dtype=np.int32)))


def test_other_modes_are_converted_as_by_pillow() -> None:
    rgba = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 7, 4), dtype=np.uint8), "RGBA")
    stored = MediaSettings(background=None)
    assert np.array_equal(np.asarray(load_image(rgba, stored)), np.asarray(rgba)[..., :3])  # as transformers has it
    for mode in ("L", "1", "CMYK", "YCbCr", "HSV", "LA", "P", "RGBA", "RGBX"):
        image = NOISE.convert(mode)
        assert np.array_equal(pixels(image), np.asarray(image.convert("RGB"))), mode
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert pixels(encoded(cmyk, "TIFF"))[0, 0].tolist() == [255, 0, 0]


def test_palette_with_transparency_is_quiet() -> None:
    image = NOISE.quantize(16)
    for transparency in (3, bytes([0, 128, 255, 0])):
        data = encoded(image, "PNG", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(
                np.asarray(load_image(data, MediaSettings(background=None))), np.asarray(image.convert("RGB"))
            )
            load_image(data)


def test_arrays_and_tensors() -> None:
    array = np.asarray(NOISE)
    chw = array.transpose(2, 0, 1)
    tensor = torch.from_numpy(np.ascontiguousarray(chw))
    for source in (
        array,
        chw,
        tensor,
        tensor.permute(1, 2, 0),
        tensor.float() / 255,
        array / 255.0,
        array.astype("uint16") * 257,
    ):
        assert np.array_equal(pixels(source), array)
    assert np.array_equal(pixels(array[..., 0])[..., 2], array[..., 0])
    assert np.array_equal(pixels(array[..., :1])[..., 2], array[..., 0])
    assert pixels(np.array([[True, False]]))[0].tolist() == [[255] * 3, [0] * 3]
    opaque = np.full_like(array[..., 0], 255)
    assert np.array_equal(pixels(np.dstack([array, opaque])), array)  # fourth channel is alpha
    ambiguous = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(ambiguous), ambiguous)
    assert np.array_equal(pixels(torch.from_numpy(ambiguous)), ambiguous.transpose(1, 2, 0))
    assert pixels(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)).max() == 128


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 200.0), r"must be in 0\.\.1"),
        (np.full((4, 4, 3), np.nan), r"must be in 0\.\.1"),
        (np.zeros((4, 4, 3), dtype=np.int64), "expected uint8"),
        (np.zeros((6, 6, 5), dtype=np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "one at a time"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "empty"),
    ],
)
def test_arrays_that_are_not_images(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(array)


@pytest.mark.parametrize("address", ["file:///etc/hosts", "ftp://example.org/a.png", "gopher://x/y"])
def test_only_web_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=rf"{address.split(':')[0]}:// addresses are not supported"):
        load_image(address)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64", "not a data: URI"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:,", "is empty"),
        ("data:image/png;base64,==", "is empty"),
        (" ", "an image is empty"),
    ],
)
def test_bad_data_uris(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(uri)


def answer(handler: http.server.BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    if handler.path in ("/picture", "/a%20%C3%A4.png"):
        return 200, {}, encoded(NOISE)
    if handler.path == "/moved":
        return 302, {"Location": "/picture"}, b""
    return (200, {}, bytes(4096)) if handler.path == "/endless" else (404, {}, b"")


def test_addresses() -> None:
    near = MediaSettings(private_addresses=True, image_bytes=20_000)
    with site(answer) as address:
        for path in ("/picture", "/moved", "/a ä.png"):
            assert np.array_equal(np.asarray(load_image(address + path, near)), np.asarray(NOISE))
        with pytest.raises(ValueError, match=r"could not fetch .*404"):
            load_image(f"{address}/none", near)
        with pytest.raises(ValueError, match="sends more than the 1,000 bytes"):
            load_image(f"{address}/endless", MediaSettings(private_addresses=True, image_bytes=1000))
        with pytest.raises(ValueError, match="not on the public internet"):
            load_image(f"{address}/picture")


def test_sizes_of_bytes_and_data_uris_are_checked_first() -> None:
    data = encoded(NOISE)
    small = MediaSettings(image_bytes=len(data) - 1)
    coded = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02x}" for byte in data)
    for source in (data, f"data:image/png;base64,{coded}", f"data:,{percent}", f"data:;base64,{coded * 3}"):
        with pytest.raises(ValueError, match="allowed"):
            load_image(source, small)
    assert load_image(f"data:nonsense;base64,{coded}").size == NOISE.size, "the content decides, not the label"
    # As clients write them.
    padded = base64.b64encode(data + bytes(1 - len(data) % 3 % 2)).decode()
    for uri in (
        f"data:image/png; base64,{padded}",
        f"data:image/png;charset=utf-8; BASE64 ,{padded}",
        f" data:image/png;base64,{padded}\n",
        f"DATA:image/png;base64,{padded.rstrip('=')}",
        f"data:image/png;base64, {padded[:20]} {padded[20:]}",
        f"data:image/png;base64;charset=utf-8,{padded}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(base64.b64decode(padded)).decode()}",
        f"data:image/png;base64,{padded.replace('=', '%3D')}",
    ):
        assert load_image(uri).size == NOISE.size, uri[:40]
    with pytest.raises(ValueError, match="more than the 2,399 allowed"):
        load_image(data, MediaSettings(image_pixels=40 * 60 - 1))
    assert load_image(data, MediaSettings(image_pixels=40 * 60, image_bytes=len(data))).size == NOISE.size


def test_paths_only_in_allowed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside, tmp_path / "inside2"):
        folder.mkdir()
        (folder / "a.png").write_bytes(encoded(NOISE))
    settings = MediaSettings(local_folders=(inside,))
    monkeypatch.chdir(inside)
    for path in (inside / "a.png", "a.png", f"{inside}/../inside/a.png"):
        assert load_image(path, settings).size == NOISE.size
    with pytest.raises(FileNotFoundError):
        load_image(inside / "none.png", settings)
    for path in (outside / "a.png", "../outside/a.png", outside / "none.png", tmp_path / "inside2/a.png"):
        with pytest.raises(ValueError, match=r"outside the allowed folders|no image"):
            load_image(path, settings)
    for path in (inside / "a.png", "/etc/passwd", outside / "none.png"):
        with pytest.raises(ValueError, match="local files are not allowed here"):
            load_image(path, MediaSettings(local_folders=()))
    with pytest.raises(ValueError, match="cannot be a path"):
        load_image("a\0b", settings)


def test_links_do_not_lead_out_of_allowed_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(encoded(NOISE))
    try:
        (inside / "file.png").symlink_to(outside / "a.png")
        (inside / "folder").symlink_to(outside)
        (tmp_path / "alias").symlink_to(inside)
    except OSError:
        pytest.skip("this system does not let us make links")
    settings = MediaSettings(local_folders=(tmp_path / "alias",))
    for path in (inside / "file.png", inside / "folder" / "a.png", tmp_path / "alias" / "file.png"):
        with pytest.raises(ValueError, match="outside the allowed folders"):
            load_image(path, settings)
    (inside / "b.png").write_bytes(encoded(NOISE))
    for path in (inside / "b.png", tmp_path / "alias" / "b.png"):
        assert load_image(path, settings).size == NOISE.size


@pytest.mark.parametrize("kind", ["video", "document"])
def test_sources_of_clips_and_documents(kind: str, tmp_path: Path) -> None:
    settings = MediaSettings(video_bytes=10, document_bytes=10)
    assert open_media(b"abc", kind, settings).data == b"abc"
    assert open_media("data:,abc", kind, settings).data == b"abc"
    (tmp_path / "a").write_bytes(bytes(100))
    assert open_media(tmp_path / "a", kind, settings).data == (tmp_path / "a").resolve()
    for source in (bytes(11), "data:," + "a" * 11):
        with pytest.raises(ValueError, match="10 are allowed"):
            open_media(source, kind, settings)
    with pytest.raises(TypeError, match="cannot be a list; pass a path, bytes"):
        open_media([], kind, settings)
