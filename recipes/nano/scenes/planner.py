"""Plans one image and the conversation about it: text, shapes, emoji, lines, charts, or a photograph it cannot name."""

import math
from collections.abc import Sequence

from recipes.nano.scenes.builder import SceneBuilder
from recipes.nano.scenes.charts import chart_questions, plan_chart
from recipes.nano.scenes.documents import plan_lines
from recipes.nano.scenes.scene import COLOUR_NAMES, SHAPES, TASKS, Photo, Scene
from recipes.nano.scenes.shape_questions import Form, fill, shape_questions
from recipes.nano.text import dialogue

# Shares of the tasks among images of 224 px, and of 448 px, whose purpose is lines of text and charts.
SHARES = {224: (0.18, 0.31, 0.3, 0.07, 0.01, 0.13), 448: (0.05, 0.06, 0.08, 0.05, 0.26, 0.5)}
FEW, MANY = (0.5, 0.3, 0.2), (0.15, 0.25, 0.25, 0.2, 0.15)
"""Shares of conversations by number of turns. Looking up one of several things has short answers and is learned late,
so such images get more questions."""


class Planner(SceneBuilder):
    """Plans scenes with their conversations from a seeded stream; the same seed gives the same scenes."""

    def plan(self, grown: float = 1.0, task: str | None = None) -> Scene:
        """Plan one scene.

        Args:
            grown: How far words have grown towards their full length: 0 for 2 letters, 1 for 12.
            task: One of ``TASKS``; None draws one by ``SHARES``.
        """
        scene = self.empty(task or self.rng.choices(TASKS, SHARES[self.size])[0])
        scene.sensor = self.sensor()
        kinds = {"words": self._words, "shapes": self._shapes, "emoji": self._emoji, "not sure": self._not_sure}
        kinds |= {"lines": self._lines, "charts": self._charts}
        kinds[scene.task](scene, grown)
        return scene

    def _talk(self, scene: Scene, forms: Sequence[Form], turns: Sequence[float] = FEW) -> None:
        """Choose some of the weighted questions for the conversation, none twice; sometimes end with a thank-you.

        Args:
            scene: Gets the turns.
            forms: Weighted questions about it.
            turns: Shares of conversations of one turn, two turns and so on.
        """
        rng = self.rng
        count = rng.choices(range(1, len(turns) + 1), turns)[0]
        # Weighted draw without replacement: the largest of u ** (1 / weight) come first.
        order = sorted(forms, key=lambda form: rng.random() ** (1.0 / form[0]), reverse=True)[:count]
        scene.turns = [(dialogue.asked(questions, rng), answer) for _, (questions, answer) in order]
        if rng.random() < 0.03:
            scene.turns.append(dialogue.small_talk(rng, dialogue.IMAGE_TALK))
        question, answer = scene.turns[0]
        if rng.random() < 0.08:
            scene.turns[0] = ("\n" + question, answer)

    def _absent(self, kinds: str) -> list[Form]:
        """Return questions about what the image does not show; ``kinds`` has letters: t(ext), e(moji), s(hapes)."""
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

    def _lines(self, scene: Scene, grown: float) -> None:
        self._talk(scene, plan_lines(self, scene, grown) + self._absent("es"))

    def _charts(self, scene: Scene, grown: float) -> None:
        chart = plan_chart(self, scene)
        self._talk(scene, chart_questions(chart, self.rng) + self._absent("e"), MANY)

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
