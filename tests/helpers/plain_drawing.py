"""Nano's training images drawn in the simplest way: one scene at a time, every step over the whole image.

The renderer has to draw the same in groups and windows. Random numbers come from the caller.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.nano.assets.archive import Assets
from recipes.nano.assets.fonts import CHARACTERS, EM_SIZES
from recipes.nano.draw import commands, outlines
from recipes.nano.draw.render import Renderer
from recipes.nano.scenes.scene import LAYERS, Box, Line, Mark, Scene


def draw(scene: Scene, renderer: Renderer, assets: Assets, grains: Tensor, noise: Tensor) -> Tensor:
    """Return ``pixel_values`` (3, S, S); ``grains`` (9, 9) shape the clouds, ``noise`` (3, S, S) is added unchanged."""
    image = _background(scene, grains)
    if scene.photo:
        image = _photo(scene, renderer)
    for layer in range(LAYERS):
        image = _boxes(image, [box for box in scene.boxes if box.layer == layer])
    for mark in scene.marks:
        image = _shape(image, mark, renderer) if mark.kind == "shape" else _sprite(image, mark, renderer)
    for line in scene.lines:
        image = _line(image, line, renderer, assets)
    brightness, contrast, blur, strength = scene.sensor
    soft = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    image = image * (1 - blur) + soft * blur
    image = (image - 0.5) * contrast + 0.5 + brightness + noise * strength
    image = image.clamp(0, 1) * 2 - 1
    image[:, scene.height :] = image[:, :, scene.width :] = -1
    return image


def _places(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _background(scene: Scene, grains: Tensor) -> Tensor:
    kind, *colours = scene.background[:7]
    angle, frequency, phase = torch.tensor(scene.background[7:])
    x, y = _places(scene.size)
    x, y = x / scene.width - 0.5, y / scene.height - 0.5
    along = x * angle.cos() + y * angle.sin()
    share = {
        0: torch.zeros_like(along),
        1: along + 0.5,
        2: torch.hypot(x, y) * 1.6,
        3: F.interpolate(grains[None, None], x.shape, mode="bicubic", align_corners=False)[0, 0],
        4: (along * frequency * 6.3 + phase).sin() * 2 + 0.5,
    }[int(kind)].clamp(0, 1)
    first, second = torch.tensor(colours).view(2, 3, 1, 1)
    return first * (1 - share) + second * share


def _sample(texture: Tensor, u: Tensor, v: Tensor, padding: str) -> Tensor:
    """Sample a texture (C, h, w) at coordinates from -1 to 1."""
    return F.grid_sample(texture[None], torch.stack([u, v], -1)[None], padding_mode=padding, align_corners=False)[0]


def _turn_hue(image: Tensor, angle: float) -> Tensor:
    """Rotate each colour about the grey axis with Rodrigues' formula."""
    axis = torch.full((3,), 3**-0.5)
    cos, sin = np.cos(angle), np.sin(angle)
    crossed = torch.linalg.cross(axis[:, None, None].expand_as(image), image, dim=0)
    along = (axis[:, None, None] * image).sum(0) * axis[:, None, None]
    return image * cos + crossed * sin + along * (1 - cos)


def _photo(scene: Scene, renderer: Renderer) -> Tensor:
    assert scene.photo
    left, top, width, height = scene.photo.box
    x, y = _places(scene.size)
    share = x / scene.width
    u, v = left + width * (1 - share if scene.photo.mirrored else share), top + height * y / scene.height
    indices = scene.photo.index, max(scene.photo.other, 0)
    one, other = (_sample(renderer.photos[i] / 255, u * 2 - 1, v * 2 - 1, "reflection") for i in indices)
    return _turn_hue(one * (1 - scene.photo.mix) + other * scene.photo.mix, scene.photo.hue)


def _boxes(image: Tensor, boxes: list[Box]) -> Tensor:
    """Mix each pixel by the covered share of its area; the rectangles do not overlap."""
    x, y = _places(image.shape[-1])
    share, colour = torch.zeros_like(x), torch.zeros_like(image)
    for box in boxes:
        wide = (x + 0.5).clamp(max=box.right) - (x - 0.5).clamp(min=box.left)
        high = (y + 0.5).clamp(max=box.bottom) - (y - 0.5).clamp(min=box.top)
        covered = wide.clamp(0, 1) * high.clamp(0, 1)
        share += covered
        colour += covered * torch.tensor(box.colour)[:, None, None]
    return image * (1 - share) + colour


