"""Draw a small dataset in the authors' format: striped flags on noisy backgrounds, each with a question and an answer.

    python examples/flags.py flags --train 200 --test 100

Nano, the packaged model, does not know flags; ``recipes/flags.toml`` teaches it these from 200 images. ``known.jsonl``,
with its images and clips, has questions without answers of the kinds that nano could answer before. Training on nano's
own answers to them (``examples/rehearse.py``) as well preserves what it knows.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

UPRIGHT = {
    "France": ("#0055a4", "#ffffff", "#ef4135"),
    "Italy": ("#009246", "#ffffff", "#ce2b37"),
    "Ireland": ("#169b62", "#ffffff", "#ff883e"),
    "Belgium": ("#000000", "#fae042", "#ed2939"),
    "Romania": ("#002b7f", "#fcd116", "#ce1126"),
}
LEVEL = {
    "Germany": ("#000000", "#dd0000", "#ffce00"),
    "Hungary": ("#ce2939", "#ffffff", "#477050"),
    "Estonia": ("#0072ce", "#000000", "#ffffff"),
    "Ukraine": ("#0057b7", "#ffd700"),
    "Poland": ("#ffffff", "#dc143c"),
}
COUNTRIES = [*UPRIGHT, *LEVEL]
QUESTIONS = ("Which flag is this?", "Whose flag is it?", "What country does this flag belong to?")

COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "hotpink", "saddlebrown", "black", "white", "grey")
CORNERS = {"triangle": 3, "diamond": 4, "square": 4, "pentagon": 5, "hexagon": 6, "circle": 60, "star": 10}
LOOK = ("What is in this picture?", "Describe this picture.", "What do you see?", "What is this?", "What's this?")
EMOJI = ("Name this emoji.", "Which emoji is this?", "What emoji is shown?")
READ = ("What does it say?", "Read the text.", "What is written here?", "What word is this?")
SHAPE = ("What shape is it?", "What shape is this?", "Which shape is shown?", "Is there a {0}?")
COLOUR = ("What colour is the {0}?", "Which colour is the {0}?", "What color is the {0}?")
PLACE = (
    *("Where is the {0}?", "What is to the left of the {0}?", "What is above the {0}?", "What is below the {0}?"),
    *("Is the {0} to the right of the {1}?", "Is the {0} above the {1}?", "What is to the right of the {0}?"),
)
COUNT = ("How many {0}s are there?", "How many {0}s do you see?", "Count the {0}s.")
TALK = ("What is {} + {}?", "How much is {} minus {}?", "Hello", "Who are you?", "Thank you")
MOVE = (
    *("Which way does the {0} move?", "Where does the {0} move?", "In what direction is the {0} moving?"),
    *("What happens in this clip?", "What moves?", "Describe the video."),
)
MEANING = ("What does {} mean?", "Define {}.", "What is the meaning of {}?")
WORDS = (
    "apple arm army arrow autumn baker barrel basket beach bell bench bird boat book bottle box branch bread bridge "
    "brush bucket butter button cake camera candle carpet castle cat chair cheese church circle city clock cloud "
    "coat coffee coin corn cotton cow crown desert doctor dog door dress drum duck eagle engine farm farmer feather "
    "fence field finger fire fish floor flower forest fork fountain fox frog garden giant glass goat gold grape "
    "grass guitar hammer harbour hat helmet hill honey horse hospital ice island judge juice kettle king kitchen "
    "knife ladder lake lamp leaf lemon letter library lion map market meadow milk mirror money monkey moon mountain "
    "mouse museum music needle newspaper nurse ocean onion orange orchard oven owl paint palace paper pencil pepper "
    "pig pilot pipe planet plate pocket potato prince queen rabbit rain ribbon ring river road rock roof rope rose "
    "sailor salt sand school sea shadow sheep ship shirt shoe silver sister smoke snake snow soldier soup spider "
    "spoon spring stable star statue stone storm street sugar summer sword table tailor tea teacher temple tent "
    "theatre thief tiger tower town train tree turtle umbrella valley village violin voice wagon wall watch water "
    "wheel whistle wind window wine wing winter wolf wood wool"
)

KINDS = (
    *("word", "count", "place", "sign", "meaning", "shape", "talk", "place", "clip"),
    *("word", "count", "sign", "meaning", "colour", "place", "flag", "unclear"),
)
FRAMES = 4


def background(rng: random.Random) -> Image.Image:
    """Draw noise around one colour."""
    colour = tuple(rng.randrange(256) for _ in range(3))
    noise = Image.effect_noise((240, 240), rng.uniform(5, 40)).convert("RGB")
    return Image.blend(noise, Image.new("RGB", noise.size, colour), 0.7)


def draw_flag(country: str, rng: random.Random) -> Image.Image:
    """Draw a country's flag with random size, position and tilt."""
    image = background(rng)
    width, height = (w := rng.randrange(110, 200)), round(w * rng.uniform(0.55, 0.72))
    flag = Image.new("RGBA", (width, height))
    stripes = UPRIGHT.get(country) or LEVEL[country]
    for i, colour in enumerate(stripes):
        first, last = i / len(stripes), (i + 1) / len(stripes)
        box = (first, 0, last, 1) if country in UPRIGHT else (0, first, 1, last)
        ImageDraw.Draw(flag).rectangle([round(v * (width, height)[j % 2]) for j, v in enumerate(box)], fill=colour)
    flag = flag.rotate(rng.uniform(-12, 12), expand=True, resample=Image.Resampling.BICUBIC)
    image.paste(flag, (rng.randrange(240 - flag.width), rng.randrange(240 - flag.height)), flag)
    return image


