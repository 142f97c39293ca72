"""Draws the cookbook's media beside it: ``python docs/cookbook/media/draw.py``. All of it is this project's own."""

import math
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
PAPER, INK, RED, BLUE = (250, 246, 236), (34, 44, 72), (214, 38, 38), (38, 92, 214)
SALES = {"Mon": 12, "Tue": 18, "Wed": 9, "Thu": 24, "Fri": 15}
RECEIPT = [("2 x coffee", "6.00"), ("1 x apple cake", "4.50"), ("1 x water", "2.00"), ("TOTAL", "12.50")]
PAGES = ("Welcome", "Budget", "Thanks")
FRAMES, RATE = 48, 12


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def chart() -> Image.Image:
    picture, draw = canvas(960, 720)
    draw.text((480, 50), "Loaves sold in a week", INK, font(44), anchor="mm")
    draw.line((110, 110, 110, 620, 900, 620), INK, 4)
    for value in range(0, 30, 5):
        draw.text((95, 620 - 18 * value), str(value), INK, font(28), anchor="rm")
    for i, (day, value) in enumerate(SALES.items()):
        left = 150 + 150 * i
        draw.rectangle((left, 620 - 18 * value, left + 100, 618), BLUE)
        draw.text((left + 50, 600 - 18 * value), str(value), INK, font(28), anchor="mm")
        draw.text((left + 50, 650), day, INK, font(32), anchor="mm")
    return picture


def receipt() -> Image.Image:
    picture, draw = canvas(560, 560)
    draw.text((280, 60), "CORNER CAFE", INK, font(48), anchor="mm")
    draw.text((280, 120), "2026-03-14", INK, font(32), anchor="mm")
    for i, (name, price) in enumerate(RECEIPT):
        y = 220 + 90 * i
        draw.text((50, y), name, INK, font(36), anchor="lm")
        draw.text((510, y), price, INK, font(36), anchor="rm")
    draw.line((50, 445, 510, 445), INK, 3)
    return picture


def page(word: str) -> Image.Image:
    picture, draw = canvas(640, 480)
    draw.text((320, 240), word, INK, font(120), anchor="mm")
    return picture


def frame(index: int) -> Image.Image:
    """A circle that jumps from left to right, red on the left half of its way and blue on the right."""
    picture, draw = canvas(320, 240)
    x = 60 + 200 * index / (FRAMES - 1)
    y = 150 - 60 * abs(math.sin(2 * math.pi * index / FRAMES))
    draw.circle((x, y), 40, RED if x < 160 else BLUE)
    return picture


def clip(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame(index)))))
        container.mux(stream.encode())


if __name__ == "__main__":
    chart().quantize(32).save(FOLDER / "chart.png", optimize=True)
    receipt().quantize(32).save(FOLDER / "receipt.png", optimize=True)
    first, *others = map(page, PAGES)
    first.save(FOLDER / "pages.pdf", save_all=True, append_images=others, resolution=144)
    clip(FOLDER / "clip.mp4")
