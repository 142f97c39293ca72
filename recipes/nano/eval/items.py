"""The questions of the evaluation: items of every task from seeded streams, the same for every model.

A task's name says whether words, photographs and sprites are held out or in training styles. Images are painted by
``paint.py``; sums, numbers and wordings are those that ``text_questions.py`` and ``haystack.py`` hold out.
"""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFont

from recipes.nano.assets import fonts
from recipes.nano.assets.archive import FOLDER, Assets, unpack_files, unpack_json
from recipes.nano.assets.excluded_words import is_excluded
from recipes.nano.draw.paint import Painter
from recipes.nano.scenes import charts, documents, stories
from recipes.nano.scenes.builder import CLEAR_CHARACTERS, MIN_SIDE
from recipes.nano.scenes.planner import Planner
from recipes.nano.scenes.scene import COLOUR_NAMES, IMAGE, SHAPES, Photo, Scene, Story
from recipes.nano.scenes.shape_questions import Form, describe_shapes, pair_questions
from recipes.nano.text import dialogue, glosses, haystack, text_questions

REFUSALS = ("not sure", "unknown words", "beyond", "no picture")
"""Tasks whose right answer is a refusal."""
NEEDLES = {"needle, 512 tokens": 512, "needle, 2,048 tokens": 2048, "needle, 4,096 tokens": 4096}
TEXTS = {  # task -> key of text_questions.KINDS
    **{kind: kind for kind in ("unknown words", "sums", "reckoning", "facts", "beyond", "no picture")},
    "spelling": "words",
}
STEP = 25
"""Pixels between sizes of painted images; images of one size are resized together."""
TALK = tuple((form, answer) for forms, answer in dialogue.SMALL_TALK for form in forms)


@dataclass
class Item:
    """A question and its only right answer; the question contains ``IMAGE`` once for each scene."""

    task: str
    question: str
    answer: str
    scenes: Sequence[Scene] = ()
    scale: float = 1.0
    """Factor from planned to painted size."""
    seed: int = 0

    def messages(self, images: Sequence[Image.Image]) -> list[dict]:
        """Return the conversation as a user sends it, with an image at every place."""
        texts = self.question.split(IMAGE)
        assert len(texts) == len(images) + 1, f"{len(texts) - 1} places for {len(images)} images"
        content: list[dict] = []
        for n, text in enumerate(texts):
            if n:
                size = self.scenes[n - 1].size
                content.append({"type": "image", "image": images[n - 1], "max_image_size": size})
            if text:
                content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]


class Held:
    """The evaluation material: training and held-out faces, held-out words, sprites by style, photographs."""

    def __init__(self, path: Path = FOLDER / "eval.npz") -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; build it with: python -m recipes.nano.assets.build")
        with np.load(path) as file:
            meta = unpack_json(file["meta"])
            self.fonts = [zlib.decompress(content) for content in unpack_files(file["fonts"], file["font_ends"])]
            self.sprites = unpack_files(file["sprites"], file["sprite_ends"])
            self.photos = unpack_files(file["photos"], file["photo_ends"])
        self.faces, self.sprite_meta = meta["faces"], meta["sprites"]
        self.words = [word for word in meta["words"] if not is_excluded(word)]
        self.photo_sizes = [Image.open(io.BytesIO(content)).size for content in self.photos]
        self.painter = Painter(self.fonts, self.sprites, self.photos)
        measured = [fonts.measure(ImageFont.truetype(io.BytesIO(content), 200)) for content in self.fonts]
        self.assets = Assets(
            families=[face["family"] for face in self.faces],
            face_metrics=np.stack(measured),
            glyph_boxes={},
            glyph_bits={},
            emoji=[{"label": entry["label"], "hexcode": "", "concrete": True} for entry in self.sprite_meta],
            sprites=self.sprites,
            photos=self.photos,
            words=self.words,
        )

    def faces_of(self, held_out: bool) -> list[int]:
        """Return indices of faces that are held out, or that are not."""
        return [i for i, face in enumerate(self.faces) if face["held_out"] == held_out]

    def sprites_of(self, held_out: bool) -> list[int]:
        """Return indices of sprites in the held-out style, or in training styles."""
        return [i for i, entry in enumerate(self.sprite_meta) if (entry["style"] == "openmoji") == held_out]

    def planner(self, size: int, rng: Random) -> Planner:
        """Return a planner with held-out words, and with faces and emoji styles of training."""
        planner = Planner(self.assets, size, rng)
        seen = set(self.faces_of(False))
        planner.faces = [alike for family in planner.faces if (alike := [face for face in family if face in seen])]
        planner.things = self.sprites_of(False)
        return planner


