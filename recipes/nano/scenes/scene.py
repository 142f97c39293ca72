"""The data of planned images (text, shapes, emoji, bars, photographs), and the names of shapes, colours and classes.

Nothing is drawn here. Coordinates of a ``Scene`` are pixels of the model's input. ``render.py`` draws batches of scenes
on the GPU for training; ``paint.py`` draws single ones with PIL at the size of a user's image. A ``Story`` is a
conversation about one scene or several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.nano.assets.fonts import CHARACTERS

TASKS = ("words", "shapes", "emoji", "not sure", "lines", "charts")  # about one image
STORIES = ("clips", "several", "search")  # about more than one
SHAPES = (
    *("circle", "square", "triangle", "rectangle", "star", "heart"),
    *("pentagon", "hexagon", "diamond", "oval", "cross", "arrow"),
)
# Name -> ranges of hue (degrees), saturation and value; in the gaps between them people disagree.
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 6), (0.78, 1.0), (0.7, 1.0)),
    "orange": ((24, 35), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((50, 60), (0.75, 1.0), (0.9, 1.0)),
    "green": ((95, 145), (0.55, 1.0), (0.4, 0.85)),
    "blue": ((208, 242), (0.65, 1.0), (0.5, 1.0)),
    "purple": ((270, 292), (0.5, 1.0), (0.4, 0.8)),
    "pink": ((318, 345), (0.3, 0.6), (0.95, 1.0)),
    "brown": ((16, 30), (0.6, 0.9), (0.35, 0.55)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.1)),
    "white": ((0, 360), (0.0, 0.03), (0.96, 1.0)),
    "grey": ((0, 360), (0.0, 0.06), (0.42, 0.65)),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND, OTHER, FIRST_CHARACTER = 0, 1, 2
FIRST_SHAPE = FIRST_CHARACTER + len(CHARACTERS)
FIRST_EMOJI = FIRST_SHAPE + len(SHAPES) * len(COLOURS)
Colour = tuple[float, float, float]


def dense_classes(labels: Sequence[str]) -> list[str]:
    """Return the names of the dense classes: background, other, characters, shape x colour, emoji labels."""
    shapes = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    return ["background", "other", *CHARACTERS, *shapes, *labels]


@dataclass
class Line:
    """A line of text; ``x, y`` is the start on the baseline, ``angle`` is clockwise in radians, ``em`` is in pixels."""

    text: str
    face: int
    em: float
    x: float
    y: float
    angle: float
    spacing: float
    colour: Colour
    colour_name: str


@dataclass
class Mark:
    """A shape or sprite of half-width ``size`` around ``x, y``.

    ``look`` of a shape: fill, border width (share of the size, 0 for none), border colour, hollow. ``look`` of a
    sprite: hue shift (radians), saturation, gain, bias, outline, levels (0 for all), mirrored.
    """

    kind: str  # "shape" or "sprite"
    index: int  # into SHAPES, or into the sprites
    x: float
    y: float
    size: float
    angle: float
    stretch: float
    look: tuple[float, ...]
    name: str  # "circle" or an emoji's label
    colour_name: str = ""

    @property
    def title(self) -> str:
        """The name with its colour, such as "red circle", or the emoji's label."""
        return f"{self.colour_name} {self.name}" if self.colour_name else self.name


@dataclass
class Box:
    """An axis-aligned rectangle of a chart: a bar, an axis or a grid line.

    Boxes of a lower ``layer`` (0 to ``LAYERS`` - 1) are drawn first; boxes of one layer do not overlap. Boxes without a
    ``colour_name`` have no dense label.
    """

    left: float
    top: float
    right: float
    bottom: float
    colour: Colour
    colour_name: str = ""
    layer: int = 1


LAYERS = 2


@dataclass
class Photo:
    """Part of a photograph, possibly mixed with a second one; ``box`` is x, y, width and height as shares of it."""

    index: int
    box: tuple[float, float, float, float]
    mirrored: bool
    hue: float
    other: int = -1
    mix: float = 0.0


@dataclass
class Scene:
    """An image, ``height x width`` valid pixels of ``size x size``, and a conversation about it.

    ``background``: kind (0 plain, 1 linear, 2 radial, 3 cloudy, 4 striped), two colours, angle, frequency, phase.
    ``sensor``: brightness, contrast, blur (negative sharpens), noise.
    """

    task: str
    size: int
    height: int
    width: int
    background: tuple[float, ...] = (0.0,) * 10
    sensor: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    photo: Photo | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)


IMAGE = "<fim_prefix><|img|><fim_suffix>"


@dataclass
class Story:
    """Images of one size and a conversation about them; questions contain ``IMAGE`` once for each of them."""

    task: str
    scenes: list[Scene]
    turns: list[tuple[str, str]]
