"""Plans lines of text: paragraphs, a heading with lines below it, lists of prices, notes."""

from __future__ import annotations

import math

from recipes.nano.scenes.builder import SceneBuilder
from recipes.nano.scenes.scene import COLOUR_NAMES, Line, Scene
from recipes.nano.scenes.shape_questions import Form
from recipes.nano.text import dialogue

SMALLEST_EM = 19.0
LONGEST = 38  # maximum characters of a line
ENDS = (".", ".", ".", "!", "?", ",", "")


def plan_lines(builder: SceneBuilder, scene: Scene, grown: float = 1.0) -> list[Form]:
    """Lay out two to four lines in ``scene`` and return questions; ``grown`` (0 to 1) scales their length."""
    rng = builder.rng
    if min(scene.width, scene.height) < 0.4 * scene.size:
        scene.width = scene.height = scene.size
    count = rng.randint(2, 4 if scene.size > 224 else 3)
    longest = 5 + round((31 if scene.size > 224 else 9) * grown)
    kind = rng.choices(("paragraph", "heading", "prices", "notes"), (0.4, 0.25, 0.15, 0.2))[0]
    if kind == "paragraph":
        texts = paragraph(builder, count, rng.randint(5, longest))
    elif kind == "prices":
        texts = [_price(builder, longest) for _ in range(count)]
    else:
        texts = [_note(builder, rng.randint(3, longest)) for _ in range(count)]
    sizes = [1.0] * count
    if kind == "heading":
        sizes[0] = rng.uniform(1.2, 1.8)
        texts[0] = _title(builder, max(4, int(longest / sizes[0])))
    place(builder, scene, texts, sizes)
    shown = [line.text for line in scene.lines]
    which = rng.randrange(len(shown))
    nth = ("first", "second", "third", "fourth")[which]
    forms: list[Form] = [
        (1.6, (dialogue.READ, "\n".join(shown))),
        (0.2, (dialogue.DESCRIBE, dialogue.describe_lines(shown))),
        (0.15, ((f"What does the {nth} line say?", f"Read the {nth} line."), shown[which])),
        (0.1, ([form.format("lines") for form in dialogue.COUNT], dialogue.count_answer(len(shown), "line"))),
    ]
    return forms


def paragraph(builder: SceneBuilder, count: int, longest: int) -> list[str]:
    """Draw sentences, broken into ``count`` lines of at most ``longest`` characters."""
    rng = builder.rng
    lines: list[str] = []
    capital = True
    while len(lines) < count:
        line = ""
        while True:
            word = _word(builder, longest)
            word = word.capitalize() if capital else word
            word += rng.choice(ENDS) if rng.random() < 0.16 else ""
            if len(line) + 1 + len(word) > longest and line:
                break
            line = f"{line} {word}".strip()
            capital = word[-1] in ".!?"
            if rng.random() < 0.06 or len(line) > longest - 3:
                break
        lines.append(line[:LONGEST])
    return lines


def _word(builder: SceneBuilder, longest: int) -> str:
    rng = builder.rng
    if rng.random() < 0.08:
        return builder.string("digits", rng.randint(1, min(4, longest)))
    word = rng.choice(builder.assets.words)
    return word if len(word) <= longest else word[:longest]


def _title(builder: SceneBuilder, longest: int) -> str:
    rng = builder.rng
    words = [_word(builder, longest)]
    while len(words) < 3 and rng.random() < 0.5:
        words.append(_word(builder, longest))
    text = " ".join(words)[:longest].rstrip()
    return text.upper() if rng.random() < 0.3 else text[0].upper() + text[1:]


def _note(builder: SceneBuilder, longest: int) -> str:
    """Draw a note: some words, a number, a time, a meaningless string, or an item with a bullet."""
    rng = builder.rng
    kind = rng.random()
    if kind < 0.12 or longest < 10:
        return builder.text(max(2, min(longest, 12)))
    if kind < 0.2:
        return f"{rng.randint(1, 24)}:{rng.randint(0, 59):02d} {_word(builder, longest - 6)}".strip()
    if kind < 0.28:
        return f"{_word(builder, longest - 4).capitalize()} {rng.randint(1, 999)}"
    line = paragraph(builder, 1, longest)[0]
    if kind < 0.42 and len(line) < longest - 2:
        return f"{rng.choice(('-', '*', '+', '1.', '2.', '#'))} {line}"
    return line


def _price(builder: SceneBuilder, longest: int) -> str:
    rng = builder.rng
    price = f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    mark = rng.choice(("", "", "$"))
    return f"{_word(builder, max(2, longest - 7)).capitalize()} {mark}{price}"


def place(builder: SceneBuilder, scene: Scene, texts: list[str], sizes: list[float]) -> None:
    """Lay out ``texts`` one below the other, scaled by ``sizes`` relative to a common size; excess text is cut."""
    rng = builder.rng
    face = rng.choice(rng.choice(builder.faces))
    first = rng.choice(rng.choice(builder.faces)) if sizes[0] != 1.0 and rng.random() < 0.4 else face
    faces = [first, *[face] * (len(texts) - 1)]
    leading = rng.uniform(1.2, 1.6)
    angle = 0.0 if rng.random() < 0.75 else max(-0.07, min(0.07, rng.gauss(0, 0.03)))
    cos, sin = math.cos(angle), math.sin(angle)
    max_width, max_height = scene.width * 0.95, scene.height * 0.95
    count = len(texts)
    while count > 1 and sum(sizes[:count]) * leading * SMALLEST_EM > max_height:
        count -= 1
    cut = []
    for text, size, own in zip(texts[:count], sizes, faces, strict=False):
        text = text[:LONGEST]
        while len(text) > 1 and builder.advances(text, own, 0.0).sum() * size * SMALLEST_EM > max_width * 0.96:
            text = text[:-1].rstrip()
        cut.append(text)
    widths = [
        float(builder.advances(text, own, 0.0).sum()) * size for text, size, own in zip(cut, sizes, faces, strict=False)
    ]
    wide, high = max(widths), sum(sizes[:count]) * leading
    largest = min(
        max_width / (wide * cos + high * abs(sin)), max_height / (high * cos + wide * abs(sin)), 0.3 * scene.size
    )
    if largest < SMALLEST_EM:
        angle, cos, sin = 0.0, 1.0, 0.0
        largest = max(SMALLEST_EM, min(max_width / wide, max_height / high))
    em = SMALLEST_EM + (largest - SMALLEST_EM) * rng.random() ** 1.5
    turned_w, turned_h = (wide * cos + high * abs(sin)) * em, (high * cos + wide * abs(sin)) * em
    x0 = scene.width / 2 + (rng.random() - 0.5) * max(scene.width - turned_w, 0.0)
    y0 = scene.height / 2 + (rng.random() - 0.5) * max(scene.height - turned_h, 0.0)
    name = "black" if rng.random() < 0.5 else rng.choice(COLOUR_NAMES)
    colour = builder.colour(name)
    align = rng.choice((0.0, 0.0, 0.5, 1.0))
    down = -high / 2
    for text, size, own, width in zip(cut, sizes, faces, widths, strict=False):
        x, y = (-wide / 2 + (wide - width) * align) * em, (down + size * leading * 0.78) * em
        down += size * leading
        line = Line(text, own, em * size, x0 + x * cos - y * sin, y0 + x * sin + y * cos, angle, 0.0, colour, name)
        scene.lines.append(line)
    scene.background = builder.background([colour], 0.36)
