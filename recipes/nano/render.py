"""Draws whole batches of planned pictures in plain PyTorch, on the GPU for training and on a CPU for tests.

Each thing is drawn by looking up, for every pixel, where that pixel lies in the thing's own texture: lines of text are
typeset into strips first, shapes are distance fields, sprites and photographs are pictures. The dense labels come from
the same maps, taken at a few points. N pictures, S their size, n things drawn together, P patches, Q queries, K points.
"""

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.nano import commands, scenes, shapes
from recipes.nano.assets import Assets
from recipes.nano.fonts import EM_SIZES

PATCH = 14
IGNORED = -100


class Renderer:
    """Textures on a device, and ``renderer(batch)`` -> pictures and dense labels (see the recipe's README)."""

    def __init__(self, assets: Assets, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.num_classes = len(scenes.dense_classes(assets.labels))
        self.glyphs = {em: self._glyph_tiles(assets, em) for em in EM_SIZES}
        fields = np.stack([shapes.distance_field(name) for name in scenes.SHAPES])
        self.shapes = torch.from_numpy(fields).to(self.device)[:, None]
        self.sprites = _pictures(assets.sprites, "RGBA").to(self.device)
        self.photos = _pictures(assets.photos, "RGB").to(self.device)

    def _glyph_tiles(self, assets: Assets, em: int) -> tuple[Tensor, Tensor]:
        """Bitmaps of all glyphs at one size in equal tiles ``(faces * characters, h, w)`` uint8, and their tops."""
        boxes = assets.glyph_boxes[em].reshape(-1, 4).astype(np.int64)
        bits = np.frombuffer(zlib.decompress(assets.glyph_bits[em]), np.uint8)
        tiles = np.zeros((len(boxes), boxes[:, 3].max(), boxes[:, 2].max()), np.uint8)
        start = 0
        for tile, (_, _, width, height) in zip(tiles, boxes, strict=True):
            tile[:height, :width] = bits[start : start + width * height].reshape(height, width)
            start += width * height
        assert start == len(bits), f"glyphs of {em} px: {len(bits)} bytes of bitmaps, boxes ask for {start}"
        return torch.from_numpy(tiles).to(self.device), torch.from_numpy(boxes[:, 1].copy()).to(self.device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pictures, masks and dense labels of a packed batch whose tensors are on the renderer's device."""
        size, valid = int(batch["size"]), batch["valid"]
        generator = torch.Generator(self.device).manual_seed(int(batch["seed"]))
        canvas = self._backgrounds(batch["background"], valid, size, generator)
        points = torch.cat([_patch_points(size, len(valid), self.device), _query_points(size, valid)], 1)
        labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=self.device)
        self._draw_photos(canvas, labels, batch, valid)
        for kind, _, start, end in batch["mark_groups"]:
            self._draw_marks(canvas, labels, points, batch, kind, slice(start, end))
        for group in batch["line_groups"]:
            self._draw_lines(canvas, labels, points, batch, group)
        canvas = _sensor(canvas, batch["sensor"], generator)
        pixels = torch.arange(size, device=self.device)
        mask = (pixels[:, None] < valid[:, :1, None]) & (pixels < valid[:, 1:, None])
        outside = (points[..., 1] >= valid[:, :1]) | (points[..., 0] >= valid[:, 1:])
        labels = labels.masked_fill(outside, IGNORED)
        patches = (size // PATCH) ** 2
        return {
            "pixel_values": torch.where(mask[:, None], canvas.clamp(0, 1) * 2 - 1, -1.0),
            "pixel_mask": mask,
            "patch_labels": labels[:, :patches],
            "query_labels": labels[:, patches:].unflatten(1, (-1, 4 if size == 224 else 8)),
        }

    def _backgrounds(self, values: Tensor, valid: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """(N, 3, S, S) in 0..1: two colours, mixed by the kind of background."""
        axis = torch.arange(size, device=self.device) + 0.5
        y = (axis[:, None] / valid[:, :1, None]).expand(-1, size, size)
        x = (axis / valid[:, 1:, None]).expand(-1, size, size)
        kind, angle, frequency, phase = (values[:, i, None, None] for i in (0, 7, 8, 9))
        along = (x - 0.5) * angle.cos() + (y - 0.5) * angle.sin()
        grains = torch.rand((len(values), 1, 9, 9), device=self.device, generator=generator)
        cloudy = F.interpolate(grains, (size, size), mode="bicubic", align_corners=False)[:, 0]
        share = torch.zeros_like(along)
        for number, map_ in enumerate(
            (
                along + 0.5,
                torch.hypot(x - 0.5, y - 0.5) * 1.6,
                cloudy,
                (along * frequency * 6.3 + phase).sin() * 2 + 0.5,
            )
        ):
            share = torch.where(kind == number + 1, map_, share)
        share = share.clamp(0, 1)[:, None]
        return values[:, 1:4, None, None] * (1 - share) + values[:, 4:7, None, None] * share

    # --- photographs -------------------------------------------------------------------------------------------------

    def _draw_photos(self, canvas: Tensor, labels: Tensor, batch: Mapping[str, Any], valid: Tensor) -> None:
        pictures = batch["photo_picture"]
        if not len(pictures):
            return
        x, y, width, height, mirrored, hue, mix = batch["photo_values"].unbind(1)
        # Of the picture's valid part, a pixel at share u shows the box at share u; grid_sample counts from -1 to 1.
        wide = width / valid[pictures, 1] * (1 - 2 * mirrored)
        high = height / valid[pictures, 0]
        zero = torch.zeros_like(x)
        maps = torch.stack([2 * wide, zero, 2 * (x + width * mirrored) - 1, zero, 2 * high, 2 * y - 1], 1)
        grid = _pixel_grid(maps.unflatten(1, (2, 3)), canvas.shape[-1])
        both = [
            F.grid_sample(self.photos[index].float() / 255, grid, padding_mode="reflection", align_corners=False)
            for index in batch["photo_index"].unbind(1)
        ]
        mixed = torch.lerp(both[0], both[1], mix[:, None, None, None])
        canvas[pictures] = torch.einsum("nij,njhw->nihw", _hue_rotation(hue), mixed)
        labels[pictures] = scenes.OTHER

    # --- shapes and sprites ------------------------------------------------------------------------------------------

    def _draw_marks(
        self, canvas: Tensor, labels: Tensor, points: Tensor, batch: Mapping[str, Any], kind: int, rows: slice
    ) -> None:
        pictures, values = batch["mark_picture"][rows], batch["mark_values"][rows]
        index, classes = batch["mark_index"][rows], batch["mark_class"][rows]
        x, y, half, cos, sin, stretch = values[:, :6].unbind(1)
        to_local = _to_local(x, y, cos, sin, 1 / (half * stretch), 1 / half)
        at_points = _apply(to_local, points[pictures])
        size = canvas.shape[-1]
        if kind == commands.SHAPE:
            texture, reach = self.shapes[index], shapes.REACH
        else:
            texture, reach = self._sprite_textures(index, values[:, 6:], kind == commands.SMALL_SPRITE), 1.0
        mode = "border" if kind == commands.SHAPE else "zeros"
        grid = _pixel_grid(to_local, size) / reach
        found = F.grid_sample(texture, grid, padding_mode=mode, align_corners=False)
        under = F.grid_sample(texture[:, -1:], at_points[:, None] / reach, padding_mode=mode, align_corners=False)
        under = under[:, 0, 0]
        if kind == commands.SHAPE:
            colour, alpha = _shade(found, half, values[:, 6:])
            hit = under < 0
        else:
            colour, alpha = found[:, :3], found[:, 3:]
            hit = under > 0.5
        canvas[pictures] = canvas[pictures] * (1 - alpha) + colour
        labels[pictures] = torch.where(hit, classes[:, None], labels[pictures])

    def _sprite_textures(self, index: Tensor, look: Tensor, small: bool) -> Tensor:
        """Sprites (n, 4, T, T), colours multiplied by alpha, after their changes of style."""
        texture = self.sprites[index].float() / 255
        saturation, gain, bias, outline, levels, mirrored = (v[:, None, None, None] for v in look[:, 1:7].unbind(1))
        colour, alpha = texture[:, :3], texture[:, 3:]
        steps = (levels - 1).clamp(min=1)
        colour = torch.where(levels > 0, (colour * steps).round() / steps, colour)
        colour = torch.einsum("nij,njhw->nihw", _hue_rotation(look[:, 0]), colour)
        grey = colour.mean(1, keepdim=True)
        colour = (((colour - grey) * saturation + grey) * gain + bias).clamp(0, 1)
        edges = _edges(grey * alpha) * 1.5 + _edges(alpha)
        colour = colour * alpha * (1 - outline * edges.clamp(0, 1))
        # The outline's outer half: black around the sprite.
        alpha = torch.maximum(alpha, outline * F.max_pool2d(alpha, 5, 1, 2))
        texture = torch.cat([colour, alpha], 1)
        texture = torch.where(mirrored > 0, texture.flip(3), texture)
        return F.avg_pool2d(texture, 2) if small else texture

    # --- text --------------------------------------------------------------------------------------------------------

    def _draw_lines(
        self, canvas: Tensor, labels: Tensor, points: Tensor, batch: Mapping[str, Any], group: tuple[int, ...]
    ) -> None:
        atlas, _, start, end, first, last, widest = group
        em = EM_SIZES[atlas]
        pictures, values = batch["line_picture"][start:end], batch["line_values"][start:end]
        x, y, cos, sin, scale = values[:, :5].unbind(1)
        to_local = _to_local(x, y, cos, sin, scale, scale)
        # Typeset: copy glyph tiles into one strip a line, in atlas pixels; the larger value wins where tiles overlap.
        tiles, tops = self.glyphs[em]
        margin, baseline = em // 2, int(em * 1.2)
        high, wide = int(em * 1.8), widest + 2 * em + tiles.shape[2]
        index = batch["glyph_index"][first:last]
        rows = (baseline + tops[index])[:, None] + torch.arange(tiles.shape[1], device=self.device)
        columns = (margin + batch["glyph_x"][first:last])[:, None] + torch.arange(tiles.shape[2], device=self.device)
        line = batch["glyph_line"][first:last] - start
        places = (line[:, None, None] * high + rows.clamp(0, high - 1)[:, :, None]) * wide + columns[:, None].clamp(
            min=0
        )
        strips = torch.zeros((end - start) * high * wide, device=self.device)
        strips.scatter_reduce_(0, places.flatten(), tiles[index].float().flatten() / 255, "amax")
        strips = strips.view(end - start, 1, high, wide)
        # Paste: strip pixels counted from -1 to 1, as grid_sample wants them.
        shift = torch.tensor([margin, baseline], device=self.device, dtype=torch.float32)
        extent = torch.tensor([wide, high], device=self.device, dtype=torch.float32)
        grid = (_pixel_grid(to_local, canvas.shape[-1]) + shift) / extent * 2 - 1
        alpha = F.grid_sample(strips, grid, align_corners=False)
        canvas[pictures] = torch.lerp(canvas[pictures], values[:, 5:, None, None], alpha)
        # Label: the character whose advance holds the point, if the point is at the height of its glyph.
        local = _apply(to_local, points[pictures])
        character = torch.searchsorted(batch["line_edges"][start:end], local[..., 0].contiguous(), right=True) - 1
        before = character < 0
        character = character.clamp(min=0)
        classes = batch["line_classes"][start:end].gather(1, character)
        extents = batch["line_extents"][start:end].gather(1, character[..., None].expand(-1, -1, 2))
        slack = em * 0.08
        inside = (local[..., 1] > extents[..., 0] - slack) & (local[..., 1] < extents[..., 1] + slack)
        hit = inside & ~before & (classes > 0)
        labels[pictures] = torch.where(hit, classes, labels[pictures])


def _pictures(files: list[bytes], mode: str) -> Tensor:
    """Encoded pictures -> (n, channels, S, S) uint8, all in the size of the largest side."""
    opened = [Image.open(io.BytesIO(content)).convert(mode) for content in files]
    side = max((max(picture.size) for picture in opened), default=1)
    arrays = [np.asarray(p if p.size == (side, side) else p.resize((side, side))) for p in opened]
    stacked = np.stack(arrays) if arrays else np.zeros((0, side, side, len(mode)), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def _patch_points(size: int, pictures: int, device: torch.device) -> Tensor:
    """Centres of the patches in pixels, x then y, (N, P, 2)."""
    axis = torch.arange(size // PATCH, device=device) * float(PATCH) + PATCH / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 2).expand(pictures, -1, -1)


def _query_points(size: int, valid: Tensor) -> Tensor:
    """What each query should know: points in pixels, (N, Q * K, 2), row-major in a query's cell (see the README)."""
    device = valid.device
    cell = torch.arange(8, device=device)
    if size == 224:
        rows, columns, grid = torch.arange(2, device=device)[None], torch.arange(2, device=device), 16
    else:
        rows, columns, grid = torch.arange(4, device=device).view(2, 2), torch.arange(4, device=device), 32
    side = grid // 8
    halves, tall = rows.shape
    shape = (halves, 8, 8, tall, side)
    y = (cell[None, :, None, None, None] * side + rows[:, None, None, :, None] + 0.5).expand(shape) / grid
    x = (cell[None, None, :, None, None] * side + columns[None, None, None, None] + 0.5).expand(shape) / grid
    shares = torch.stack([x, y], -1).reshape(1, -1, 2)
    return shares * valid.flip(1)[:, None]


def _to_local(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, scale_x: Tensor, scale_y: Tensor) -> Tensor:
    """Affine maps (n, 2, 3) from pixels to a thing's own axes: shift to x, y, turn back, scale."""
    a, b, c, d = cos * scale_x, sin * scale_x, -sin * scale_y, cos * scale_y
    return torch.stack([a, b, -(a * x + b * y), c, d, -(c * x + d * y)], 1).unflatten(1, (2, 3))


def _apply(maps: Tensor, points: Tensor) -> Tensor:
    """(n, 2, 3) maps on (n, k, 2) points."""
    # Spelt out: a matrix product may run in TF32, too coarse for pixel positions.
    return points[..., :1] * maps[:, None, :, 0] + points[..., 1:] * maps[:, None, :, 1] + maps[:, None, :, 2]


def _pixel_grid(maps: Tensor, size: int) -> Tensor:
    """The maps at every pixel's centre, (n, S, S, 2)."""
    axis = torch.arange(size, device=maps.device) + 0.5
    across = axis[:, None] * maps[:, None, :, 0] + maps[:, None, :, 2]
    down = axis[:, None] * maps[:, None, :, 1]
    return across[:, None] + down[:, :, None]


def _shade(distance: Tensor, half: Tensor, look: Tensor) -> tuple[Tensor, Tensor]:
    """Distance fields (n, 1, S, S) -> colour times alpha, and alpha, with edges one pixel soft."""
    half = half[:, None, None, None]
    fill, width, border, hollow = look[:, :3], look[:, 3], look[:, 4:7], look[:, 7]
    width, hollow = width[:, None, None, None], hollow[:, None, None, None]
    alpha = (0.5 - distance * half).clamp(0, 1)
    inner = torch.where(width > 0, (0.5 - (distance + width) * half).clamp(0, 1), 1.0)
    colour = fill[:, :, None, None] * inner + border[:, :, None, None] * (1 - inner)
    alpha = alpha * torch.where(hollow > 0, 1 - inner, 1.0)
    return colour * alpha, alpha


def _hue_rotation(angle: Tensor) -> Tensor:
    """Rotations of colour space about the grey axis, (n, 3, 3)."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    third = torch.full((3, 3), 1 / 3, device=angle.device)
    root = 3**-0.5
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]], device=angle.device)
    return cos * torch.eye(3, device=angle.device) + sin * cross + (1 - cos) * third


def _edges(plane: Tensor) -> Tensor:
    """How much a plane (n, 1, T, T) changes from pixel to pixel, spread by one pixel."""
    step = (plane[..., 1:, :-1] - plane[..., :-1, :-1]).abs() + (plane[..., :-1, 1:] - plane[..., :-1, :-1]).abs()
    return F.max_pool2d(F.pad(step, (0, 1, 0, 1)), 3, 1, 1)


def _sensor(canvas: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
    """Sharper or softer, brightness, contrast, noise."""
    brightness, contrast, blur, noise = (v[:, None, None, None] for v in values.unbind(1))
    soft = F.avg_pool2d(F.pad(canvas, (1, 1, 1, 1), mode="replicate"), 3, 1)
    canvas = torch.lerp(canvas, soft, blur)
    grain = torch.randn(canvas.shape, device=canvas.device, generator=generator)
    return (canvas - 0.5) * contrast + 0.5 + brightness + grain * noise
