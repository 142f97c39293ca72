"""Draw a small dataset in the authors' format: flags of stripes, on noisy grounds, each with a question and an answer.

    python examples/flags.py flags --train 200 --test 100

Nano, the packaged model, does not know flags; ``recipes/flags.toml`` teaches it these from 200 pictures.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

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


def draw(country: str, dice: random.Random) -> Image.Image:
    """The country's flag of a random size, place and tilt on a random ground."""
    ground = tuple(dice.randrange(256) for _ in range(3))
    picture = Image.effect_noise((240, 240), dice.uniform(5, 40)).convert("RGB")
    picture = Image.blend(picture, Image.new("RGB", picture.size, ground), 0.7)
    width, height = (w := dice.randrange(110, 200)), round(w * dice.uniform(0.55, 0.72))
    flag = Image.new("RGBA", (width, height))
    stripes = UPRIGHT.get(country) or LEVEL[country]
    for i, colour in enumerate(stripes):
        first, last = i / len(stripes), (i + 1) / len(stripes)
        box = (first, 0, last, 1) if country in UPRIGHT else (0, first, 1, last)
        ImageDraw.Draw(flag).rectangle([round(v * (width, height)[j % 2]) for j, v in enumerate(box)], fill=colour)
    flag = flag.rotate(dice.uniform(-12, 12), expand=True, resample=Image.Resampling.BICUBIC)
    picture.paste(flag, (dice.randrange(240 - flag.width), dice.randrange(240 - flag.height)), flag)
    return picture.filter(ImageFilter.GaussianBlur(dice.uniform(0, 1.2)))


def write(folder: Path, name: str, count: int, dice: random.Random) -> None:
    """``name.jsonl`` and its pictures."""
    rows = []
    for i in range(count):
        country, path = COUNTRIES[i % len(COUNTRIES)], f"{name}/{i:04}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        draw(country, dice).save(folder / path)
        asked = [{"type": "image", "text": None}, {"type": "text", "text": dice.choice(QUESTIONS)}]
        said = [{"type": "text", "text": f"the flag of {country}"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "images": [path]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for offset, name in enumerate(("train", "test")):
        write(chosen.folder, name, getattr(chosen, name), random.Random(chosen.seed + offset))
