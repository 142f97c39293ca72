"""Scenes -> arrays of drawing commands for a batch, sorted into groups that are drawn together.

N images, W lines of text, G glyphs, M marks (shapes and sprites), B images with boxes, K boxes of one of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes.nano.assets.archive import Assets
from recipes.nano.assets.fonts import CHARACTERS, EM_SIZES
from recipes.nano.scenes import scene as scenes
from recipes.nano.scenes.scene import Line, Mark, Scene

SHAPE, SPRITE, SMALL_SPRITE = 0, 1, 2  # kinds of marks; small sprites use textures of half the size
SMALL = 36.0  # half-width in pixels below which a sprite is small
LONGEST_LINE = 40  # characters
Box = tuple[float, float, float, float]  # left, top, right, bottom


def pack(batch: Sequence[Scene], assets: Assets) -> dict[str, Any]:
    """Return what the renderer reads: arrays, and lists of int tuples ``*_groups`` that define what is drawn together.

    Decided here, so that the renderer never waits for the device: which images need which step, and how large a window
    of the canvas each group needs.
    """
    sensor = np.array([scene.sensor for scene in batch], np.float32)
    return {
        "valid": np.array([(scene.height, scene.width) for scene in batch], np.int64),
        "background": np.array([scene.background for scene in batch], np.float32),
        "sensor": sensor,
        "blurred": np.flatnonzero(sensor[:, 2]).astype(np.int64),
        "noisy": np.flatnonzero(sensor[:, 3]).astype(np.int64),
        **_pack_backgrounds(batch),
        **_pack_photos(batch),
        **_pack_boxes(batch),
        **_pack_marks(batch, assets),
        **_pack_lines(batch, assets),
    }


def atlas_for(em: float) -> int:
    """Return the index into ``EM_SIZES`` for a line of size ``em``: the smallest that is enlarged by at most 12 %."""
    return next((i for i, size in enumerate(EM_SIZES) if size * 1.12 >= em), len(EM_SIZES) - 1)


def dense_class(mark: Mark, assets: Assets) -> int:
    """Return the dense class of a mark."""
    if mark.kind == "shape":
        colour = scenes.COLOUR_NAMES.index(mark.colour_name)
        return scenes.FIRST_SHAPE + mark.index * len(scenes.COLOURS) + colour
    return scenes.FIRST_EMOJI + mark.index % len(assets.emoji)


def _groups(keys: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return runs of equal keys: (*key, start, end)."""
    runs: list[tuple[int, ...]] = []
    for position, key in enumerate(keys):
        if runs and runs[-1][:-2] == key:
            runs[-1] = (*key, runs[-1][-2], position + 1)
        else:
            runs.append((*key, position, position + 1))
    return runs


def _windows(boxes: np.ndarray, size: int) -> tuple[np.ndarray, int, int]:
    """Return windows of one size around ``boxes`` (n, 4): corners (y, x), height, width."""
    high, wide = (min(size, _up(np.ptp(boxes[:, axis::2], axis=1).max())) for axis in (1, 0))
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    corners = np.floor(middle[:, ::-1] - np.array([high, wide]) / 2).astype(np.int64)
    return np.clip(corners, 0, [size - high, size - wide]), high, wide


