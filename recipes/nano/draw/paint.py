"""Draws planned scenes with PIL, at the size of a user's image and with the real font files.

Shares no drawing code with ``render.py``: evaluation images must look like what users send, not like training images.
"""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.nano.draw import outlines
from recipes.nano.scenes.scene import Box, Line, Mark, Photo, Scene, Story

OVERSAMPLE = 3
BAR_STYLES = ("plain", "rounded", "shaded", "framed")


class Painter:
    """Paints scenes with the given font files, sprites and photographs."""

    def __init__(self, fonts: Sequence[bytes], sprites: Sequence[bytes] = (), photos: Sequence[bytes] = ()) -> None:
        self.fonts, self.sprites, self.photos = fonts, sprites, photos
        self._font = lru_cache(maxsize=256)(self._open_font)

    def _open_font(self, face: int, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(io.BytesIO(self.fonts[face]), size)

    def paint(self, scene: Scene, scale: float, rng: Random) -> Image.Image:
        """Paint the valid part of ``scene`` in RGB, scaled by ``scale``; half the images are compressed as JPEG."""
        width, height = round(scene.width * scale), round(scene.height * scale)
        if scene.photo:
            canvas = self._photo(scene.photo, width, height)
        else:
            canvas = background(scene.background, width, height, rng)
        if scene.boxes:
            style = rng.choice(BAR_STYLES)
            for box in sorted(scene.boxes, key=lambda box: box.layer):
                paint_box(canvas, box, scale, style)
        for mark in scene.marks:
            if mark.kind == "shape":
                _paint_shape(canvas, mark, scale)
            else:
                self._paint_sprite(canvas, mark, scale)
        for line in scene.lines:
            self._paint_line(canvas, line, scale)
        if rng.random() < 0.5:
            out = io.BytesIO()
            canvas.save(out, "JPEG", quality=rng.randint(60, 95))
            canvas = Image.open(out).convert("RGB")
        return canvas

    def paint_story(self, story: Story, scale: float, rng: Random) -> list[Image.Image]:
        """Paint all images of ``story``; frames of a clip share the random effects."""
        seed = rng.getrandbits(32)
        return [
            self.paint(scene, scale, Random(seed if story.task == "clips" else seed + n))
            for n, scene in enumerate(story.scenes)
        ]

    def _photo(self, photo: Photo, width: int, height: int) -> Image.Image:
        """Return the part of the photograph inside the box, stretched to the image's proportions."""
        whole = Image.open(io.BytesIO(self.photos[photo.index])).convert("RGB")
        x, y, w, h = photo.box
        box = (x * whole.width, y * whole.height, (x + w) * whole.width, (y + h) * whole.height)
        part = whole.resize((width, height), Image.Resampling.BICUBIC, box=box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if photo.mirrored else part

    def _paint_line(self, canvas: Image.Image, line: Line, scale: float) -> None:
        font = self._font(line.face, max(round(line.em * scale), 4))
        layer = Image.new("L", canvas.size)
        draw = ImageDraw.Draw(layer)
        x, y = line.x * scale, line.y * scale
        if line.spacing:
            pen = x
            for character in line.text:
                draw.text((pen, y), character, 255, font, anchor="ls")
                pen += font.getlength(character) + line.spacing * font.size
        else:
            draw.text((x, y), line.text, 255, font, anchor="ls")
        if line.angle:
            turn = -math.degrees(line.angle)  # PIL rotates anticlockwise, and our y points down
            layer = layer.rotate(turn, Image.Resampling.BICUBIC, center=(x, y))
        canvas.paste(_bytes(line.colour), (0, 0), layer)

    def _paint_sprite(self, canvas: Image.Image, mark: Mark, scale: float) -> None:
        sprite = Image.open(io.BytesIO(self.sprites[mark.index])).convert("RGBA")
        width, height = 2 * mark.size * mark.stretch * scale, 2 * mark.size * scale
        sprite = sprite.resize((max(round(width), 1), max(round(height), 1)), Image.Resampling.LANCZOS)
        sprite = sprite.rotate(-math.degrees(mark.angle), Image.Resampling.BICUBIC, expand=True)
        place = (round(mark.x * scale - sprite.width / 2), round(mark.y * scale - sprite.height / 2))
        canvas.paste(sprite, place, sprite)


def background(values: Sequence[float], width: int, height: int, rng: Random) -> Image.Image:
    """Paint the background: one colour, or two mixed linearly, radially, in clouds or in stripes."""
    kind, angle, frequency, phase = (values[i] for i in (0, 7, 8, 9))
    first, second = np.array(values[1:4]), np.array(values[4:7])
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    along = x[None] * math.cos(angle) + y[:, None] * math.sin(angle)
    if kind == 1:
        share = along + 0.5
    elif kind == 2:
        share = np.hypot(x[None], y[:, None]) * 1.6
    elif kind == 3:
        grains = Image.fromarray(np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (9, 9), np.uint8))
        share = np.asarray(grains.resize((width, height), Image.Resampling.BICUBIC)) / 255
    elif kind == 4:
        share = np.sin(along * frequency * 6.3 + phase) * 2 + 0.5
    else:
        share = np.zeros((height, width))
    share = share.clip(0, 1)[..., None]
    return Image.fromarray(np.rint((first * (1 - share) + second * share) * 255).astype(np.uint8))


def paint_box(canvas: Image.Image, box: Box, scale: float, style: str) -> None:
    """Paint a bar in one of ``BAR_STYLES``, of which training draws only "plain"; lines and axes are always plain."""
    left, top, right, bottom = (side * scale for side in (box.left, box.top, box.right, box.bottom))
    x, y = math.floor(left) - 2, math.floor(top) - 2
    width, height = math.ceil(right) + 2 - x, math.ceil(bottom) + 2 - y
    if min(right - left, bottom - top) <= 0:
        return
    large = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
    corners = [
        round((side - origin) * OVERSAMPLE) for side, origin in zip((left, top, right, bottom), (x, y) * 2, strict=True)
    ]
    corners = [*corners[:2], max(corners[2] - 1, corners[0]), max(corners[3] - 1, corners[1])]
    bar = bool(box.colour_name) and min(right - left, bottom - top) > 6
    radius = min(right - left, bottom - top) * 0.2 * OVERSAMPLE if bar and style == "rounded" else 0
    ImageDraw.Draw(large).rounded_rectangle(corners, radius, 255)
    mask = large.resize((width, height), Image.Resampling.BOX)
    if bar and style == "shaded":  # lighter towards the top
        shades = np.linspace(1.0, 0.82, height)[:, None, None] * np.array(box.colour) * 255
        canvas.paste(Image.fromarray(np.broadcast_to(shades, (height, width, 3)).astype(np.uint8)), (x, y), mask)
        return
    canvas.paste(_bytes(box.colour), (x, y), mask)
    if bar and style == "framed":
        dark = _bytes([channel * 0.5 for channel in box.colour])
        ImageDraw.Draw(canvas).rectangle((left, top, right, bottom), outline=dark, width=max(1, round(scale)))


def _paint_shape(canvas: Image.Image, mark: Mark, scale: float) -> None:
    """Paint a polygon, oversampled three times because PIL does not smooth edges."""
    fill, (border, *edge_colour), hollow = mark.look[:3], mark.look[3:7], mark.look[7]
    corners = outlines.outline(mark.name) * mark.size * scale * [mark.stretch, 1.0]
    cos, sin = math.cos(mark.angle), math.sin(mark.angle)
    corners = corners @ np.array([[cos, sin], [-sin, cos]])
    half = int(np.abs(corners).max()) + 3
    # Keep the sub-pixel position in the mask.
    left, top = math.floor(mark.x * scale) - half, math.floor(mark.y * scale) - half
    middle = np.array([mark.x * scale - left, mark.y * scale - top])

    def mask(share: float) -> Image.Image:
        large = Image.new("L", (2 * half * OVERSAMPLE,) * 2)
        points = [tuple(point) for point in (corners * share + middle) * OVERSAMPLE]
        ImageDraw.Draw(large).polygon(points, 255)
        return large.resize((2 * half,) * 2, Image.Resampling.BOX)

    outer = mask(1.0)
    inner = mask(1.0 - border / 0.7) if border else outer  # a share of the half-width, most of it inside
    if hollow:
        ring = Image.fromarray(np.asarray(outer) - np.minimum(np.asarray(inner), np.asarray(outer)))
        canvas.paste(_bytes(fill), (left, top), ring)
        return
    if border:
        canvas.paste(_bytes(edge_colour), (left, top), outer)
    canvas.paste(_bytes(fill), (left, top), inner)


def _bytes(colour: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(255 * min(max(channel, 0.0), 1.0)) for channel in colour)
