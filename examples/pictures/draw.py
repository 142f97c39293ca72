"""Draw the sample images in this folder: ``python examples/pictures/draw.py NOTO_ICONS_JSON`` (extra: train).

NOTO_ICONS_JSON is ``icons.json`` of the npm package @iconify-json/noto 1.2.9, which has Google's Noto emoji.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
import resvg_py
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
SIDE = 448
PAPER, INK = (250, 246, 236), (34, 44, 72)
SMOOTH = 4  # oversampling of shapes


def word(text: str) -> Image.Image:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("RGB", (SIDE, SIDE // 2), PAPER)
    centre = (SIDE / 2, SIDE / 4)
    ImageDraw.Draw(image).text(centre, text, INK, ImageFont.truetype(str(font), 72), anchor="mm")
    return image


def shapes() -> Image.Image:
    image = Image.new("RGB", (SIDE * SMOOTH, SIDE * SMOOTH), PAPER)
    draw = ImageDraw.Draw(image)
    draw.circle((140 * SMOOTH, 224 * SMOOTH), 80 * SMOOTH, (214, 38, 38))
    draw.rectangle([x * SMOOTH for x in (262, 154, 402, 294)], (38, 92, 214))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def emoji(icons: dict, name: str) -> Image.Image:
    side = icons["width"]
    body = icons["icons"][name]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
    sprite = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=320, height=320))))
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    image.paste(sprite, (64, 64), sprite)
    return image


if __name__ == "__main__":
    icons = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    images = {"word": word("Welcome"), "shapes": shapes(), "emoji": emoji(icons, "octopus")}
    for name, image in images.items():
        image.quantize(64).save(FOLDER / f"{name}.png", optimize=True)
