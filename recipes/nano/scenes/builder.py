"""Building blocks of planned images: colours, backgrounds, text, and the layout of lines, shapes and emoji."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from recipes.nano.assets.archive import Assets
from recipes.nano.scenes.scene import COLOUR_NAMES, COLOURS, SHAPES, Colour, Line, Mark, Scene
from recipes.nano.scenes.shape_questions import side_of

MIN_SIDE = 56  # the minimum in the packaged preprocessor_config.json
MIN_EM = 19.0  # capitals of about 14 px
LINE_HEIGHT = 1.3
MIN_SHAPE = 13.0  # half-width; smaller shapes look alike
CLEAR_CHARACTERS = {  # for meaningless strings, without characters that many faces draw alike: l, I, 1 and |, O and 0
    "lower": "abcdefghijkmnopqrstuvwxyz",
    "upper": "ABCDEFGHJKLMNPQRSTUVWXYZ",
    "digits": "0123456789",
    "mixed": "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789",
}


class SceneBuilder:
    """Draws the parts of scenes from a seeded stream; the same seed gives the same scenes.

    Args:
        assets: Faces, emoji, photographs and words to choose from.
        size: Side of the square that holds the image, in pixels.
        rng: Source of all choices.

    Attributes:
        faces: Indices of faces, a list for each family.
        things: Indices of emoji that show concrete things.
        metrics: Advances of characters in ems, ``(faces, 97)`` float64.
    """

    def __init__(self, assets: Assets, size: int, rng: Random) -> None:
        self.assets, self.size, self.rng = assets, size, rng
        families = dict.fromkeys(assets.families)
        self.faces = [[i for i, name in enumerate(assets.families) if name == family] for family in families]
        self.things = [i for i, entry in enumerate(assets.emoji) if entry["concrete"]]
        self.metrics = assets.face_metrics.astype(np.float64)

    def empty(self, task: str) -> Scene:
        """Return an empty scene."""
        return Scene(task, self.size, *self._valid())

    def _valid(self) -> tuple[int, int]:
        """Return height and width as from the processor: the longer side is the size, the shorter at least 56 px."""
        rng = self.rng
        if rng.random() < 0.6:
            return self.size, self.size
        ratio = math.exp(rng.random() * math.log(3.6))
        short = max(int(self.size / ratio), MIN_SIDE)
        return (short, self.size) if rng.random() < 0.7 else (self.size, short)

    def sensor(self) -> tuple[float, ...]:
        """Draw a camera's changes to an image: brightness, contrast, blur, noise; often none."""
        rng = self.rng
        if rng.random() < 0.35:
            return (0.0, 1.0, 0.0, 0.0)
        blur = rng.uniform(-0.5, 1.0) if rng.random() < 0.6 else 0.0
        noise = rng.random() ** 2 * 0.08 if rng.random() < 0.4 else 0.0
        return (rng.gauss(0, 0.04), 1.0 + rng.gauss(0, 0.08), blur, noise)

    def background(self, colours: Sequence[Colour], contrast: float, calm: bool = False) -> tuple[float, ...]:
        """Draw a background that differs from all ``colours`` by at least ``contrast``, as ``_contrast`` measures it.

        A ``calm`` background has no pattern and is mostly light.
        """
        rng = self.rng
        best, distance = (1.0, 1.0, 1.0), -1.0
        for _ in range(16):
            candidate = self._backdrop(calm)
            nearest = min((_contrast(candidate, colour) for colour in colours), default=9.0)
            if nearest > distance:
                best, distance = candidate, nearest
            if distance >= contrast:
                break
        slack = max(0.0, min(0.35, distance - contrast))
        second = tuple(min(1.0, max(0.0, c + rng.uniform(-1, 1) * slack * 0.58)) for c in best)
        weights = (0.85, 0.1, 0.05, 0, 0) if calm else (0.45, 0.2, 0.1, 0.17, 0.08)
        kind = rng.choices((0, 1, 2, 3, 4), weights)[0]
        return (float(kind), *best, *second, rng.uniform(0, math.tau), rng.uniform(1, 9), rng.uniform(0, math.tau))

    def _backdrop(self, calm: bool = False) -> Colour:
        rng = self.rng
        kind = rng.random() * (0.85 if calm else 1.0)
        if kind < 0.3:
            return (1.0, 1.0, 1.0)
        if kind < 0.5:
            return _hsv(rng.uniform(0, 360), rng.uniform(0, 0.2), rng.uniform(0.8, 1))
        if kind < 0.7:
            return _hsv(rng.uniform(0, 360), rng.uniform(0, 0.5), rng.uniform(0, 0.25))
        return _hsv(rng.uniform(0, 360), rng.uniform(0, 1), rng.uniform(0.1, 1))

    def colour(self, name: str) -> Colour:
        """Draw a colour that people call ``name``."""
        return _hsv(*(self.rng.uniform(*bounds) for bounds in COLOURS[name]))

    # --- text ---------------------------------------------------------------------------------------------------------

    def text(self, longest: int, phrases: bool = False) -> str:
        """Draw a word, number or meaningless string of at most ``longest`` characters; also phrases, if allowed."""
        rng = self.rng
        kind = rng.choices(("word", "string", "digits", "marked"), (0.5, 0.28, 0.14, 0.08))[0]
        if kind == "digits":
            return self.string("digits", rng.randint(1, min(longest, 8)))
        if kind == "marked" and longest >= 6:
            return self._marked()
        if kind == "word":
            if phrases and longest >= 8 and rng.random() < 0.5:
                return " ".join(self._word(8) for _ in range(rng.randint(2, 3)))
            return self._word(longest)
        alphabet = rng.choice(("lower", "upper", "mixed", "mixed"))
        return self.string(alphabet, rng.randint(1, longest))

    def string(self, alphabet: str, length: int) -> str:
        """Draw a meaningless string; one string of letters in ten may also contain characters that look alike."""
        letters = CLEAR_CHARACTERS[alphabet]
        if alphabet != "digits" and self.rng.random() < 0.1:
            letters += {"lower": "l", "upper": "IO", "mixed": "lIO01"}[alphabet]
        return "".join(self.rng.choices(letters, k=length))

    def _word(self, longest: int) -> str:
        rng, words = self.rng, self.assets.words
        word = words[int(rng.random() * len(words))]
        for _ in range(20):
            if len(word) <= longest:
                break
            word = words[int(rng.random() * len(words))]
        else:
            word = word[:longest]
        case = rng.random()
        return word if case < 0.4 else word.capitalize() if case < 0.75 else word.upper()

    def _marked(self) -> str:
        """Draw a price, time, date, sum or word with punctuation."""
        rng = self.rng
        a, b = rng.randint(0, 99), rng.randint(10, 59)
        return rng.choice(
            (
                f"${a}.{b}",
                f"{a % 24}:{b}",
                f"{a}%",
                f"{a}/{b}",
                f"{a}-{b}",
                f"{a} + {b}",
                f"#{a}{b}",
                f"{self._word(9)}!",
                f"{self._word(9)}?",
                f"{self._word(5)}-{self._word(5)}",
                f"{self._word(9)}.",
                f"({self._word(8)})",
                f"@{self._word(8)}",
                f"{self._word(4)} & {self._word(4)}",
            )
        )

    def place_lines(self, scene: Scene, texts: list[str], face: int) -> None:
        """Lay out ``texts`` as lines in ``face``, at most as large as fits; text too long for any size is cut."""
        rng = self.rng
        angle = 0.0 if rng.random() < 0.6 else max(-0.14, min(0.14, rng.gauss(0, 0.05)))
        spacing = 0.0 if rng.random() < 0.7 else rng.uniform(-0.03, 0.1)
        max_width, max_height = scene.width * 0.95, scene.height * 0.95
        texts = texts[: max(1, int(max_height / (MIN_EM * LINE_HEIGHT)))]
        texts = [self._cut(text, face, spacing, max_width / MIN_EM * 0.97) for text in texts]
        widths = [self.advances(text, face, spacing).sum() for text in texts]
        wide, high = max(widths), LINE_HEIGHT * len(texts)
        turned_w = wide * math.cos(angle) + high * abs(math.sin(angle))
        turned_h = high * math.cos(angle) + wide * abs(math.sin(angle))
        largest = min(max_width / turned_w, max_height / turned_h, 0.55 * self.size)
        if largest < MIN_EM:
            angle, turned_w, turned_h = 0.0, wide, high
            largest = max(MIN_EM, min(max_width / wide, max_height / high))
        em = MIN_EM + (largest - MIN_EM) * rng.random() ** 1.2
        free_w, free_h = scene.width - turned_w * em, scene.height - turned_h * em
        middle_x = scene.width / 2 + (rng.random() - 0.5) * max(free_w, 0.0)
        middle_y = scene.height / 2 + (rng.random() - 0.5) * max(free_h, 0.0)
        name = "black" if rng.random() < 0.4 else rng.choice(COLOUR_NAMES)
        colour = self.colour(name)
        align = rng.choice((0.0, 0.5, 0.5, 1.0))
        cos, sin = math.cos(angle), math.sin(angle)
        for n, (text, width) in enumerate(zip(texts, widths, strict=True)):
            x = (-wide / 2 + (wide - width) * align) * em
            y = (-high / 2 + LINE_HEIGHT * n + 1.0) * em
            scene.lines.append(
                Line(
                    text,
                    face,
                    em,
                    middle_x + x * cos - y * sin,
                    middle_y + x * sin + y * cos,
                    angle,
                    spacing,
                    colour,
                    name,
                )
            )
        scene.background = self.background([colour], 0.32)

    def advances(self, text: str, face: int, spacing: float) -> np.ndarray:
        """Return the advance of each character in ems."""
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 32
        return self.metrics[face, codes] + spacing

    def _cut(self, text: str, face: int, spacing: float, max_width: float) -> str:
        ends = np.cumsum(self.advances(text, face, spacing))
        return text[: max(1, int(np.searchsorted(ends, max_width)))].rstrip()

    # --- shapes -------------------------------------------------------------------------------------------------------

    def place_shapes(self, scene: Scene, names: Sequence[str], colours: Sequence[str]) -> None:
        """Place shapes of random sizes without overlap; of two, one is clearly beside or clearly above the other."""
        rng, count = self.rng, len(names)
        sizes, places = self._spots(scene, count)
        fills = {name: self.colour(name) for name in dict.fromkeys(colours)}
        for (x, y), size, name, colour in zip(places, sizes, names, colours, strict=True):
            look = self._shape_look(fills[colour], size)
            angle = rng.uniform(-0.25, 0.25) if rng.random() < 0.4 else 0.0
            stretch = rng.uniform(0.9, 1.1) if name not in ("circle", "square") else 1.0
            scene.marks.append(Mark("shape", SHAPES.index(name), x, y, size, angle, stretch, look, name, colour))
        scene.background = self.background(list(fills.values()), 0.22)

    def thing(self, size: float, sprite: bool) -> Mark:
        """Draw a shape or an emoji of half-width ``size``, for the caller to place."""
        rng = self.rng
        if sprite:
            chosen = rng.randrange(self.assets.num_styles) * len(self.assets.emoji) + rng.choice(self.things)
            label = self.assets.emoji[chosen % len(self.assets.emoji)]["label"]
            return Mark("sprite", chosen, 0.0, 0.0, size, 0.0, 1.0, self._sprite_look(label), label)
        name, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
        look = self._shape_look(self.colour(colour), size)
        return Mark("shape", SHAPES.index(name), 0.0, 0.0, size, 0.0, 1.0, look, name, colour)

    def _spots(self, scene: Scene, count: int) -> tuple[list[float], list[tuple[float, float]]]:
        """Draw half-widths and centres of ``count`` shapes that do not touch."""
        rng = self.rng
        unit = math.sqrt(scene.height * scene.width)
        largest = min(min(scene.height, scene.width) * 0.47, unit * (0.46, 0.25, 0.2, 0.17, 0.15, 0.135)[count - 1])
        smallest = min(largest, MIN_SHAPE)
        for attempt in range(60):
            low, high = smallest, max(smallest, largest * 0.97**attempt)
            first, same = rng.uniform(low, high), rng.random() < 0.5
            sizes = [first if same else rng.uniform(low, high) for _ in range(count)]
            places = [(rng.uniform(s, scene.width - s), rng.uniform(s, scene.height - s)) for s in sizes]
            if _apart(places, sizes) and (count != 2 or side_of(places[0], places[1])):
                return sizes, places
        # Nothing fits, as in a narrow strip: place them in a row along the longer side.
        across = scene.width >= scene.height
        cell = max(scene.width, scene.height) / count
        middle = min(scene.width, scene.height) / 2
        size = min(cell * 0.42, middle * 0.9)
        along = [((n + 0.5) * cell, middle) for n in range(count)]
        return [size] * count, along if across else [(y, x) for x, y in along]

    def _shape_look(self, fill: Colour, size: float) -> tuple[float, ...]:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.1 and size > 24:
            return (*fill, rng.uniform(0.14, 0.25), *fill, 1.0)
        if kind < 0.25 and size > 16:
            dark = rng.choice(((0.0, 0.0, 0.0), (0.1, 0.1, 0.1), (0.3, 0.3, 0.3), (1.0, 1.0, 1.0)))
            return (*fill, rng.uniform(0.03, 0.09), *dark, 0.0)
        return (*fill, 0.0, 0.0, 0.0, 0.0, 0.0)

    # --- emoji --------------------------------------------------------------------------------------------------------

    def place_emoji(self, scene: Scene, sprites: Sequence[int]) -> None:
        """Place sprites in a row from left to right (a single one anywhere)."""
        rng, count = self.rng, len(sprites)
        if count > 1 and scene.width < scene.height:
            scene.width, scene.height = scene.height, scene.width
        cell = scene.width / count
        for n, sprite in enumerate(sprites):
            size = min(cell, scene.height) / 2 * rng.uniform(0.6, 1.0)
            free_x, free_y = max(cell / 2 - size, 0.0), max(scene.height / 2 - size, 0.0)
            x = cell * (n + 0.5) + rng.uniform(-free_x, free_x)
            y = scene.height / 2 + rng.uniform(-free_y, free_y)
            angle = rng.gauss(0, 0.1) if rng.random() < 0.4 else 0.0
            label = self.assets.emoji[sprite % len(self.assets.emoji)]["label"]
            stretch = rng.uniform(0.92, 1.08) if rng.random() < 0.3 else 1.0
            scene.marks.append(Mark("sprite", sprite, x, y, size, angle, stretch, self._sprite_look(label), label))
        scene.background = self.background([], 0.0)

    def _sprite_look(self, label: str) -> tuple[float, ...]:
        """Draw changes of drawing style that keep the emoji recognisable, so that unseen styles are recognised too."""
        rng = self.rng
        turned = any(word in label for word in ("left", "right", "clock", "arrow", "button"))
        mirrored = float(not turned and rng.random() < 0.25)
        if rng.random() < 0.3:
            return (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, mirrored)
        hue = rng.gauss(0, 0.12)
        saturation = rng.uniform(0.0, 0.4) if rng.random() < 0.1 else rng.uniform(0.7, 1.4)
        outline = rng.uniform(0.4, 1.0) if rng.random() < 0.4 else 0.0
        levels = float(rng.randint(3, 6)) if rng.random() < 0.25 else 0.0
        return (hue, saturation, rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1), outline, levels, mirrored)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    """Convert HSV to RGB; the hue is in degrees and may exceed one turn."""
    sector = (hue % 360.0) / 60.0

    def channel(n: int) -> float:
        k = (n + sector) % 6
        return value - value * saturation * max(0.0, min(k, 4 - k, 1.0))

    return channel(5), channel(3), channel(1)


def _contrast(a: Colour, b: Colour) -> float:
    """Return how distinguishable two colours are, up to about 1; lightness counts most, as it does for reading."""
    lightness = 0.3 * (a[0] - b[0]) + 0.59 * (a[1] - b[1]) + 0.11 * (a[2] - b[2])
    return 0.75 * abs(lightness) + 0.25 * math.dist(a, b)


def _apart(places: Sequence[tuple[float, float]], sizes: Sequence[float]) -> bool:
    """Return whether no two squares around the shapes overlap."""
    for i, (x, y) in enumerate(places):
        for j in range(i):
            gap = (sizes[i] + sizes[j]) * 1.06 + 2
            if abs(x - places[j][0]) < gap and abs(y - places[j][1]) < gap:
                return False
    return True