def _own_axes(size: int, mark: Mark) -> tuple[Tensor, Tensor]:
    x, y = _places(size)
    x, y = x - mark.x, y - mark.y
    cos, sin = np.cos(mark.angle), np.sin(mark.angle)
    return (x * cos + y * sin) / (mark.size * mark.stretch), (y * cos - x * sin) / mark.size


def _shape(image: Tensor, mark: Mark, renderer: Renderer) -> Tensor:
    u, v = _own_axes(image.shape[-1], mark)
    distance = _sample(renderer.shapes[mark.index], u / outlines.REACH, v / outlines.REACH, "border")
    fill, border = (torch.tensor(mark.look[i : i + 3])[:, None, None] for i in (0, 4))
    width, hollow = mark.look[3], mark.look[7]
    alpha = (0.5 - distance * mark.size).clamp(0, 1)
    inner = (0.5 - (distance + width) * mark.size).clamp(0, 1) if width > 0 else torch.ones_like(alpha)
    alpha = alpha * (1 - inner) if hollow else alpha
    return image * (1 - alpha) + (fill * inner + border * (1 - inner)) * alpha


def _edges(plane: Tensor) -> Tensor:
    corner = plane[:, :-1, :-1]
    step = (plane[:, 1:, :-1] - corner).abs() + (plane[:, :-1, 1:] - corner).abs()
    return F.max_pool2d(F.pad(step, (0, 1, 0, 1)), 3, 1, 1)


def _sprite(image: Tensor, mark: Mark, renderer: Renderer) -> Tensor:
    texture = renderer.sprites[mark.index] / 255
    colour, alpha = texture[:3], texture[3:]
    hue, saturation, gain, bias, outline, levels, mirrored = mark.look
    if levels:
        colour = (colour * (levels - 1)).round() / (levels - 1)
    colour = _turn_hue(colour, hue)
    grey = colour.mean(0, keepdim=True)
    edges = (_edges(grey * alpha) * 1.5 + _edges(alpha)).clamp(0, 1)
    colour = (((colour - grey) * saturation + grey) * gain + bias).clamp(0, 1) * alpha * (1 - outline * edges)
    alpha = torch.maximum(alpha, outline * F.max_pool2d(alpha, 5, 1, 2))
    texture = torch.cat([colour, alpha])
    texture = texture.flip(2) if mirrored else texture
    texture = F.avg_pool2d(texture, 2) if mark.size < commands.SMALL else texture
    found = _sample(texture, *_own_axes(image.shape[-1], mark), "zeros")
    return image * (1 - found[3:]) + found[:3]


def _line(image: Tensor, line: Line, renderer: Renderer, assets: Assets) -> Tensor:
    em = EM_SIZES[commands.atlas_for(line.em)]
    tiles, tops = renderer.glyphs[em]
    strip = torch.zeros(4 * em, 60 * em)
    pen, baseline, margin = np.float32(0), 2 * em, 2 * em  # in ems, rounded as in the renderer
    for character in line.text:
        code = ord(character) - 32
        if code:
            glyph = line.face * len(CHARACTERS) + code - 1
            left = int(np.rint(float(pen) * em)) + int(assets.glyph_boxes[em][line.face, code - 1, 0]) + margin
            top = baseline + int(tops[glyph])
            tile = tiles[glyph] / 255
            part = strip[top : top + tile.shape[0], left : left + tile.shape[1]]
            part.copy_(torch.maximum(part, tile[: part.shape[0], : part.shape[1]]))
        pen += assets.face_metrics[line.face, code] + np.float32(line.spacing)
    x, y = _places(image.shape[-1])
    x, y = (x - line.x) * em / line.em, (y - line.y) * em / line.em
    cos, sin = np.cos(line.angle), np.sin(line.angle)
    u, v = (x * cos + y * sin + margin) / strip.shape[1], (y * cos - x * sin + baseline) / strip.shape[0]
    alpha = _sample(strip[None], u * 2 - 1, v * 2 - 1, "zeros")
    return image * (1 - alpha) + torch.tensor(line.colour)[:, None, None] * alpha
