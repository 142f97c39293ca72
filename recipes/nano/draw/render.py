"""Draws batches of planned images in plain PyTorch, on the GPU for training and on the CPU for tests.

Everything is a texture that is sampled at every pixel of a window: lines of text are first typeset into strips, shapes
are distance fields, sprites and photographs are images. Dense labels sample the same maps at a few points.

N images, S their size, n things drawn together, P patches, Q queries, K points, T texture size.
"""

import io
import lzma
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.nano.assets.archive import Assets
from recipes.nano.assets.fonts import EM_SIZES
from recipes.nano.draw import commands, outlines
from recipes.nano.scenes import scene as scenes

PATCH = 14
IGNORED = -100
LINEAR, ROUND, CLOUDY, STRIPED = 1, 2, 3, 4  # kinds of backgrounds; 0 is plain


class Renderer:
    """Draws packed batches with textures kept on a device; the recipe's README documents inputs and outputs."""

    def __init__(self, assets: Assets, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.num_classes = len(scenes.dense_classes(assets.labels))
        self.glyphs = {em: self._glyph_tiles(assets, em) for em in EM_SIZES}
        fields = np.stack([outlines.distance_field(name) for name in scenes.SHAPES])
        self.shapes = torch.from_numpy(fields).to(self.device)[:, None]
        self.sprites = _load_images(assets.sprites, "RGBA").to(self.device)
        self.photos = _load_images(assets.photos, "RGB").to(self.device)
        # Made once: a constant made while drawing is a copy from the host that waits for the GPU.
        self.hue_turn = _hue_turn().to(self.device)
        self.axis = torch.arange(max(448, max(tiles.shape[2] for tiles, _ in self.glyphs.values())), device=self.device)
        self.centres = self.axis + 0.5
        self.channels = torch.arange(3, device=self.device)[:, None, None]

    def _glyph_tiles(self, assets: Assets, em: int) -> tuple[Tensor, Tensor]:
        """Return all glyphs of one size in equal tiles ``(faces * characters, h, w)`` uint8, and their tops."""
        boxes = assets.glyph_boxes[em].reshape(-1, 4).astype(np.int64)
        bits = np.frombuffer(lzma.decompress(assets.glyph_bits[em]), np.uint8)
        tiles = np.zeros((len(boxes), boxes[:, 3].max(), boxes[:, 2].max()), np.uint8)
        start = 0
        for tile, (_, _, width, height) in zip(tiles, boxes, strict=True):
            tile[:height, :width] = bits[start : start + width * height].reshape(height, width)
            start += width * height
        assert start == len(bits), f"glyphs of {em} px: {len(bits)} bytes of bitmaps, boxes ask for {start}"
        return torch.from_numpy(tiles).to(self.device), torch.from_numpy(boxes[:, 1].copy()).to(self.device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Draw a packed batch whose tensors are on the renderer's device; return images, masks and dense labels.

        There is no synchronisation with the host, so a training loop can queue the next images meanwhile.
        """
        size, valid = int(batch["size"]), batch["valid"]
        generator = torch.Generator(self.device).manual_seed(int(batch["seed"]))
        canvas = self._backgrounds(batch, valid, size, generator)
        points = torch.cat([_patch_points(size, len(valid), self.device), _query_points(size, valid)], 1)
        labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=self.device)
        self._draw_photos(canvas, labels, batch, valid)
        self._draw_boxes(canvas, labels, points, batch)
        self._draw_marks(canvas, labels, points, batch)
        self._draw_lines(canvas, labels, points, batch)
        pixels = self.axis[:size]
        mask = (pixels[:, None] < valid[:, :1, None]) & (pixels < valid[:, 1:, None])
        outside = (points[..., 1] >= valid[:, :1]) | (points[..., 0] >= valid[:, 1:])
        labels = labels.masked_fill(outside, IGNORED)
        patches = (size // PATCH) ** 2
        return {
            "pixel_values": _sensor(canvas, batch, generator).masked_fill_(~mask[:, None], -1.0),
            "pixel_mask": mask,
            "patch_labels": labels[:, :patches],
            "query_labels": labels[:, patches:].unflatten(1, (-1, 4 if size == 224 else 8)),
        }

    def _backgrounds(self, batch: Mapping[str, Any], valid: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return ``(N, 3, S, S)`` in 0..1: one colour, or two mixed by the kind of background."""
        values, rows = batch["background"], batch["background_rows"]
        canvas = values[:, 1:4, None, None].expand(-1, -1, size, size).contiguous()
        grains = torch.rand((len(values), 1, 9, 9), device=self.device, generator=generator)
        axis = self.centres[:size]
        for kind, start, end in batch["background_groups"]:
            chosen = rows[start:end]
            look = values[chosen]
            y = axis[:, None] / valid[chosen, :1, None] - 0.5
            x = axis / valid[chosen, 1:, None] - 0.5
            angle, frequency, phase = (look[:, i, None, None] for i in (7, 8, 9))
            if kind == ROUND:
                share = torch.hypot(x, y) * 1.6
            elif kind == CLOUDY:
                share = F.interpolate(grains[chosen], (size, size), mode="bicubic", align_corners=False)[:, 0]
            elif kind == STRIPED:
                turn = frequency * 6.3
                share = (x * angle.cos() * turn + phase + y * angle.sin() * turn).sin_().mul_(2).add_(0.5)
            else:
                share = x * angle.cos() + 0.5 + y * angle.sin()
            first, second = look[:, 1:4, None, None], look[:, 4:7, None, None]
            canvas.index_copy_(0, chosen, torch.lerp(first, second, share.clamp_(0, 1)[:, None]))
        return canvas

    # --- photographs -------------------------------------------------------------------------------------------------

    def _draw_photos(self, canvas: Tensor, labels: Tensor, batch: Mapping[str, Any], valid: Tensor) -> None:
        images, index, mixed = batch["photo_image"], batch["photo_index"], batch["photo_mixed"]
        if not len(images):
            return
        x, y, width, height, mirrored, hue, mix = batch["photo_values"].unbind(1)
        # A pixel at share u of the valid part samples the box at share u; grid_sample's range is -1 to 1.
        wide = width / valid[images, 1] * (1 - 2 * mirrored)
        high = height / valid[images, 0]
        zero = torch.zeros_like(x)
        maps = torch.stack([2 * wide, zero, 2 * (x + width * mirrored) - 1, zero, 2 * high, 2 * y - 1], 1)
        size = canvas.shape[-1]
        grid = self._pixel_grid(maps.unflatten(1, (2, 3)), size, size)
        shown = self._photo(index[:, 0], grid)
        if len(mixed):
            shown[mixed] = torch.lerp(shown[mixed], self._photo(index[mixed, 1], grid[mixed]), _each(mix[mixed]))
        turned = torch.bmm(self._hue_rotation(hue), shown.flatten(2))
        canvas.index_copy_(0, images, turned.view_as(shown))
        labels.index_fill_(0, images, scenes.OTHER)

    def _photo(self, index: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(self.photos[index].div(255.0), grid, padding_mode="reflection", align_corners=False)

    def _hue_rotation(self, angle: Tensor) -> Tensor:
        """Return rotations of colour space about the grey axis, ``(n, 3, 3)``."""
        across, turned, along = self.hue_turn
        return across * angle.cos()[:, None, None] + turned * angle.sin()[:, None, None] + along

    # --- bars of charts ----------------------------------------------------------------------------------------------

    def _draw_boxes(self, canvas: Tensor, labels: Tensor, points: Tensor, batch: Mapping[str, Any]) -> None:
        """Draw boxes; those of a layer do not overlap, so their coverage is a matrix product of rows and columns."""
        images = batch["box_image"]
        if not len(images):
            return
        size = canvas.shape[-1]
        shown = canvas[images]
        for values, classes in zip(batch["box_values"], batch["box_class"], strict=True):
            left, top, right, bottom, *_ = values.unbind(-1)
            across, down = self._covered(left, right, size), self._covered(top, bottom, size)
            paint = torch.cat([values[..., 4:], torch.ones_like(values[..., :1])], -1)
            rows = (down[..., None] * paint[:, :, None]).permute(0, 3, 2, 1)  # (B, 4, S, K)
            colour, alpha = torch.matmul(rows, across[:, None]).split((3, 1), 1)
            shown = torch.addcmul(colour, shown, 1 - alpha.clamp_(max=1))
            x, y = points[images, None].unbind(-1)
            inside = (x > left[..., None]) & (x < right[..., None]) & (y > top[..., None]) & (y < bottom[..., None])
            found = torch.where(inside & (classes[..., None] >= 0), classes[..., None], -1).amax(1)
            self._label(labels, images, found)
        canvas.index_copy_(0, images, shown)

    def _covered(self, start: Tensor, end: Tensor, size: int) -> Tensor:
        """Return the share of each pixel of an axis between ``start`` and ``end``: ``(B, K)`` -> ``(B, K, S)``."""
        pixel = self.axis[:size]
        return (torch.minimum(end[..., None], pixel + 1) - torch.maximum(start[..., None], pixel)).clamp_(0, 1)

    # --- shapes and sprites ------------------------------------------------------------------------------------------

    def _draw_marks(self, canvas: Tensor, labels: Tensor, points: Tensor, batch: Mapping[str, Any]) -> None:
        images, values, index = batch["mark_image"], batch["mark_values"], batch["mark_index"]
        if not len(images):
            return
        shown = len(images) - len(batch["sprite_index"])
        textures = {commands.SHAPE: self.shapes[index[:shown]], commands.SPRITE: self._sprite_textures(batch)}
        textures[commands.SMALL_SPRITE] = F.avg_pool2d(textures[commands.SPRITE], 2)
        x, y, half, cos, sin, stretch = values[:, :6].unbind(1)
        # Texture coordinates are -1 to 1, as in grid_sample; a distance field is larger than its shape.
        reach = torch.ones_like(half)
        reach[:shown].fill_(outlines.REACH)
        maps = _to_local(x, y, cos, sin, 1 / (half * stretch * reach), 1 / (half * reach))
        at_points = _apply(maps, points[images])[:, None]
        in_windows = _moved(maps, batch["mark_corner"])
        hits = []
        for kind, start, end, high, wide in batch["mark_groups"]:
            rows = slice(start, end)
            first = 0 if kind == commands.SHAPE else shown
            texture, mode = textures[kind][start - first : end - first], "border" if kind == commands.SHAPE else "zeros"
            grid = self._pixel_grid(in_windows[rows], high, wide)
            found = F.grid_sample(texture, grid, padding_mode=mode, align_corners=False)
            under = F.grid_sample(texture[:, -1:], at_points[rows], padding_mode=mode, align_corners=False)[:, 0, 0]
            window = self._window(images[rows], batch["mark_corner"][rows], high, wide)
            if kind == commands.SHAPE:
                colour, alpha = _shade(found, half[rows], values[rows, 6:])
                canvas[window] = torch.lerp(canvas[window], colour, alpha)
                hits.append(under < 0)
            else:  # premultiplied alpha
                canvas[window] = torch.addcmul(found[:, :3], canvas[window], 1 - found[:, 3:])
                hits.append(under > 0.5)
        self._label(labels, images, torch.where(torch.cat(hits), batch["mark_class"][:, None], -1))

    def _label(self, labels: Tensor, images: Tensor, classes: Tensor) -> None:
        """Label points ``(N, k)`` with the class ``(n, k)`` of the last thing drawn there; -1 means it is not there."""
        count = self.num_classes
        order = torch.arange(len(classes), device=self.device)[:, None] * count
        last = torch.full_like(labels, -1)
        keys = torch.where(classes < 0, -1, classes + order)
        last.scatter_reduce_(0, images[:, None].expand_as(keys), keys, "amax")
        labels.copy_(torch.where(last < 0, labels, last % count))

    def _window(self, images: Tensor, corner: Tensor, high: int, wide: int) -> tuple[Tensor, ...]:
        """Return indices of windows ``(n, 3, high, wide)`` of the canvas, given their upper left corners (y, x)."""
        rows, columns = corner[:, :1] + self.axis[:high], corner[:, 1:] + self.axis[:wide]
        return images[:, None, None, None], self.channels, rows[:, None, :, None], columns[:, None, None]

    def _pixel_grid(self, maps: Tensor, high: int, wide: int) -> Tensor:
        """Evaluate the maps ``(n, 2, 3)`` at all pixel centres: ``(n, high, wide, 2)``."""
        across = torch.addcmul(maps[:, None, :, 2], self.centres[:wide, None], maps[:, None, :, 0])
        return across[:, None] + (self.centres[:high, None] * maps[:, None, :, 1])[:, :, None]

    def _sprite_textures(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the batch's sprites ``(n, 4, T, T)`` with premultiplied alpha, after their changes of style."""
        outlined = batch["sprite_outlined"]
        texture = self.sprites[batch["sprite_index"]].div(255.0)
        if not len(texture):
            return texture
        hue, saturation, gain, bias, outline, levels, _ = batch["sprite_look"].unbind(1)
        colour, alpha = texture[:, :3], texture[:, 3:]
        steps = _each((levels - 1).clamp(min=1))
        colour = torch.where(_each(levels) > 0, (colour * steps).round_().div_(steps), colour)
        # Hue rotates, saturation and gain scale: one matrix, since grey stays grey.
        along = self.hue_turn[2]
        turn = self._hue_rotation(hue) - along
        matrix = (turn * saturation[:, None, None] + along) * gain[:, None, None]
        styled = torch.baddbmm(bias[:, None, None], matrix, colour.flatten(2)).clamp_(0, 1).view_as(colour)
        texture = torch.cat([styled.mul_(alpha), alpha], 1)
        if len(outlined):
            strength, inside = _each(outline[outlined]), alpha[outlined]
            grey = colour[outlined].mean(1, keepdim=True)
            edges = (_edges(grey * inside) * 1.5 + _edges(inside)).clamp_(0, 1)
            # The outer half of the outline: black around the sprite.
            around = torch.maximum(inside, strength * F.max_pool2d(inside, 5, 1, 2))
            texture[outlined] = torch.cat([texture[outlined, :3] * (1 - strength * edges), around], 1)
        return texture

    # --- text --------------------------------------------------------------------------------------------------------

    def _draw_lines(self, canvas: Tensor, labels: Tensor, points: Tensor, batch: Mapping[str, Any]) -> None:
        images, values, corner = (batch[f"line_{name}"] for name in ("image", "values", "corner"))
        if not len(images):
            return
        x, y, cos, sin, scale, em = values[:, :6].unbind(1)
        maps = _to_local(x, y, cos, sin, scale, scale)
        in_windows = _moved(maps, corner)
        strips = {group[0]: (group[1], *self._typeset(batch, group)) for group in batch["line_strips"]}
        for atlas, start, end, window_high, window_wide in batch["line_groups"]:
            first, strip, left, baseline = strips[atlas]
            high, wide = strip.shape[2:]
            # Strip coordinates are -1 to 1, as in grid_sample.
            across, down = in_windows[start:end].unbind(1)
            to_strip = torch.stack([across * (2 / wide), down * (2 / high)], 1)
            to_strip[:, 0, 2] += 2 * left / wide - 1
            to_strip[:, 1, 2] += 2 * baseline / high - 1
            grid = self._pixel_grid(to_strip, window_high, window_wide)
            alpha = F.grid_sample(strip[start - first : end - first], grid, align_corners=False)
            window = self._window(images[start:end], corner[start:end], window_high, window_wide)
            canvas[window] = torch.lerp(canvas[window], values[start:end, 6:, None, None], alpha)
        # Label: the character whose advance contains the point, if the point is at the height of its glyph.
        local = _apply(maps, points[images])
        character = torch.searchsorted(batch["line_edges"], local[..., 0].contiguous(), right=True) - 1
        before = character < 0
        character = character.clamp_(min=0)
        classes = batch["line_classes"].gather(1, character)
        extents = batch["line_extents"].gather(1, character[..., None].expand(-1, -1, 2))
        slack = em[:, None] * 0.08
        inside = (local[..., 1] > extents[..., 0] - slack) & (local[..., 1] < extents[..., 1] + slack)
        self._label(labels, images, torch.where(inside & ~before & (classes > 0), classes, -1))

    def _typeset(self, batch: Mapping[str, Any], group: tuple[int, ...]) -> tuple[Tensor, int, int]:
        """Copy glyph tiles into a strip per line, ``(n, 1, h, w)`` in atlas pixels; also return the pen's start."""
        atlas, start, end, first, last, widest = group
        em = EM_SIZES[atlas]
        tiles, tops = self.glyphs[em]
        margin, baseline = em // 2, int(em * 1.2)
        high, wide = int(em * 1.8), widest + 2 * em + tiles.shape[2]
        index = batch["glyph_index"][first:last]
        rows = (baseline + tops[index])[:, None] + self.axis[: tiles.shape[1]]
        columns = (margin + batch["glyph_x"][first:last])[:, None] + self.axis[: tiles.shape[2]]
        line = batch["glyph_line"][first:last, None] - start
        rows = (line * high + rows.clamp_(0, high - 1)) * wide
        places = rows[:, :, None] + columns.clamp_(min=0)[:, None]
        strips = torch.zeros((end - start) * high * wide, device=self.device)
        # The larger value wins where tiles overlap.
        strips.scatter_reduce_(0, places.flatten(), tiles[index].div(255.0).flatten(), "amax")
        return strips.view(end - start, 1, high, wide), margin, baseline


def _load_images(files: list[bytes], mode: str) -> Tensor:
    """Decode images to ``(n, channels, T, T)`` uint8, T the largest side."""
    opened = [Image.open(io.BytesIO(content)).convert(mode) for content in files]
    side = max((max(image.size) for image in opened), default=1)
    arrays = [np.asarray(p if p.size == (side, side) else p.resize((side, side))) for p in opened]
    stacked = np.stack(arrays) if arrays else np.zeros((0, side, side, len(mode)), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def _patch_points(size: int, images: int, device: torch.device) -> Tensor:
    """Return the patch centres in pixels, x then y: ``(N, P, 2)``."""
    axis = torch.arange(size // PATCH, device=device) * float(PATCH) + PATCH / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 2).expand(images, -1, -1)


def _query_points(size: int, valid: Tensor) -> Tensor:
    """Return the queries' points in pixels, ``(N, Q * K, 2)``, row-major in a query's cell (see the README)."""
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
    """Return affine maps ``(n, 2, 3)`` from pixels to a thing's own axes: translate, rotate back, scale."""
    a, b, c, d = cos * scale_x, sin * scale_x, -sin * scale_y, cos * scale_y
    return torch.stack([a, b, -(a * x + b * y), c, d, -(c * x + d * y)], 1).unflatten(1, (2, 3))


def _apply(maps: Tensor, points: Tensor) -> Tensor:
    """Apply maps ``(n, 2, 3)`` to points ``(n, k, 2)``."""
    # Not a matrix product: that may run in TF32, too coarse for pixel positions.
    return points[..., :1] * maps[:, None, :, 0] + points[..., 1:] * maps[:, None, :, 1] + maps[:, None, :, 2]


def _moved(maps: Tensor, corner: Tensor) -> Tensor:
    """Shift maps ``(n, 2, 3)`` to pixels that are counted from ``corner`` ``(n, 2)``, y and x."""
    offset = maps[..., 2] + maps[..., 0] * corner[:, 1:] + maps[..., 1] * corner[:, :1]
    return torch.cat([maps[..., :2], offset[..., None]], 2)


def _shade(distance: Tensor, half: Tensor, look: Tensor) -> tuple[Tensor, Tensor]:
    """Turn distance fields ``(n, 1, h, w)`` into colour and alpha, with edges one pixel soft."""
    fill, border = look[:, :3, None, None], look[:, 4:7, None, None]
    width, hollow, half = _each(look[:, 3]), _each(look[:, 7]), _each(half)
    inwards = 0.5 - distance * half  # pixels
    alpha = inwards.clamp(0, 1)
    inner = torch.where(width > 0, (inwards - width * half).clamp_(0, 1), 1.0)
    return torch.lerp(border, fill, inner), torch.where(hollow > 0, alpha * (1 - inner), alpha)


def _each(values: Tensor) -> Tensor:
    """Reshape ``(n,)`` to ``(n, 1, 1, 1)``."""
    return values[:, None, None, None]


def _hue_turn() -> Tensor:
    """Return ``(3, 3, 3)``: the parts of a rotation about the grey axis for its cosine, its sine, and one."""
    grey = torch.full((3, 3), 1 / 3)
    root = 3**-0.5
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]])
    return torch.stack([torch.eye(3) - grey, cross, grey])


def _edges(plane: Tensor) -> Tensor:
    """Return how much a plane ``(n, 1, T, T)`` changes from pixel to pixel, spread by one pixel."""
    step = (plane[..., 1:, :-1] - plane[..., :-1, :-1]).abs() + (plane[..., :-1, 1:] - plane[..., :-1, :-1]).abs()
    return F.max_pool2d(F.pad(step, (0, 1, 0, 1)), 3, 1, 1)


def _sensor(canvas: Tensor, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Apply blur, brightness, contrast and noise in place, and map 0..1 to -1..1."""
    brightness, contrast, blur, noise = batch["sensor"].unbind(1)
    blurred, noisy = batch["blurred"], batch["noisy"]
    if len(blurred):
        sharp = canvas[blurred]
        soft = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)
        canvas.index_copy_(0, blurred, sharp.lerp_(soft, _each(blur[blurred])))
    canvas.mul_(_each(2 * contrast)).add_(_each(2 * brightness - contrast))
    if len(noisy):
        grain = torch.randn((len(noisy), *canvas.shape[1:]), device=canvas.device, generator=generator)
        canvas.index_add_(0, noisy, grain.mul_(_each(2 * noise[noisy])))
    return canvas.clamp_(-1, 1)
