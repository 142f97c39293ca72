"""Questions about shapes, each with its only right answer."""

from collections.abc import Sequence
from random import Random

from recipes.nano.scenes.scene import COLOUR_NAMES, SHAPES, Mark
from recipes.nano.text import dialogue

Form = tuple[float, tuple[Sequence[str], str]]  # weight, (paraphrases of a question, answer)


def fill(forms: Sequence[str], *values: str) -> list[str]:
    """Fill ``values`` into the paraphrases."""
    return [form.format(*values) for form in forms]


def side_of(a: tuple[float, float], b: tuple[float, float]) -> str:
    """Return where a is relative to b: "left", "right", "above", "below", or "" if unclear."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) > 1.7 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 1.7 * abs(dx):
        return "above" if dy < 0 else "below"
    return ""


def shape_questions(marks: Sequence[Mark], rng: Random) -> list[Form]:
    """Return weighted questions about shapes."""
    names = [mark.name for mark in marks]
    forms: list[Form] = [(0.8, (dialogue.DESCRIBE, describe_shapes(marks)))]
    kind = rng.choice(names) if rng.random() < 0.75 else rng.choice(SHAPES)
    number = names.count(kind)
    forms.append((0.9, (fill(dialogue.COUNT, dialogue.plural(kind)), dialogue.count_answer(number, kind))))
    forms.append((0.4, (fill(dialogue.COUNT, "shapes"), dialogue.count_answer(len(marks), "shape"))))
    colour = rng.choice([mark.colour_name for mark in marks])
    same = [mark for mark in marks if mark.colour_name == colour]
    forms.append((0.2, (fill(dialogue.COUNT, f"{colour} shapes"), dialogue.count_answer(len(same), f"{colour} shape"))))
    for mark in marks:
        if names.count(mark.name) == 1:
            forms.append((1.2 / len(marks), (fill(dialogue.COLOUR_OF, mark.name), dialogue.sentence(mark.colour_name))))
    if len(same) == 1 and len(marks) > 1:
        forms.append(
            (0.6, (fill(dialogue.SHAPE_IN_COLOUR, colour), dialogue.sentence(dialogue.with_article(same[0].name))))
        )
    if len(marks) == 1:
        forms.append((0.7, (dialogue.WHICH_SHAPE, dialogue.sentence(dialogue.with_article(names[0])))))
    present = rng.random() < 0.5
    title = rng.choice(marks).title if present else f"{rng.choice(COLOUR_NAMES)} {rng.choice(SHAPES)}"
    answer = "Yes." if any(mark.title == title for mark in marks) else "No."
    forms.append((0.25, ([form.format(title).replace("a orange", "an orange") for form in dialogue.IS_THERE], answer)))
    if len(marks) == 2 and marks[0].title != marks[1].title:
        forms += pair_questions(marks[0], marks[1], rng)
    return forms


def pair_questions(a: Mark, b: Mark, rng: Random) -> list[Form]:
    """Return questions about the relative position of two different shapes."""
    if rng.random() < 0.5:
        a, b = b, a
    side = side_of((a.x, a.y), (b.x, b.y))
    if not side:
        return []
    first, second = (a.title, b.title) if a.name == b.name or rng.random() < 0.5 else (a.name, b.name)
    place = dialogue.PLACES[side]
    beside = [form.format(place=place, what=second) for form in dialogue.BESIDE]
    claimed = side if rng.random() < 0.5 else dialogue.OPPOSITE[side]
    claim = [form.format(a=first, place=dialogue.PLACES[claimed], b=second) for form in dialogue.IS_BESIDE]
    return [
        (0.8, (beside, dialogue.sentence(dialogue.with_article(a.title)))),
        (0.6, (fill(dialogue.WHERE, first), dialogue.sentence(f"{place} the {second}"))),
        (0.5, (claim, "Yes." if claimed == side else "No.")),
    ]


def describe_shapes(marks: Sequence[Mark]) -> str:
    """Return "A red circle to the left of a blue square." and the like; up to four are listed from left to right."""
    titles = [mark.title for mark in sorted(marks, key=lambda mark: mark.x)]
    if len(marks) == 1:
        return dialogue.sentence(dialogue.with_article(titles[0]))
    if len(set(titles)) == 1:
        return dialogue.count_answer(len(marks), titles[0])
    if len(marks) == 2:
        a, b = marks
        side = side_of((a.x, a.y), (b.x, b.y))
        if side in ("right", "below"):
            a, b, side = b, a, dialogue.OPPOSITE[side]
        if side:
            return dialogue.sentence(
                f"{dialogue.with_article(a.title)} {dialogue.PLACES[side]} {dialogue.with_article(b.title)}"
            )
    head = dialogue.NUMBERS[len(marks)].capitalize()
    if len(marks) <= 4:
        return f"{head} shapes: {dialogue.listing([dialogue.with_article(title) for title in titles])}."
    names = [mark.name for mark in marks]
    kinds = [(names.count(name), name) for name in SHAPES if name in names]
    if len(kinds) == 1:
        return dialogue.count_answer(len(marks), kinds[0][1])
    parts = [f"{dialogue.NUMBERS[n]} {name if n == 1 else dialogue.plural(name)}" for n, name in kinds]
    return f"{head} shapes: {dialogue.listing(parts)}."