def draw_word(rng: random.Random) -> Image.Image:
    """Draw a pronounceable word in Pillow's own font."""
    image = background(rng)
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
    word = rng.choice((word, word.capitalize(), word.upper()))
    font = ImageFont.load_default(min(rng.uniform(24, 70), 300 / len(word)))
    place = rng.uniform(4, 232 - font.getlength(word)), rng.uniform(4, 150)
    ImageDraw.Draw(image).text(place, word, rng.choice(COLOURS), font)
    return image


def put_shape(image: Image.Image, name: str, x: float, y: float, size: float, colour: str) -> None:
    """Draw a shape around a point."""
    corners = CORNERS[name]
    turns = [(k + 0.5 * (name == "square")) / corners * math.tau for k in range(corners)]
    reach = [size * (0.4 if name == "star" and k % 2 else 1.0) for k in range(corners)]
    outline = [(x + r * math.sin(t), y - r * math.cos(t)) for t, r in zip(turns, reach, strict=True)]
    ImageDraw.Draw(image).polygon(outline, fill=colour)


def draw_shapes(names: list[str], rng: random.Random) -> Image.Image:
    """Draw one shape, or up to nine without overlap."""
    image = background(rng)
    most = 110 if len(names) == 1 else 56 if len(names) < 5 else 37
    places = [(x, y) for x in range(most + 8, 240, 2 * most) for y in range(most + 8, 240, 2 * most)]
    for name, (x, y) in zip(names, rng.sample(places, len(names)), strict=True):
        put_shape(image, name, x, y, rng.uniform(22, 0.9 * most), rng.choice(COLOURS))
    return image


def draw_sign(rng: random.Random) -> Image.Image:
    """Draw shapes over each other, each smaller, like an emoji."""
    image, size = background(rng), rng.uniform(60, 110)
    for _ in range(rng.randint(3, 7)):
        x, y = (120 + rng.uniform(-0.4, 0.4) * (100 - 0.9 * size) for _ in range(2))
        put_shape(image, rng.choice(list(CORNERS)), x, y, size, rng.choice(COLOURS))
        size *= rng.uniform(0.5, 0.9)
    return image


def draw_clip(name: str, rng: random.Random) -> list[Image.Image]:
    """Draw the frames of a clip: a shape moves straight over a static background."""
    still, size, colour = background(rng), rng.uniform(20, 40), rng.choice(COLOURS)
    turn, reach = rng.randrange(8) * math.tau / 8, rng.uniform(40, 70)
    x, y = (120 + rng.uniform(-1, 1) * (115 - reach - size) for _ in range(2))
    frames = []
    for n in range(FRAMES):
        gone = reach * (2 * n / (FRAMES - 1) - 1)
        frames.append(still.copy())
        put_shape(frames[-1], name, x + gone * math.cos(turn), y + gone * math.sin(turn), size, colour)
    return frames


