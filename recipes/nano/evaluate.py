"""The held-out evaluation: pictures drawn by PIL as users would send them, answered through the public ``generate``.

``python -m recipes.nano.evaluate [MODEL] --json results.json``; MODEL is a folder or repo id, default the packaged one.
"""

import argparse
import io
import json
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFont

from aria import AriaForConditionalGeneration, AriaProcessor
from recipes.nano import dialogue as say
from recipes.nano import fonts
from recipes.nano.assets import FOLDER, Assets, unpack_files, unpack_json
from recipes.nano.paint import Painter
from recipes.nano.planner import CLEAR_CHARACTERS, MIN_SIDE, Planner
from recipes.nano.questions import describe_shapes, pair_questions
from recipes.nano.scenes import COLOUR_NAMES, SHAPES, Photo, Scene

TERMINATOR = "<|im_end|>"


@dataclass
class Item:
    """One question about one picture (or none) and the one right answer."""

    task: str
    question: str
    answer: str
    scene: Scene | None = None
    scale: float = 1.0
    seed: int = 0


class Held:
    """The held-out material: faces seen and unseen, words, sprites by style, photographs."""

    def __init__(self, path: Path = FOLDER / "eval.npz") -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; build it with: python -m recipes.nano.assets")
        with np.load(path) as file:
            meta = unpack_json(file["meta"])
            self.fonts = [zlib.decompress(content) for content in unpack_files(file["fonts"], file["font_ends"])]
            self.sprites = unpack_files(file["sprites"], file["sprite_ends"])
            self.photos = unpack_files(file["photos"], file["photo_ends"])
        self.faces, self.sprite_meta, self.words = meta["faces"], meta["sprites"], meta["words"]
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
        """Indices of the faces that training saw, or did not."""
        return [i for i, face in enumerate(self.faces) if face["held_out"] == held_out]


# --- what is asked ---------------------------------------------------------------------------------------------------