def _up(length: float) -> int:
    """Round up to pixels that cover ``length`` at any offset, in steps of eight: few sizes suit the allocator."""
    return -(-(math.ceil(length) + 2) // 8) * 8


def _turned(box: Box, x: float, y: float, angle: float) -> Box:
    """Return the axis-aligned bounding box of a ``box`` rotated about 0, 0 and moved to x, y."""
    left, top, right, bottom = box
    cos, sin = math.cos(angle), math.sin(angle)
    across = [u * cos - v * sin + x for u in (left, right) for v in (top, bottom)]
    down = [u * sin + v * cos + y for u in (left, right) for v in (top, bottom)]
    return min(across), min(down), max(across), max(down)


def _pack_backgrounds(batch: Sequence[Scene]) -> dict[str, Any]:
    """Pack ``background_groups`` (kind, start, end) over ``background_rows``, without plain and covered ones."""
    mixed = sorted((int(s.background[0]), n) for n, s in enumerate(batch) if s.background[0] and not s.photo)
    return {
        "background_groups": _groups([(kind,) for kind, _ in mixed]),
        "background_rows": np.array([n for _, n in mixed], np.int64),
    }


def _pack_photos(batch: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Pack ``photo_*``: image number, two indices, and (box, mirrored, hue, mix) of each; which are mixed."""
    shown = [(n, scene.photo) for n, scene in enumerate(batch) if scene.photo]
    return {
        "photo_image": np.array([n for n, _ in shown], np.int64),
        "photo_index": np.array([(p.index, max(p.other, 0)) for _, p in shown], np.int64).reshape(len(shown), 2),
        "photo_values": np.array([(*p.box, p.mirrored, p.hue, p.mix) for _, p in shown], np.float32).reshape(-1, 7),
        "photo_mixed": np.array([i for i, (_, p) in enumerate(shown) if p.mix], np.int64),
    }


def _pack_boxes(batch: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Pack ``box_*``: image numbers (B,), and per layer the corners and colours (B, K, 7) and classes (B, K).

    K is the same for all images, so that one matrix product draws them; padding boxes have no area. The class of
    unlabelled boxes is -1.
    """
    charts = [(n, scene.boxes) for n, scene in enumerate(batch) if scene.boxes]
    most = max((len(boxes) for _, boxes in charts), default=0)
    values = np.zeros((scenes.LAYERS, len(charts), most, 7), np.float32)
    classes = np.full((scenes.LAYERS, len(charts), most), -1, np.int64)
    bar = scenes.FIRST_SHAPE + scenes.SHAPES.index("rectangle") * len(scenes.COLOURS)
    for row, (_, boxes) in enumerate(charts):
        for column, box in enumerate(boxes):
            place = box.layer, row, column
            values[place] = (box.left, box.top, box.right, box.bottom, *box.colour)
            if box.colour_name:
                classes[place] = bar + scenes.COLOUR_NAMES.index(box.colour_name)
    return {"box_image": np.array([n for n, _ in charts], np.int64), "box_values": values, "box_class": classes}


def _pack_marks(batch: Sequence[Scene], assets: Assets) -> dict[str, Any]:
    """Pack ``mark_*`` (M, ...), ``sprite_*`` of the sprites among them, and ``mark_groups``.

    Shapes come first. A group is (kind, start, end, window height, window width). Values are x, y, half-width, cosine,
    sine, stretch (negative if mirrored), look.
    """
    marks = sorted(
        (
            (mark.kind == "sprite", slot, _kind(mark), _reach(mark, scene.size), n, mark)
            for n, scene in enumerate(batch)
            for slot, mark in enumerate(scene.marks)
        ),
        # Slots first: within an image, a later mark is drawn over an earlier one.
        key=lambda item: item[:5],
    )
    boxes = np.array([_mark_box(mark) for *_, mark in marks]).reshape(-1, 4)
    corners = np.zeros((len(marks), 2), np.int64)
    groups = []
    for _, _, kind, _, start, end in _groups([item[:4] for item in marks]):
        corners[start:end], high, wide = _windows(boxes[start:end], batch[0].size)
        groups.append((kind, start, end, high, wide))
    looks = np.array([mark.look for *_, mark in marks if mark.kind == "sprite"], np.float32).reshape(-1, 7)
    return {
        "mark_groups": groups,
        "mark_image": np.array([item[4] for item in marks], np.int64),
        "mark_corner": corners,
        "mark_index": np.array([mark.index for *_, mark in marks], np.int64),
        "mark_class": np.array([dense_class(mark, assets) for *_, mark in marks], np.int64),
        "mark_values": np.array([_mark_values(mark) for *_, mark in marks], np.float32).reshape(-1, 14),
        "sprite_index": np.array([mark.index for *_, mark in marks if mark.kind == "sprite"], np.int64),
        "sprite_look": looks,
        "sprite_outlined": np.flatnonzero(looks[:, 4]).astype(np.int64),
    }


def _kind(mark: Mark) -> int:
    return SHAPE if mark.kind == "shape" else SMALL_SPRITE if mark.size < SMALL else SPRITE


def _reach(mark: Mark, size: int) -> int:
    """Return a size class, drawn separately: 0, 1 or 2 for up to a quarter, half or all of the canvas."""
    left, top, right, bottom = _mark_box(mark)
    longer = _up(max(right - left, bottom - top))
    return int(longer > size // 4) + int(longer > size // 2)


def _mark_box(mark: Mark) -> Box:
    """Return the area that a mark may change: its square, the soft edge and the interpolation between texels."""
    across, down = mark.size * mark.stretch, mark.size
    across, down = across * 1.03 + 1, down * 1.03 + 1
    return _turned((-across, -down, across, down), mark.x, mark.y, mark.angle)


def _mark_values(mark: Mark) -> list[float]:
    look = [*mark.look, *[0.0] * (8 - len(mark.look))]
    mirrored = mark.kind == "sprite" and mark.look[6] > 0
    stretch = -mark.stretch if mirrored else mark.stretch
    return [mark.x, mark.y, mark.size, np.cos(mark.angle), np.sin(mark.angle), stretch, *look]


def _pack_lines(batch: Sequence[Scene], assets: Assets) -> dict[str, Any]:
    """Pack ``line_*`` (W, ...) and ``glyph_*`` (G, ...); positions are in pixels of the line's atlas.

    ``line_strips`` has (atlas, start, end, first glyph, last glyph, widest line) of lines that are typeset together,
    ``line_groups`` (atlas, start, end, window height, window width) of lines that are drawn together. ``line_edges``
    (W, LONGEST_LINE + 1) has the start of each character, then the end of the line, then infinity. ``line_classes``
    and ``line_extents`` (top and bottom of each glyph) belong to it and give the dense labels.
    """
    lines = sorted(
        ((atlas_for(line.em), slot, n, line) for n, scene in enumerate(batch) for slot, line in enumerate(scene.lines)),
        key=lambda item: item[:3],
    )
    count = len(lines)
    arrays: dict[str, np.ndarray] = {
        "line_edges": np.full((count, LONGEST_LINE + 1), np.inf, np.float32),
        "line_classes": np.zeros((count, LONGEST_LINE + 1), np.int64),
        "line_extents": np.zeros((count, LONGEST_LINE + 1, 2), np.float32),
        "line_values": np.zeros((count, 9), np.float32),
        "line_corner": np.zeros((count, 2), np.int64),
    }
    glyph_line, glyph_index, glyph_x = [], [], []
    boxes, widths = np.zeros((count, 4)), np.zeros(count)
    for w, (atlas, _, _, line) in enumerate(lines):
        glyphs, columns, ink, widths[w] = _set_line(arrays, w, line, EM_SIZES[atlas], assets)
        boxes[w] = _turned(ink, line.x, line.y, line.angle)
        glyph_line.append(np.full(len(glyphs), w))
        glyph_index.append(line.face * len(CHARACTERS) + glyphs)
        glyph_x.append(columns)
    ends = np.cumsum([0, *map(len, glyph_index)]).tolist()
    strips = [
        (atlas, start, end, ends[start], ends[end], int(widths[start:end].max()))
        for atlas, start, end in _groups([item[:1] for item in lines])
    ]
    groups = []
    for atlas, _, start, end in _groups([item[:2] for item in lines]):
        arrays["line_corner"][start:end], high, wide = _windows(boxes[start:end], batch[0].size)
        groups.append((atlas, start, end, high, wide))
    empty = [np.zeros(0, np.int64)]
    return {
        "line_strips": strips,
        "line_groups": groups,
        "line_image": np.array([n for _, _, n, _ in lines], np.int64),
        **arrays,
        "glyph_line": np.concatenate(glyph_line or empty).astype(np.int64),
        "glyph_index": np.concatenate(glyph_index or empty),
        "glyph_x": np.concatenate(glyph_x or empty),
    }


def _set_line(
    arrays: dict[str, np.ndarray], w: int, line: Line, size: int, assets: Assets
) -> tuple[np.ndarray, np.ndarray, Box, float]:
    """Fill row ``w`` of the arrays; return the glyphs, their starts, the box of their ink, and the width."""
    assert len(line.text) <= LONGEST_LINE, f"a line of {len(line.text)} characters, at most {LONGEST_LINE} fit"
    codes = np.frombuffer(line.text.encode("ascii"), np.uint8).astype(np.int64) - 32
    pens = np.concatenate([[0.0], np.cumsum(assets.face_metrics[line.face, codes] + line.spacing)]) * size
    arrays["line_edges"][w, : len(pens)] = pens
    drawn = codes > 0
    glyphs = codes[drawn] - 1
    arrays["line_classes"][w, : len(codes)][drawn] = scenes.FIRST_CHARACTER + glyphs
    left, top, wide, high = assets.glyph_boxes[size][line.face, glyphs].T.astype(np.int64)
    arrays["line_extents"][w, : len(codes)][drawn] = np.stack([top, top + high], 1)
    turn = np.cos(line.angle), np.sin(line.angle)
    arrays["line_values"][w] = (line.x, line.y, *turn, size / line.em, size, *line.colour)
    columns = np.rint(pens[:-1][drawn]).astype(np.int64) + left
    shrunk = line.em / size
    # One pixel more on each side, for interpolation.
    ink = (
        (min(columns, default=0) - 1) * shrunk,
        (min(top, default=0) - 1) * shrunk,
        (max(columns + wide, default=0) + 1) * shrunk,
        (max(top + high, default=0) + 1) * shrunk,
    )
    return glyphs, columns, ink, float(pens[-1])
