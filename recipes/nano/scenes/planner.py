"""Plans pictures and conversations: which letters, shapes, emoji or photograph, where, and what is asked about them."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from recipes.nano.assets.archive import Assets
from recipes.nano.scenes.charts import chart_questions, plan_chart
from recipes.nano.scenes.documents import plan_lines
from recipes.nano.scenes.scene import COLOUR_NAMES, COLOURS, SHAPES, TASKS, Colour, Line, Mark, Photo, Scene
from recipes.nano.scenes.shape_questions import Form, fill, shape_questions, side_of
from recipes.nano.text import dialogue

# Shares of the tasks among pictures: at 224 px, and at 448 px, which is there for lines of text and charts.
SHARES = {224: (0.18, 0.31, 0.3, 0.07, 0.01, 0.13), 448: (0.05, 0.06, 0.08, 0.05, 0.26, 0.5)}
FEW, MANY = (0.5, 0.3, 0.2), (0.15, 0.25, 0.25, 0.2, 0.15)
"""Shares of conversations by their turns. Looking up one of several things has short answers and is late to be learned:
such pictures are asked about more often."""
MIN_SIDE = 56  # of the packaged preprocessor_config.json
MIN_EM = 19.0  # capitals of about 14 px
LINE_HEIGHT = 1.3
MIN_SHAPE = 13.0  # half-width: smaller ones cannot be told apart
CLEAR_CHARACTERS = {  # for strings without meaning: nobody tells l, I, 1 and | or O and 0 apart in every face
    "lower": "abcdefghijkmnopqrstuvwxyz",
    "upper": "ABCDEFGHJKLMNPQRSTUVWXYZ",
    "digits": "0123456789",
    "mixed": "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789",
}


class Planner:
    """Draws scenes from a seeded stream: the same seed gives the same scenes.

    ``plan(grown)`` takes how far words have grown, 0..1 for 2 letters to 12.
    """

    def __init__(self, assets: Assets, size: int, rng: Random) -> None:
        self.assets, self.size, self.rng = assets, size, rng
        families = dict.fromkeys(assets.families)
        self.faces = [[i for i, name in enumerate(assets.families) if name == family] for family in families]
        self.things = [i for i, entry in enumerate(assets.emoji) if entry["concrete"]]
        self.metrics = assets.face_metrics.astype(np.float64)

    def plan(self, grown: float = 1.0, task: str | None = None) -> Scene:
        """One scene, of ``task`` or of one drawn by ``SHARES``."""
        scene = self.empty(task or self.rng.choices(TASKS, SHARES[self.size])[0])
        scene.sensor = self.sensor()
        kinds = {"words": self._words, "shapes": self._shapes, "emoji": self._emoji, "not sure": self._not_sure}
        kinds |= {"lines": self._lines, "charts": self._charts}
        kinds[scene.task](scene, grown)
        return scene

    def empty(self, task: str) -> Scene:
        """A scene with nothing in it yet."""
        return Scene(task, self.size, *self._valid())

    # --- common ------------------------------------------------------------------------------------------------------

    def _valid(self) -> tuple[int, int]:
        """Height and width as the processor makes them: the longer side is the size, the shorter at least 56 px."""
        rng = self.rng
        if rng.random() < 0.6:
            return self.size, self.size
        ratio = math.exp(rng.random() * math.log(3.6))
        short = max(int(self.size / ratio), MIN_SIDE)
        return (short, self.size) if rng.random() < 0.7 else (self.size, short)

    def sensor(self) -> tuple[float, ...]:
        """What a camera does to a picture: often nothing."""
        rng = self.rng
        if rng.random() < 0.35:
            return (0.0, 1.0, 0.0, 0.0)
        blur = rng.uniform(-0.5, 1.0) if rng.random() < 0.6 else 0.0
        noise = rng.random() ** 2 * 0.08 if rng.random() < 0.4 else 0.0
        return (rng.gauss(0, 0.04), 1.0 + rng.gauss(0, 0.08), blur, noise)

    def background(self, colours: Sequence[Colour], contrast: float, calm: bool = False) -> tuple[float, ...]:
        """A background at least ``contrast`` away from all ``colours``, as ``_contrast`` measures it.

        A ``calm`` one has no pattern, and is mostly light.
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
        room = max(0.0, min(0.35, distance - contrast))
        second = tuple(min(1.0, max(0.0, c + rng.uniform(-1, 1) * room * 0.58)) for c in best)
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
        """A colour that people call ``name``."""
        return _hsv(*(self.rng.uniform(*bounds) for bounds in COLOURS[name]))

    def _talk(self, scene: Scene, forms: Sequence[Form], turns: Sequence[float] = FEW) -> None:
        """Some of the weighted ``(question forms, answer)``, none twice; sometimes a thank-you at the end.

        ``turns``: shares of conversations of one turn, two turns and so on.
        """
        rng = self.rng
        count = rng.choices(range(1, len(turns) + 1), turns)[0]
        # Weighted draw without replacement: the largest of u ** (1 / weight) come first.
        order = sorted(forms, key=lambda form: rng.random() ** (1.0 / form[0]), reverse=True)[:count]
        scene.turns = [(dialogue.asked(questions, rng), answer) for _, (questions, answer) in order]
        if rng.random() < 0.03:
            scene.turns.append(dialogue.small_talk(rng, dialogue.PICTURE_TALK))
        question, answer = scene.turns[0]
        if rng.random() < 0.08:
            scene.turns[0] = ("\n" + question, answer)

    def _absent(self, kinds: str) -> list[Form]:
        """Questions about what is not in the picture: t(ext), e(moji), s(hapes)."""
        forms: list[Form] = []
        if "t" in kinds:
            forms.append((0.05, (dialogue.READ, dialogue.NO_TEXT)))
        if "e" in kinds:
            forms.append((0.04, (dialogue.NAME_EMOJI, dialogue.NO_EMOJI)))
        if "s" in kinds:
            shape = self.rng.choice(SHAPES)
            forms.append((0.04, (fill(dialogue.COUNT, dialogue.plural(shape)), dialogue.count_answer(0, shape))))
            forms.append((0.02, (dialogue.WHICH_SHAPE, dialogue.NO_SHAPES)))
        return forms

    # --- words -------------------------------------------------------------------------------------------------------

    def _words(self, scene: Scene, grown: float) -> None:
        rng = self.rng
        longest = 2 + round(10 * grown)
        large = self.size > 224
        count = rng.choices((1, 2, 3), (0.4, 0.3, 0.3) if large else (0.85, 0.15, 0))[0] if longest >= 5 else 1
        texts = [self.text(longest, phrases=large) for _ in range(count)]
        self.place_lines(scene, texts, rng.choice(rng.choice(self.faces)))
        name = scene.lines[0].colour_name
        texts = [line.text for line in scene.lines]
        forms = [
            (1.0, (dialogue.READ, "\n".join(texts))),
            (0.35, (dialogue.DESCRIBE, dialogue.describe_lines(texts))),
            (0.12, (dialogue.TEXT_COLOUR, dialogue.sentence(name))),
        ]
        self._talk(scene, [*forms, *self._absent("es")])

    def text(self, longest: int, phrases: bool = False) -> str:
        """A word, number or meaningless string of at most ``longest`` characters; or phrases, if allowed."""
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
        """A meaningless string; one in ten letters strings also has the letters that look alike."""
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
        """Prices, times, dates, sums, words with punctuation."""
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
        """Lay ``texts`` out as lines in ``face``, at most as large as they fit; what cannot fit at all is cut."""
        rng = self.rng
        angle = 0.0 if rng.random() < 0.6 else max(-0.14, min(0.14, rng.gauss(0, 0.05)))
        spacing = 0.0 if rng.random() < 0.7 else rng.uniform(-0.03, 0.1)
        room_w, room_h = scene.width * 0.95, scene.height * 0.95
        texts = texts[: max(1, int(room_h / (MIN_EM * LINE_HEIGHT)))]
        texts = [self._cut(text, face, spacing, room_w / MIN_EM * 0.97) for text in texts]
        widths = [self.advances(text, face, spacing).sum() for text in texts]
        wide, high = max(widths), LINE_HEIGHT * len(texts)
        turned_w = wide * math.cos(angle) + high * abs(math.sin(angle))
        turned_h = high * math.cos(angle) + wide * abs(math.sin(angle))
        largest = min(room_w / turned_w, room_h / turned_h, 0.55 * self.size)
        if largest < MIN_EM:
            angle, turned_w, turned_h = 0.0, wide, high
            largest = max(MIN_EM, min(room_w / wide, room_h / high))
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
        """Advance of each character in ems."""
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 32
        return self.metrics[face, codes] + spacing

    def _cut(self, text: str, face: int, spacing: float, room: float) -> str:
        ends = np.cumsum(self.advances(text, face, spacing))
        return text[: max(1, int(np.searchsorted(ends, room)))].rstrip()

    def _lines(self, scene: Scene, grown: float) -> None:
        self._talk(scene, plan_lines(self, scene, grown) + self._absent("es"))

    def _charts(self, scene: Scene, grown: float) -> None:
        chart = plan_chart(self, scene)
        self._talk(scene, chart_questions(chart, self.rng) + self._absent("e"), MANY)

    # --- shapes ------------------------------------------------------------------------------------------------------

    def _shapes(self, scene: Scene, grown: float) -> None:
        rng = self.rng
        kind = rng.choices(("one", "two", "same", "mixed"), (0.15, 0.35, 0.25, 0.25))[0]
        count = {"one": 1, "two": 2}.get(kind) or rng.randint(2 if kind == "same" else 3, 6)
        names = [rng.choice(SHAPES) for _ in range(count)]
        colours = [rng.choice(COLOUR_NAMES) for _ in range(count)]
        if kind == "same":
            names = names[:1] * count
            if rng.random() < 0.6:
                colours = colours[:1] * count
        elif kind == "mixed" and rng.random() < 0.5:  # few kinds, so that counting one among others comes up
            names = [rng.choice(names[:2]) for _ in range(count)]
        self.place_shapes(scene, names, colours)
        self._talk(scene, shape_questions(scene.marks, rng) + self._absent("te"), MANY)

    def place_shapes(self, scene: Scene, names: Sequence[str], colours: Sequence[str]) -> None:
        """Place shapes without overlap, in random sizes; two stand clearly beside or clearly above one another."""
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
        """A shape or an emoji of half-width ``size``, for the caller to place."""
        rng = self.rng
        if sprite:
            chosen = rng.randrange(self.assets.num_styles) * len(self.assets.emoji) + rng.choice(self.things)
            label = self.assets.emoji[chosen % len(self.assets.emoji)]["label"]
            return Mark("sprite", chosen, 0.0, 0.0, size, 0.0, 1.0, self._sprite_look(label), label)
        name, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
        look = self._shape_look(self.colour(colour), size)
        return Mark("shape", SHAPES.index(name), 0.0, 0.0, size, 0.0, 1.0, look, name, colour)

    def _spots(self, scene: Scene, count: int) -> tuple[list[float], list[tuple[float, float]]]:
        """Half-widths and centres of ``count`` shapes that do not touch."""
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
        # No luck, as in a strip: stand in a row along the longer side.
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

    # --- emoji -------------------------------------------------------------------------------------------------------

    def _emoji(self, scene: Scene, grown: float) -> None:
        rng = self.rng
        count = rng.choices((1, 2, 3, 4), (0.8, 0.08, 0.07, 0.05))[0]
        pool = len(self.assets.emoji)
        chosen = [rng.choice(self.things) if rng.random() < 0.72 else int(rng.random() * pool) for _ in range(count)]
        self.place_emoji(scene, [rng.randrange(self.assets.num_styles) * pool + i for i in chosen])
        names = [mark.name for mark in scene.marks]
        forms: list[Form] = [(0.5, (dialogue.DESCRIBE, dialogue.describe_emoji(names)))]
        if count == 1:
            forms.append((1.0, (dialogue.NAME_EMOJI, names[0])))
        else:
            forms.append((1.0, (dialogue.LIST_EMOJI, ", ".join(names))))
        forms.append(
            (0.06 if count == 1 else 0.3, (fill(dialogue.COUNT, "emoji"), dialogue.count_answer(count, "emoji")))
        )
        self._talk(scene, forms + self._absent("ts"))

    def place_emoji(self, scene: Scene, sprites: Sequence[int]) -> None:
        """Place sprites in a row from left to right (or one anywhere)."""
        rng, count = self.rng, len(sprites)
        if count > 1 and scene.width < scene.height:
            scene.width, scene.height = scene.height, scene.width
        cell = scene.width / count
        for n, sprite in enumerate(sprites):
            size = min(cell, scene.height) / 2 * rng.uniform(0.6, 1.0)
            room_x, room_y = max(cell / 2 - size, 0.0), max(scene.height / 2 - size, 0.0)
            x = cell * (n + 0.5) + rng.uniform(-room_x, room_x)
            y = scene.height / 2 + rng.uniform(-room_y, room_y)
            angle = rng.gauss(0, 0.1) if rng.random() < 0.4 else 0.0
            label = self.assets.emoji[sprite % len(self.assets.emoji)]["label"]
            stretch = rng.uniform(0.92, 1.08) if rng.random() < 0.3 else 1.0
            scene.marks.append(Mark("sprite", sprite, x, y, size, angle, stretch, self._sprite_look(label), label))
        scene.background = self.background([], 0.0)

    def _sprite_look(self, label: str) -> tuple[float, ...]:
        """Changes of drawing style that leave the thing what it is, so that a style never seen is recognised too."""
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

    # --- not sure ----------------------------------------------------------------------------------------------------

    def _not_sure(self, scene: Scene, grown: float) -> None:
        rng = self.rng
        count = len(self.assets.photos)
        scale = rng.uniform(0.35, 1.0) if rng.random() < 0.7 else 1.0
        width, height = scale, scale * rng.uniform(0.8, 1.0)
        box = (rng.uniform(0, 1 - width), rng.uniform(0, 1 - height), width, height)
        other, mix = (rng.randrange(count), rng.uniform(0.2, 0.8)) if rng.random() < 0.25 else (-1, 0.0)
        hue = rng.uniform(-math.pi, math.pi) if rng.random() < 0.25 else 0.0
        scene.photo = Photo(rng.randrange(count), box, rng.random() < 0.5, hue, other, mix)
        shape = rng.choice(SHAPES)
        asked = rng.choices(
            (
                dialogue.DESCRIBE,
                dialogue.READ,
                dialogue.NAME_EMOJI,
                dialogue.WHICH_SHAPE,
                fill(dialogue.COUNT, dialogue.plural(shape)),
            ),
            (0.6, 0.15, 0.12, 0.08, 0.05),
        )[0]
        self._talk(scene, [(1.0, (asked, dialogue.NOT_SURE))])


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in degrees, any turn."""
    sector = (hue % 360.0) / 60.0

    def channel(n: int) -> float:
        k = (n + sector) % 6
        return value - value * saturation * max(0.0, min(k, 4 - k, 1.0))

    return channel(5), channel(3), channel(1)


def _contrast(a: Colour, b: Colour) -> float:
    """How well two colours can be told apart, up to about 1: mostly by lightness, as reading is."""
    lightness = 0.3 * (a[0] - b[0]) + 0.59 * (a[1] - b[1]) + 0.11 * (a[2] - b[2])
    return 0.75 * abs(lightness) + 0.25 * math.dist(a, b)


def _apart(places: Sequence[tuple[float, float]], sizes: Sequence[float]) -> bool:
    """No two squares around the shapes overlap."""
    for i, (x, y) in enumerate(places):
        for j in range(i):
            gap = (sizes[i] + sizes[j]) * 1.06 + 2
            if abs(x - places[j][0]) < gap and abs(y - places[j][1]) < gap:
                return False
    return True
