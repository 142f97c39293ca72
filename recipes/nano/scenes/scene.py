"""What a planned picture is made of: text, shapes, emoji, bars, photographs; the names of shapes, colours and classes.

Nothing is drawn here. A ``Scene`` holds drawing commands in pixels of the model's picture; ``render.py`` draws batches
of them on the GPU for training, ``paint.py`` draws single ones with PIL at the size of a user's picture. A ``Story`` is
a conversation about one scene or several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.nano.assets.fonts import CHARACTERS

TASKS = ("words", "shapes", "emoji", "not sure", "lines", "charts")  # about one picture
STORIES = ("clips", "several", "search")  # about more than one
SHAPES = (
    *("circle", "square", "triangle", "rectangle", "star", "heart"),
    *("pentagon", "hexagon", "diamond", "oval", "cross", "arrow"),
)
# Name -> ranges of hue (degrees), saturation and value; the gaps between them are where people disagree.
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
    """Names of the dense classes: background, other, characters, shape x colour, then one for each emoji label."""
    shapes = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    return ["background", "other", *CHARACTERS, *shapes, *labels]


@dataclass
class Line:
    """One line of text; ``x, y`` is the pen's start on the baseline, ``angle`` in radians with the clock."""

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

    ``look`` is for a shape: fill, border (share of the size, 0 none), border colour, hollow. For a sprite: hue shift
    (radians), saturation, gain, bias, outline, levels (0: all), mirrored.
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
        """ "red circle", or the emoji's label."""
        return f"{self.colour_name} {self.name}" if self.colour_name else self.name


@dataclass
class Box:
    """An upright rectangle of a chart between two corners: a bar, an axis, a line of the grid.

    Boxes of a lower ``layer`` (below ``LAYERS``) are drawn first; those of one layer do not overlap. One that has no
    ``colour_name`` is not there for the dense labels.
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
    """Part of a picture of another kind, perhaps mixed with a second one. ``box`` is x, y, width, height in 0..1."""

    index: int
    box: tuple[float, float, float, float]
    mirrored: bool
    hue: float
    other: int = -1
    mix: float = 0.0


@dataclass
class Scene:
    """One picture, ``height x width`` valid pixels of ``size x size``, and a conversation about it.

    ``background``: kind (0 plain, 1 linear, 2 round, 3 cloudy, 4 striped), two colours, angle, frequency, phase.
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
    """Pictures of one size and a conversation about them; ``PICTURE`` stands in the questions, once for each."""

    task: str
    scenes: list[Scene]
    turns: list[tuple[str, str]]
