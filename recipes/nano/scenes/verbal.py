"""Shapes and charts described in words, with the questions that are asked about images.

Looking up a thing by one property to answer with another is learned late from images, where most target letters are
read off. In words it is practised cheaply, before the first image.
"""

from random import Random

from recipes.nano.scenes.charts import DAYS, KIND, MONTHS, Chart, chart_questions, describe_chart
from recipes.nano.scenes.scene import COLOUR_NAMES, SHAPES, Mark
from recipes.nano.scenes.shape_questions import Form, describe_shapes, shape_questions, side_of
from recipes.nano.text import dialogue
from recipes.nano.text.text_questions import Turn

SHOWN = ("{} {}", "{}\n{}", "In a picture: {} {}", "This is in the picture: {}\n{}")
IMAGE_ONLY = (dialogue.DESCRIBE, dialogue.WHICH_SHAPE, KIND)
"""Questions that need an image, or that would be answered by repeating the description."""


def conversation(rng: Random, words: list[str]) -> list[Turn]:
    """Generate a description, and two to five questions about it.

    Args:
        rng: Source of all choices.
        words: Possible names of a chart's bars.
    """
    description, forms = _shapes(rng) if rng.random() < 0.6 else _chart(rng, words)
    asked = [form for form in forms if form[1][0] not in IMAGE_ONLY]
    order = sorted(asked, key=lambda form: rng.random() ** (1.0 / form[0]), reverse=True)[: rng.randint(2, 5)]
    turns = [(dialogue.asked(questions, rng), answer) for _, (questions, answer) in order]
    question, answer = turns[0]
    return [(rng.choice(SHOWN).format(description, question), answer), *turns[1:]]


def _shapes(rng: Random) -> tuple[str, list[Form]]:
    """Describe up to four shapes; descriptions of more do not name each colour."""
    count = rng.choices((1, 2, 3, 4), (0.1, 0.4, 0.3, 0.2))[0]
    while True:
        marks = [
            Mark("shape", index, rng.random(), rng.random(), 0.1, 0.0, 1.0, (), SHAPES[index], rng.choice(COLOUR_NAMES))
            for index in (rng.randrange(len(SHAPES)) for _ in range(count))
        ]
        if count != 2 or side_of((marks[0].x, marks[0].y), (marks[1].x, marks[1].y)):
            return describe_shapes(marks), shape_questions(marks, rng)


def _chart(rng: Random, words: list[str]) -> tuple[str, list[Form]]:
    count = rng.randint(2, 5)
    names = [word.capitalize() for word in rng.sample(rng.choice((MONTHS, DAYS, words, words, words)), count)]
    most = rng.choice((20, 100, 1000))
    values = rng.sample(range(1, most), count)
    # Lengths tell all values apart; the description has no colours.
    chart = Chart(names, values, [100.0 * value for value in values], ["grey"] * count)
    forms = [form for form in chart_questions(chart, rng) if "colour" not in form[1][0][0]]
    return describe_chart(chart), forms