def draw_clouds(rng: random.Random) -> Image.Image:
    """Draw clouds without a recognisable thing."""
    small = Image.new("RGB", (side := rng.randint(3, 24), side))
    small.putdata([(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(side * side)])
    return Image.blend(small.resize((240, 240), Image.Resampling.BICUBIC), background(rng), rng.uniform(0, 0.6))


Row = tuple[list[Image.Image], str, str | None]
"""An image, or frames of a clip, or nothing; a question; an optional answer."""


def flags(count: int, rng: random.Random) -> Iterator[Row]:
    """Yield images, questions and answers, all countries equally often."""
    for i in range(count):
        country = COUNTRIES[i % len(COUNTRIES)]
        yield [draw_flag(country, rng)], rng.choice(QUESTIONS), f"{country}."


def known(count: int, rng: random.Random) -> Iterator[Row]:
    """Yield questions that nano can already answer, or should refuse; none asks which flag is shown."""
    words = cycle(sorted(WORDS.split(), key=lambda _: rng.random()))
    for i in range(count):
        first, other = rng.sample(list(CORNERS), 2)
        kind = KINDS[i % len(KINDS)]
        look = rng.choice((*LOOK, *EMOJI))
        if kind == "word":
            yield [draw_word(rng)], rng.choice((*READ, look)), None
        elif kind == "shape":
            yield [draw_shapes([first], rng)], rng.choice((*SHAPE, look)).format(other), None
        elif kind == "count":
            yield [draw_shapes([first] * rng.randint(1, 5), rng)], rng.choice(COUNT).format(first), None
        elif kind in ("place", "colour"):
            names = [first, other, *rng.choices([first, other], k=rng.randint(0, 1))]
            forms = PLACE if kind == "place" else COLOUR
            yield [draw_shapes(names, rng)], rng.choice((*forms, look)).format(first, other), None
        elif kind == "sign":
            yield [draw_sign(rng)], rng.choice((*EMOJI, look)), None
        elif kind == "clip":
            yield draw_clip(first, rng), rng.choice(MOVE).format(first), None
        elif kind == "flag":
            yield [draw_flag(rng.choice(COUNTRIES), rng)], rng.choice((*READ, *EMOJI, *LOOK)), None
        elif kind == "unclear":
            yield [draw_clouds(rng)], rng.choice((*READ, *EMOJI, *LOOK)), None
        elif kind == "meaning":
            yield [], rng.choice(MEANING).format(next(words)), None
        else:
            yield [], rng.choice(TALK).format(rng.randrange(10, 100), rng.randrange(10, 100)), None


def write(folder: Path, name: str, rows: Iterator[Row]) -> None:
    """Write ``name.jsonl`` and, beside it, its images and clips."""
    lines = []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (images, question, answer) in enumerate(rows):
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        row: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        blur = ImageFilter.GaussianBlur(random.Random(i).uniform(0, 1.2))
        images = [image.filter(blur) for image in images]
        if len(images) == 1:
            row["images"] = [f"{name}/{i:04}.png"]
            content.insert(0, {"type": "image", "text": None})
            images[0].save(folder / row["images"][0])
        elif images:
            row["video"] = {"path": f"{name}/{i:04}.gif", "num_frames": len(images)}
            content.insert(0, {"type": "video", "text": None})
            images[0].save(folder / row["video"]["path"], save_all=True, append_images=images[1:], duration=1000)
        if answer is not None:
            row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        lines.append(json.dumps(row) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--known", type=int, default=714)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    write(chosen.folder, "train", flags(chosen.train, random.Random(chosen.seed)))
    write(chosen.folder, "test", flags(chosen.test, random.Random(chosen.seed + 1)))
    write(chosen.folder, "known", known(chosen.known, random.Random(chosen.seed + 2)))
