"""Outlines of the named shapes as polygons, and their signed distance fields."""

import numpy as np

RESOLUTION = 128
REACH = 1.25  # distance fields cover [-REACH, REACH] squared; shapes fill [-1, 1]


def outline(name: str) -> np.ndarray:
    """Return the corners ``(n, 2)`` of a shape: x right, y down, longest half-extent 1."""
    if name in _CORNERS:
        return np.array(_CORNERS[name], float)
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if name == "circle":
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if name == "oval":
        return np.stack([np.cos(turn), 0.6 * np.sin(turn)], 1)
    if name == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x, -y - 2.5], 1) / 16
    if name == "star":
        radius = np.where(np.arange(10) % 2, 0.42, 1.0)
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
    corners = {"pentagon": 5, "hexagon": 6}[name]
    turn = np.arange(corners) * 2 * np.pi / corners - (np.pi / 2 if corners == 5 else 0)
    return np.stack([np.cos(turn), np.sin(turn)], 1)


_CORNERS = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "rectangle": [(-1, -0.52), (1, -0.52), (1, 0.52), (-1, 0.52)],
    "triangle": [(0, -0.9), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "cross": [
        *[(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)],
        *[(0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)],
    ],
    "arrow": [(-1, -0.28), (0.1, -0.28), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.28), (-1, 0.28)],
}


def distance_field(name: str) -> np.ndarray:
    """Return the signed distance to the outline, negative inside: ``(RESOLUTION, RESOLUTION)`` float32."""
    axis = (np.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 * REACH - REACH
    points = np.stack(np.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 1, 2)
    corners = outline(name)
    edges = np.roll(corners, -1, 0) - corners
    offset = points - corners
    along = np.clip((offset * edges).sum(-1) / (edges**2).sum(-1), 0, 1)
    distance = np.linalg.norm(offset - along[..., None] * edges, axis=-1).min(1)
    # A point is inside when a ray to the right crosses the outline an odd number of times.
    y, y_next = corners[:, 1], np.roll(corners[:, 1], -1)
    crosses = (y > points[..., 1]) != (y_next > points[..., 1])
    slope = edges[:, 0] / np.where(edges[:, 1] == 0, 1, edges[:, 1])
    right = points[..., 0] < corners[:, 0] + slope * (points[..., 1] - y)
    inside = (crosses & right).sum(1) % 2 == 1
    return np.where(inside, -distance, distance).reshape(RESOLUTION, RESOLUTION).astype(np.float32)
