"""Training recipes in TOML: rejected with the name of the file, or unchanged by writing and reading."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from pathlib import Path

from aria.train.recipe import Recipe, changes
from aria.train.settings import to_toml
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.files import folder

LONGEST = 600
WORDS = (
    *("seed", "model", "data", "paths", "mixer", "batch", "tokens", "targets", "method", "lora", "full", "optimizer"),
    *("learning_rate", "schedule", "budget", "steps", "epochs", "parallel", "checkpoint", "log", "evaluate", "weight"),
    *("path", "a.b", "x y", '"', "cosine", "auto", "bfloat16", "adamw", "rank", "alpha", "factory", "dtype"),
)


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    overrides = [f"{draw.text(WORDS, 3)}={draw.text(WORDS, 2)}" for _ in range(draw.below(2))]
    if draw.flag():
        content = draw.rest()
    else:
        table = spoiled(draw, tomllib.loads(Recipe().to_toml()), WORDS)
        try:
            content = to_toml(table).encode()
        except (AttributeError, UnicodeError):  # no table, or half of a surrogate pair
            return
    file = folder("recipe") / "recipe.toml"
    file.write_bytes(content)
    recipe = _read(file, overrides)
    if recipe is None:
        return
    written = recipe.to_toml()
    file.write_text(written, encoding="utf-8")
    again = _read(file, [])
    assert again == recipe, f"{written} is read as another recipe"
    assert changes(recipe, again) == []


def _read(file: Path, overrides: list[str]) -> Recipe | None:
    try:
        return Recipe.read(file, overrides)
    except ValueError as error:
        message = str(error)
        assert str(file) in message or message.startswith("--set"), f"an error that does not name the file: {message}"
        assert len(message) < 5000, "a message as long as the file"
        return None


def seeds() -> Iterator[bytes]:
    yield b"\0\1" + b'seed = 1\n[data]\npaths = ["a"]\n[budget]\nsteps = 3\n[data.mixer."x y"]\nweight = 1.5\n'
    yield b"\0\1" + Recipe().to_toml().encode()
    chance = random.Random(0)
    yield from (b"\0\0" + chance.randbytes(30) for _ in range(30))