class Questions:
    """Makes the items of every task from seeded streams, so that a model is always asked the same."""

    def __init__(self, held: Held, count: int, seed: int = 2026) -> None:
        self.held, self.count, self.seed = held, count, seed

    def all(self) -> list[Item]:
        """Items of all tasks, task after task."""
        makers: dict[str, Callable[[Planner, Random, int], tuple[Scene, str, str]]] = {
            "words, seen fonts": partial(self._word, held_out=False),
            "words, unseen fonts": partial(self._word, held_out=True),
            "strings, seen fonts": partial(self._string, held_out=False),
            "strings, unseen fonts": partial(self._string, held_out=True),
            "colour": self._colour,
            "shape": self._shape,
            "count 1-5": self._count,
            "position": self._position,
            "describe shapes": self._describe,
        }
        items = [item for task, maker in makers.items() for item in self._make(task, self.count, maker)]
        items += self._make("lines at 448 px", self.count // 2, partial(self._lines, held_out=False), size=448)
        for style, chosen in self._styles().items():
            items += self._make(f"emoji, {style}", len(chosen), partial(self._emoji, chosen=chosen))
        items += self._make("not sure", max(self.count, len(self.held.photos)), self._photo)
        return items + list(self._talk())

    def _make(
        self, task: str, count: int, maker: Callable[[Planner, Random, int], tuple[Scene, str, str]], size: int = 224
    ) -> Iterator[Item]:
        for n in range(count):
            rng = Random(f"{self.seed} {task} {n}")
            planner = Planner(self.held.assets, size, rng)
            scene, question, answer = maker(planner, rng, n)
            longer = rng.uniform(300, 800) * size / 224
            yield Item(task, question, answer, scene, longer / size, rng.getrandbits(32))

    def _face(self, rng: Random, held_out: bool) -> int:
        return rng.choice(self.held.faces_of(held_out))

    def _word(self, planner: Planner, rng: Random, n: int, held_out: bool) -> tuple[Scene, str, str]:
        word = rng.choice(self.held.words)
        text = rng.choice((word, word.capitalize(), word.upper()))
        return self._printed(planner, [text], self._face(rng, held_out))

    def _string(self, planner: Planner, rng: Random, n: int, held_out: bool) -> tuple[Scene, str, str]:
        letters = CLEAR_CHARACTERS[rng.choice(tuple(CLEAR_CHARACTERS))]
        text = "".join(rng.choices(letters, k=rng.randint(2, 10)))
        return self._printed(planner, [text], self._face(rng, held_out))

    def _lines(self, planner: Planner, rng: Random, n: int, held_out: bool) -> tuple[Scene, str, str]:
        texts = [" ".join(rng.sample(self.held.words, rng.randint(1, 2))) for _ in range(rng.randint(2, 3))]
        return self._printed(planner, texts, self._face(rng, held_out))

    def _printed(self, planner: Planner, texts: list[str], face: int) -> tuple[Scene, str, str]:
        for _ in range(50):
            scene = planner.empty("words")
            planner.place_lines(scene, texts, face)
            if [line.text for line in scene.lines] == texts:  # all fitted
                return scene, planner.rng.choice(say.READ), "\n".join(texts)
        raise ValueError(f"no picture has room for {texts!r}")

    def _colour(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        names = rng.sample(SHAPES, rng.randint(1, 3))
        scene = self._shapes(planner, names, [rng.choice(COLOUR_NAMES) for _ in names])
        mark = rng.choice(scene.marks)
        return scene, rng.choice(say.COLOUR_OF).format(mark.name), say.sentence(mark.colour_name)

    def _shape(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        scene = self._shapes(planner, [rng.choice(SHAPES)], [rng.choice(COLOUR_NAMES)])
        return scene, rng.choice(say.WHICH_SHAPE), say.sentence(say.with_article(scene.marks[0].name))

    def _count(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        name, number = rng.choice(SHAPES), 1 + n % 5
        others = [rng.choice([s for s in SHAPES if s != name]) for _ in range(rng.randint(0, 6 - number))]
        names = [name] * number + (others if rng.random() < 0.4 else [])
        scene = self._shapes(planner, names, [rng.choice(COLOUR_NAMES) for _ in names])
        return scene, rng.choice(say.COUNT).format(say.plural(name)), say.count_answer(number, name)

    def _position(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        for _ in range(50):
            scene = self._shapes(planner, rng.sample(SHAPES, 2), [rng.choice(COLOUR_NAMES) for _ in range(2)])
            asked = pair_questions(scene.marks[0], scene.marks[1], rng)
            if asked:
                _, (forms, answer) = rng.choice(asked)
                return scene, rng.choice(list(forms)), answer
        raise ValueError("two shapes never stood clearly beside each other")

    def _describe(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        count = rng.randint(1, 3)
        scene = self._shapes(planner, rng.sample(SHAPES, count), [rng.choice(COLOUR_NAMES) for _ in range(count)])
        return scene, rng.choice(say.DESCRIBE), describe_shapes(scene.marks)

    def _shapes(self, planner: Planner, names: Sequence[str], colours: Sequence[str]) -> Scene:
        scene = planner.empty("shapes")
        planner.place_shapes(scene, names, colours)
        return scene

    def _styles(self) -> dict[str, list[int]]:
        trained = [i for i, entry in enumerate(self.held.sprite_meta) if entry["style"] != "openmoji"]
        unseen = [i for i, entry in enumerate(self.held.sprite_meta) if entry["style"] == "openmoji"]
        if self.count < 500:  # a quick look
            trained, unseen = trained[:: -(-600 // self.count)], unseen[:: -(-853 // self.count)]
        return {"trained styles": trained, "unseen style": unseen}

    def _emoji(self, planner: Planner, rng: Random, n: int, chosen: Sequence[int]) -> tuple[Scene, str, str]:
        scene = planner.empty("emoji")
        planner.place_emoji(scene, [chosen[n]])
        return scene, rng.choice(say.NAME_EMOJI), scene.marks[0].name

    def _photo(self, planner: Planner, rng: Random, n: int) -> tuple[Scene, str, str]:
        """Every photograph whole first, then parts of them; asked as anything may be asked."""
        photos = len(self.held.photos)
        scene = planner.empty("not sure")
        width, height = self.held.photo_sizes[n % photos]
        long = max(width, height)
        scene.width, scene.height = (max(scene.size * side // long, MIN_SIDE) for side in (width, height))
        side = 1.0 if n < photos else rng.uniform(0.5, 0.9)
        box = (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side, side)
        scene.photo = Photo(n % photos, box, n >= photos and rng.random() < 0.5, 0.0)
        forms = rng.choice((say.DESCRIBE, say.DESCRIBE, say.DESCRIBE, say.READ, say.NAME_EMOJI))
        return scene, rng.choice(forms), say.NOT_SURE

    def _talk(self) -> Iterator[Item]:
        for forms, answer in say.SMALL_TALK:
            for form in forms:
                yield Item("talk", form, answer)


# --- how it is answered and scored -----------------------------------------------------------------------------------


def draw(items: Sequence[Item], held: Held, processes: int) -> list[Image.Image | None]:
    """The pictures of all items, drawn by several processes."""
    if processes <= 1:
        return [_draw(held.painter, item) for item in items]
    with multiprocessing.get_context("spawn").Pool(processes, _start, (held.fonts, held.sprites, held.photos)) as pool:
        return pool.map(_draw_here, items, chunksize=32)


_painter: Painter


def _start(*material: Sequence[bytes]) -> None:
    global _painter
    _painter = Painter(*material)


def _draw_here(item: Item) -> Image.Image | None:
    return _draw(_painter, item)


def _draw(painter: Painter, item: Item) -> Image.Image | None:
    return painter.paint(item.scene, item.scale, Random(item.seed)) if item.scene else None


def answers(
    model: AriaForConditionalGeneration,
    processor: AriaProcessor,
    items: Sequence[Item],
    pictures: Sequence[Image.Image | None],
    batch: int = 128,
) -> list[str]:
    """Greedy answers, without what ends them, in the order of ``items``."""
    order = sorted(range(len(items)), key=lambda i: (_size(items[i]), len(items[i].answer)))
    found = [""] * len(items)
    for _, group in groupby(order, key=lambda i: _size(items[i])):  # pictures of one call share one size
        alike = list(group)
        for start in range(0, len(alike), batch):
            chosen = alike[start : start + batch]
            texts = _generate(model, processor, [(items[i], pictures[i]) for i in chosen])
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text
    return found


def _size(item: Item) -> int:
    return item.scene.size if item.scene else 0


def _generate(
    model: AriaForConditionalGeneration, processor: AriaProcessor, asked: Sequence[tuple[Item, Image.Image | None]]
) -> list[str]:
    prompts = []
    for item, picture in asked:
        image = [{"type": "image"}] if picture else []
        content = [*image, {"type": "text", "text": item.question}]
        message = {"role": "user", "content": content}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    images = [picture for _, picture in asked if picture]
    size = _size(asked[0][0]) or None
    inputs = processor(text=prompts, images=images or None, max_image_size=size, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    ids = model.generate(
        **inputs, max_new_tokens=200, stop_strings=[TERMINATOR], tokenizer=processor.tokenizer, do_sample=False
    )
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split(TERMINATOR)[0].strip() for text in texts]


def score(items: Sequence[Item], given: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per task: number of items, share of exact answers, letters right (1 - edits / length), "not sure" answers."""
    results: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(item.task for item in items):
        pairs = [(item.answer, text) for item, text in zip(items, given, strict=True) if item.task == task]
        exact = sum(same(wanted, text) for wanted, text in pairs)
        length = sum(len(wanted) for wanted, _ in pairs)
        edits = sum(min(distance(wanted, text), len(wanted)) for wanted, text in pairs)
        unsure = sum(text.lower().startswith("i am not sure") for _, text in pairs)
        count = len(pairs)
        results[task] = {
            "items": count,
            "exact": exact / count,
            "letters": 1 - edits / length,
            "not sure": unsure / count,
        }
    known = [task for task in results if task not in ("not sure", "talk")]
    total = sum(results[task]["items"] for task in known)
    false = sum(results[task]["items"] * results[task]["not sure"] for task in known)
    results["false not sure"] = {"items": total, "exact": false / max(total, 1)}
    return results


def same(wanted: str, given: str) -> bool:
    """Equal, but for white space at the ends of lines."""
    return [line.strip() for line in wanted.split("\n")] == [line.strip() for line in given.strip().split("\n")]


def distance(a: str, b: str) -> int:
    """Edits (insert, delete, replace) between two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as text, one task a line."""
    lines = [f"{'task':26}{'items':>7}{'exact':>9}{'letters':>9}{'not sure':>10}"]
    for task, row in results.items():
        cells = [f"{row[name]:>{width}.1%}" if name in row else "" for name, width in COLUMNS]
        lines.append(f"{task:26}{row['items']:>7.0f}{''.join(cells)}")
    return "\n".join(lines)


COLUMNS = (("exact", 9), ("letters", 9), ("not sure", 10))


def main(arguments: Iterable[str] | None = None) -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or repo id; default: the packaged model")
    parser.add_argument("--processor", help="where tokenizer and processor files are, if not with the model")
    parser.add_argument("--eval-file", type=Path, default=FOLDER / "eval.npz")
    parser.add_argument("--count", type=int, default=500, help="items a task")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=max(1, (multiprocessing.cpu_count() or 2) - 1))
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--misses", type=Path, help="write wrong answers here, one JSON a line")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    held = Held(options.eval_file)
    items = Questions(held, options.count).all()
    started = time.monotonic()
    pictures = draw(items, held, options.processes)
    print(f"{len(items)} items drawn in {time.monotonic() - started:.0f} s", flush=True)
    model = AriaForConditionalGeneration.from_pretrained(options.model, device=options.device)
    processor = AriaProcessor.from_pretrained(options.processor or options.model)
    started = time.monotonic()
    given = answers(model, processor, items, pictures, options.batch)
    print(f"answered in {time.monotonic() - started:.0f} s")
    results = score(items, given)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.misses:
        rows = [
            {"task": item.task, "question": item.question, "wanted": item.answer, "given": text}
            for item, text in zip(items, given, strict=True)
            if not same(item.answer, text)
        ]
        options.misses.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps({task: round(row["exact"], 4) for task, row in results.items()}))


if __name__ == "__main__":
    main()