Asked = tuple[Sequence[Scene], str, str]  # scenes, question, answer


@dataclass(frozen=True)
class Task:
    """The number of items of a task, and the function that makes item n from its own random stream."""

    count: int
    make: Callable[[Planner, Random, int], Asked]
    size: int = 224
    """Size of the planned images in pixels; 0 alternates both sizes."""
    painted: tuple[int, int] = (300, 800)
    """Range of the painted images' longer side, in pixels at ``size`` 224, in steps of :data:`STEP`."""


class Questions:
    """The items of all tasks; most have ``count``."""

    def __init__(self, held: Held, count: int = 500, seed: int = 2026) -> None:
        self.held, self.seed = held, seed
        half, some, many = max(1, count // 2), max(1, count * 2 // 5), max(1, count * 3 // 10)
        shown: dict[str, tuple[Callable[..., Asked], int, int]] = {
            "words, seen fonts": (partial(self._word, held_out=False), count, 224),
            "words, unseen fonts": (partial(self._word, held_out=True), count, 224),
            "strings, seen fonts": (partial(self._string, held_out=False), count, 224),
            "strings, unseen fonts": (partial(self._string, held_out=True), count, 224),
            "lines, seen fonts": (partial(self._lines, held_out=False), half, 448),
            "lines, unseen fonts": (partial(self._lines, held_out=True), half, 448),
            "colour": (self._colour, count, 224),
            "shape": (self._shape, count, 224),
            "count 1-5": (self._count, count, 224),
            "position": (self._position, count, 224),
            "describe shapes": (self._describe, count, 224),
            "not sure": (self._photo, max(count, len(held.photos)) if count >= 100 else count, 224),
        }
        for style, held_out, most in (("trained styles", False, 600), ("unseen style", True, 853)):
            chosen = held.sprites_of(held_out)
            chosen = chosen if count >= 500 else chosen[:: -(-most // count)]  # fewer for a quick evaluation
            shown[f"emoji, {style}"] = partial(self._emoji, chosen=chosen), len(chosen), 224
        for task, kind, number in (
            ("largest bar", "largest", count),
            ("printed value", "value", count),
            ("description", "description", half),
            ("other questions", "other", half),
        ):
            shown[f"chart, {task}"] = partial(self._chart, kind=kind), number, 0
        self.tasks = {task: Task(number, make, size) for task, (make, number, size) in shown.items()}
        small = partial(Task, painted=(225, 400))
        self.tasks |= {
            "clip, direction": small(count, partial(self._clip, directions=True)),
            "clip, other questions": small(half, partial(self._clip, directions=False)),
            "several pictures": small(count, self._several),
            "search among 10 to 40 pictures": small(many, self._search),
            "definitions": Task(count, self._definition),
            **{task: Task(count, partial(self._text, kind=kind)) for task, kind in TEXTS.items()},
            "talk": Task(min(count, len(TALK)), self._talk),
            **{task: Task(some, partial(self._needle, length=length, count=some)) for task, length in NEEDLES.items()},
        }

    def item(self, task: str, n: int) -> Item:
        """Return item ``n`` of a task."""
        made = self.tasks[task]
        rng = Random(f"{self.seed} {task} {n}")
        size = made.size or (224, 448)[n % 2]
        scenes, question, answer = made.make(self.held.planner(size, rng), rng, n)
        longer = rng.randrange(made.painted[0], made.painted[1] + 1, STEP)
        return Item(task, question, answer, scenes, longer / 224, rng.getrandbits(32))

    def paint(self, item: Item) -> list[Image.Image]:
        """Paint the images of an item."""
        if len(item.scenes) == 1:
            return [self.held.painter.paint(item.scenes[0], item.scale, Random(item.seed))]
        story = Story("clips" if item.task.startswith("clip") else "", list(item.scenes), [])
        return self.held.painter.paint_story(story, item.scale, Random(item.seed))

    # --- words -------------------------------------------------------------------------------------------------------

    def _face(self, rng: Random, held_out: bool) -> int:
        return rng.choice(self.held.faces_of(held_out))

    def _word(self, planner: Planner, rng: Random, n: int, held_out: bool) -> Asked:
        word = rng.choice(self.held.words)
        text = rng.choice((word, word.capitalize(), word.upper()))
        return self._printed(planner, text, self._face(rng, held_out))

    def _string(self, planner: Planner, rng: Random, n: int, held_out: bool) -> Asked:
        letters = CLEAR_CHARACTERS[rng.choice(tuple(CLEAR_CHARACTERS))]
        text = "".join(rng.choices(letters, k=rng.randint(2, 10)))
        return self._printed(planner, text, self._face(rng, held_out))

    def _printed(self, planner: Planner, text: str, face: int) -> Asked:
        for _ in range(50):
            scene = planner.empty("words")
            planner.place_lines(scene, [text], face)
            if scene.lines[0].text == text:  # it fits
                return _about(scene, planner.rng.choice(dialogue.READ), text)
        raise ValueError(f"no image has room for {text!r}")

    def _lines(self, planner: Planner, rng: Random, n: int, held_out: bool) -> Asked:
        planner.faces = [[face] for face in self.held.faces_of(held_out)]
        scene = planner.empty("lines")
        documents.plan_lines(planner, scene)
        return _about(scene, rng.choice(dialogue.READ), "\n".join(line.text for line in scene.lines))

    # --- shapes ------------------------------------------------------------------------------------------------------

    def _colour(self, planner: Planner, rng: Random, n: int) -> Asked:
        scene = _shapes(planner, rng.sample(SHAPES, rng.randint(1, 3)))
        mark = rng.choice(scene.marks)
        return _about(scene, rng.choice(dialogue.COLOUR_OF).format(mark.name), dialogue.sentence(mark.colour_name))

    def _shape(self, planner: Planner, rng: Random, n: int) -> Asked:
        scene = _shapes(planner, [rng.choice(SHAPES)])
        return _about(
            scene, rng.choice(dialogue.WHICH_SHAPE), dialogue.sentence(dialogue.with_article(scene.marks[0].name))
        )

    def _count(self, planner: Planner, rng: Random, n: int) -> Asked:
        name, number = rng.choice(SHAPES), 1 + n % 5
        others = [rng.choice([s for s in SHAPES if s != name]) for _ in range(rng.randint(0, 6 - number))]
        scene = _shapes(planner, [name] * number + (others if rng.random() < 0.4 else []))
        return _about(
            scene, rng.choice(dialogue.COUNT).format(dialogue.plural(name)), dialogue.count_answer(number, name)
        )

    def _position(self, planner: Planner, rng: Random, n: int) -> Asked:
        for _ in range(50):
            scene = _shapes(planner, rng.sample(SHAPES, 2))
            asked = pair_questions(scene.marks[0], scene.marks[1], rng)
            if asked:
                _, (forms, answer) = rng.choice(asked)
                return _about(scene, rng.choice(list(forms)), answer)
        raise ValueError("no two shapes were clearly beside each other")

    def _describe(self, planner: Planner, rng: Random, n: int) -> Asked:
        scene = _shapes(planner, rng.sample(SHAPES, rng.randint(1, 3)))
        return _about(scene, rng.choice(dialogue.DESCRIBE), describe_shapes(scene.marks))

    # --- emoji, photographs, charts ----------------------------------------------------------------------------------

    def _emoji(self, planner: Planner, rng: Random, n: int, chosen: Sequence[int]) -> Asked:
        scene = planner.empty("emoji")
        planner.place_emoji(scene, [chosen[n]])
        return _about(scene, rng.choice(dialogue.NAME_EMOJI), scene.marks[0].name)

    def _photo(self, planner: Planner, rng: Random, n: int) -> Asked:
        """Ask about whole photographs first, then about parts of them."""
        photos = len(self.held.photos)
        scene = planner.empty("not sure")
        width, height = self.held.photo_sizes[n % photos]
        long = max(width, height)
        scene.width, scene.height = (max(scene.size * side // long, MIN_SIDE) for side in (width, height))
        side = 1.0 if n < photos else rng.uniform(0.5, 0.9)
        box = (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side, side)
        scene.photo = Photo(n % photos, box, n >= photos and rng.random() < 0.5, 0.0)
        forms = rng.choice(
            (dialogue.DESCRIBE, dialogue.DESCRIBE, dialogue.DESCRIBE, dialogue.READ, dialogue.NAME_EMOJI)
        )
        return _about(scene, rng.choice(forms), dialogue.NOT_SURE)

    def _chart(self, planner: Planner, rng: Random, n: int, kind: str) -> Asked:
        while True:
            scene = planner.empty("charts")
            forms = [
                (_kind(form), form) for form in charts.chart_questions(charts.plan_chart(planner, scene), planner.rng)
            ]
            wanted = [form for found, form in forms if found == kind]
            if wanted:
                _, (questions, answer) = rng.choices(wanted, [weight for weight, _ in wanted])[0]
                return _about(scene, rng.choice(list(questions)), answer)

    # --- several images ----------------------------------------------------------------------------------------------

    def _clip(self, planner: Planner, rng: Random, n: int, directions: bool) -> Asked:
        ways = {dialogue.sentence(way) for way in stories.DIRECTIONS}
        while True:
            story = stories.clip(planner, 3 + n % 4)
            if (story.turns[0][1] in ways) == directions:
                return story.scenes, *story.turns[0]

    def _several(self, planner: Planner, rng: Random, n: int) -> Asked:
        story = stories.several(planner, 2 + n % 5)
        return story.scenes, *story.turns[0]

    def _search(self, planner: Planner, rng: Random, n: int) -> Asked:
        story = stories.search(planner, rng.randint(10, 40))
        return story.scenes, *story.turns[0]

    # --- text --------------------------------------------------------------------------------------------------------

    def _definition(self, planner: Planner, rng: Random, n: int) -> Asked:
        """Ask for each word once, as far as the words last."""
        known = glosses.read().definitions
        words = sorted(known)
        Random(self.seed).shuffle(words)
        word = words[n % len(words)]
        return (), rng.choice(text_questions.DEFINE[1]).format(word), dialogue.sentence(known[word])

    def _text(self, planner: Planner, rng: Random, n: int, kind: str) -> Asked:
        return (), *text_questions.KINDS[kind](rng, held_out=True)

    def _talk(self, planner: Planner, rng: Random, n: int) -> Asked:
        return (), *TALK[n * len(TALK) // self.tasks["talk"].count]

    def _needle(self, planner: Planner, rng: Random, n: int, length: int, count: int) -> Asked:
        """Ask for needles at depths from the start of the text to its end."""
        return (), *haystack.haystack(rng, length, n / max(count - 1, 1), held_out=True)[0]


def _about(scene: Scene, question: str, answer: str) -> Asked:
    return (scene,), IMAGE + question, answer


def _shapes(planner: Planner, names: Sequence[str]) -> Scene:
    scene = planner.empty("shapes")
    planner.place_shapes(scene, names, [planner.rng.choice(COLOUR_NAMES) for _ in names])
    return scene


def _kind(form: Form) -> str:
    """Return the task that a question about a chart belongs to."""
    questions = form[1][0]
    kinds: Mapping[str, bool] = {
        "largest": questions is charts.LARGEST,
        "value": questions[0].startswith(charts.VALUE[0].partition("{")[0]),
        "description": questions is dialogue.DESCRIBE,
    }
    return next((kind for kind, holds in kinds.items() if holds), "other")
