"""Scenes -> arrays of drawing commands for a whole batch, sorted into the groups that are drawn together.

N pictures, W lines of text, G glyphs, M marks (shapes and sprites).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes.nano import scenes
from recipes.nano.assets import Assets
from recipes.nano.fonts import CHARACTERS, EM_SIZES
from recipes.nano.scenes import Line, Mark, Scene

SHAPE, SPRITE, SMALL_SPRITE = 0, 1, 2  # kinds of marks; small sprites are drawn from textures of half the size
SMALL = 36.0  # half-width in pixels under which a sprite is small
LONGEST_LINE = 40  # characters


def pack(batch: Sequence[Scene], assets: Assets) -> dict[str, Any]:
    """Everything the renderer reads: arrays named below and ``line_groups``, ``mark_groups`` (lists of int tuples)."""
    lines = sorted(
        ((atlas_for(line.em), slot, n, line) for n, scene in enumerate(batch) for slot, line in enumerate(scene.lines)),
        key=lambda item: item[:3],
    )
    marks = sorted(
        ((_kind(mark), slot, n, mark) for n, scene in enumerate(batch) for slot, mark in enumerate(scene.marks)),
        # Slots first: of one picture, a later mark is drawn over an earlier one.
        key=lambda item: (item[1], item[0], item[2]),
    )
    commands: dict[str, Any] = {
        "valid": np.array([(scene.height, scene.width) for scene in batch], np.int64),
        "background": np.array([scene.background for scene in batch], np.float32),
        "sensor": np.array([scene.sensor for scene in batch], np.float32),
        "mark_groups": _groups([(item[0], item[1]) for item in marks]),
        "mark_picture": np.array([n for _, _, n, _ in marks], np.int64),
        "mark_index": np.array([mark.index for *_, mark in marks], np.int64),
        "mark_class": np.array([dense_class(mark, assets) for *_, mark in marks], np.int64),
        "mark_values": np.array([_mark_values(mark) for *_, mark in marks], np.float32).reshape(len(marks), 14),
    }
    return commands | _pack_photos(batch) | _pack_lines(lines, assets)


def atlas_for(em: float) -> int:
    """Which of ``EM_SIZES`` a line of size ``em`` is drawn from: the smallest that needs at most 12 % enlarging."""
    return next((i for i, size in enumerate(EM_SIZES) if size * 1.12 >= em), len(EM_SIZES) - 1)


def dense_class(mark: Mark, assets: Assets) -> int:
    """The dense class of a mark."""
    if mark.kind == "shape":
        colour = scenes.COLOUR_NAMES.index(mark.colour_name)
        return scenes.FIRST_SHAPE + mark.index * len(scenes.COLOURS) + colour
    return scenes.FIRST_EMOJI + mark.index % len(assets.emoji)


def _kind(mark: Mark) -> int:
    return SHAPE if mark.kind == "shape" else SMALL_SPRITE if mark.size < SMALL else SPRITE


def _mark_values(mark: Mark) -> list[float]:
    look = [*mark.look, *[0.0] * (8 - len(mark.look))]
    return [mark.x, mark.y, mark.size, np.cos(mark.angle), np.sin(mark.angle), mark.stretch, *look]


def _groups(keys: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Runs of equal keys: (key, key, start, end)."""
    runs: list[tuple[int, int, int, int]] = []
    for position, key in enumerate(keys):
        if runs and runs[-1][:2] == key:
            runs[-1] = (*key, runs[-1][2], position + 1)
        else:
            runs.append((*key, position, position + 1))
    return runs


def _pack_photos(batch: Sequence[Scene]) -> dict[str, np.ndarray]:
    """``photo_*``: picture number, two indices, and (box, mirrored, hue, mix) of each photograph."""
    shown = [(n, scene.photo) for n, scene in enumerate(batch) if scene.photo]
    return {
        "photo_picture": np.array([n for n, _ in shown], np.int64),
        "photo_index": np.array([(p.index, max(p.other, 0)) for _, p in shown], np.int64).reshape(len(shown), 2),
        "photo_values": np.array([(*p.box, p.mirrored, p.hue, p.mix) for _, p in shown], np.float32).reshape(-1, 7),
    }


def _pack_lines(lines: Sequence[tuple[int, int, int, Line]], assets: Assets) -> dict[str, Any]:
    """``line_*`` (W, ...) and ``glyph_*`` (G, ...), positions in pixels of the atlas a line is drawn from.

    ``line_edges`` (W, LONGEST_LINE + 1) holds where each character begins, then where the line ends, then infinity;
    ``line_classes`` and ``line_extents`` (top and bottom of the glyph) go with it for the dense labels.
    """
    count = len(lines)
    edges = np.full((count, LONGEST_LINE + 1), np.inf, np.float32)
    classes = np.zeros((count, LONGEST_LINE + 1), np.int64)
    extents = np.zeros((count, LONGEST_LINE + 1, 2), np.float32)
    values = np.zeros((count, 8), np.float32)
    glyph_line, glyph_index, glyph_x = [], [], []
    ends = []
    for w, (atlas, _, _, line) in enumerate(lines):
        assert len(line.text) <= LONGEST_LINE, f"a line of {len(line.text)} characters, at most {LONGEST_LINE} fit"
        size = EM_SIZES[atlas]
        codes = np.frombuffer(line.text.encode("ascii"), np.uint8).astype(np.int64) - 32
        pens = np.concatenate([[0.0], np.cumsum(assets.face_metrics[line.face, codes] + line.spacing)]) * size
        edges[w, : len(pens)] = pens
        drawn = codes > 0
        glyphs = codes[drawn] - 1
        classes[w, : len(codes)][drawn] = scenes.FIRST_CHARACTER + glyphs
        boxes = assets.glyph_boxes[size][line.face, glyphs]
        extents[w, : len(codes)][drawn] = np.stack([boxes[:, 1], boxes[:, 1] + boxes[:, 3]], 1)
        values[w] = (line.x, line.y, np.cos(line.angle), np.sin(line.angle), size / line.em, *line.colour)
        glyph_line.append(np.full(len(glyphs), w))
        glyph_index.append(line.face * len(CHARACTERS) + glyphs)
        glyph_x.append(np.rint(pens[:-1][drawn]).astype(np.int64) + boxes[:, 0])
        ends.append((int(sum(map(len, glyph_line))), float(pens[-1])))
    groups = []
    for atlas, slot, start, end in _groups([(item[0], item[1]) for item in lines]):
        first = ends[start - 1][0] if start else 0
        widest = int(max(width for _, width in ends[start:end]))
        groups.append((atlas, slot, start, end, first, ends[end - 1][0], widest))
    empty = [np.zeros(0, np.int64)]
    return {
        "line_groups": groups,
        "line_picture": np.array([n for _, _, n, _ in lines], np.int64),
        "line_values": values,
        "line_edges": edges,
        "line_classes": classes,
        "line_extents": extents,
        "glyph_line": np.concatenate(glyph_line or empty).astype(np.int64),
        "glyph_index": np.concatenate(glyph_index or empty),
        "glyph_x": np.concatenate(glyph_x or empty),
    }
