"""Words that docs/glossary.md bans are absent from prose and identifiers.

``python tests/repository/test_words.py`` lists where they stand; ``--table`` prints the current `NOT_CLEAN`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = {
    "house": ("house", "houses"),
    "room": ("rooms", "a room", "the room", "each room", "this room", "own room", "room of"),
    "organ": ("organ", "organs"),
    "door": ("door", "doors"),
    "doorway": ("doorway", "doorways"),
    "floor": ("floor", "floors"),
    "habit": ("habit", "habits"),
    "stranger": ("stranger", "strangers"),
    "told": ("told",),
    "tells of": ("tell of", "tells of"),
    "go on": ("go on", "goes on", "going on", "gone on"),
    "how-manieth": ("how-manieth",),
    "picture tokens": ("picture token", "picture tokens"),
    "backwarded": ("backwarded",),
    "astray": ("astray",),
    "handful": ("handful", "handfuls"),
    "dice": ("dice",),
    "wants to be": ("want to be", "wants to be"),
    "by chance": ("by chance",),
    "whoever": ("whoever",),
    "the books": ("the books", "its books"),
}
"""Forms of each word; a space may be an underscore, and any case is meant."""


def expression(word: str) -> re.Pattern[str]:
    """Matches a word in prose, `snake_case`, `CamelCase` and `CAPITALS`."""
    cases = []
    for form in WORDS[word]:
        form = form.replace(" ", "[ _]")
        cases += [rf"(?<![A-Za-z]){form}(?![a-z])", rf"(?<![A-Z]){form[0].upper()}{form[1:]}(?![a-z])"]
        if form.isalpha():
            cases.append(rf"(?<![A-Za-z]){form.upper()}(?![A-Za-z])")
    return re.compile("|".join(cases))


EXPRESSIONS = {word: expression(word) for word in WORDS}
ANY = re.compile(
    "|".join(sorted((form.replace(" ", "[ _]") for forms in WORDS.values() for form in forms), key=len, reverse=True)),
    re.IGNORECASE,
)
"""Any form of any word, longest first: most files have none and need no closer look."""
FOLDERS = ("src", "recipes", "bench", "tests", "examples", "docs", "scripts", ".github")
FILES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Makefile",
    "pyproject.toml",
    ".ci/run",
    "Dockerfile",
)
KINDS = {".py", ".md", ".toml", ".js", ".html", ".css", ".yml", ".yaml", ".sh", ".txt", ".service", ".conf", ""}
LEFT_OUT = (
    "docs/glossary.md",
    "tests/repository/test_words.py",
    "src/aria/serve/page/vendor/",
    "tests/fuzz/corpus/",
    "tests/clients/node_modules/",
)
DATA = ("tests/", "recipes/nano/", "examples/", "src/aria/nano/README.md")
"""Where texts in quotes are data: questions, answers and words that models read."""
WITH_FLOORS = (
    "bench/",
    "tests/bench/",
    "docs/performance.md",
    "docs/lab/kernels.md",
    "recipes/nano/SPEED.md",
    "src/aria/ops/",
)
NOT_CLEAN: dict[str, dict[str, int]] = {}
"""Occurrences that are still to go, by folder and word. Numbers here only become smaller."""


def files() -> Iterator[Path]:
    """Files whose words are looked at."""
    for name in FILES:
        yield ROOT / name
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            where = file.relative_to(ROOT).as_posix()
            if (
                file.is_file()
                and file.suffix in KINDS
                and "__pycache__" not in where
                and not where.startswith(LEFT_OUT)
            ):
                yield file


def prose(where: str, text: str) -> str:
    """What is looked at of a file: all of it, or comments, docstrings and names where texts are data."""
    if not where.startswith(DATA) or not where.endswith(".py"):
        return re.sub(r"\bfloor(?=\()|\.floor\b|floor_divide|rounding_mode=.floor.", "", text)
    kept = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, _WITH_DOCSTRING)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NAME):
            kept.append(token.string)
    return re.sub(r"^floor$", "", "\n".join(kept), flags=re.MULTILINE)


_WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def found() -> Iterator[tuple[str, str, str]]:
    """File, word, and the line that it stands in, for each banned word of the tree."""
    for file in files():
        where, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8", errors="replace")
        forms = {form.lower().replace("_", " ") for form in ANY.findall(text)}
        words = [word for word, own in WORDS.items() if forms.intersection(own)]
        lines = prose(where, text).splitlines() if words else []
        for word in words:
            expression = EXPRESSIONS[word]
            if word == "floor" and where.startswith(WITH_FLOORS):
                continue
            for line in lines:
                for _ in expression.finditer(line):
                    yield where, word, line.strip()


def folder_of(where: str) -> str:
    """What `NOT_CLEAN` counts a file under: two folders, three inside the package."""
    parts = where.split("/")[:-1]
    return "/".join(parts[: 3 if parts[:1] == ["src"] else 2]) or where


def counted() -> dict[str, Counter[str]]:
    """Banned words by folder."""
    counts: dict[str, Counter[str]] = {}
    for where, word, _ in found():
        counts.setdefault(folder_of(where), Counter())[word] += 1
    return counts


def test_banned_words_are_absent():
    faults = [
        f"{folder}: {word!r} stands {count} times, {allowed} are known"
        for folder, words in counted().items()
        for word, count in words.items()
        if count > (allowed := NOT_CLEAN.get(folder, {}).get(word, 0))
    ]
    assert not faults, "\n".join(
        [*faults, "python tests/repository/test_words.py lists them; docs/glossary.md says what to write"]
    )


def test_the_glossary_lists_the_banned_words():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", page.partition("## Words not used")[2], re.MULTILINE)
    listed = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    assert listed == set(WORDS)


def test_words_are_found_in_any_case_and_in_identifiers():
    for text in ("door", "Doors", "DOORS", "_DOOR", "door_of", "DoorPlan", "a door."):
        assert EXPRESSIONS["door"].search(text), text
    for text in ("doorstep", "indoor", "OUTDOOR"):
        assert not EXPRESSIONS["door"].search(text), text
    assert EXPRESSIONS["room"].search("A room imports from others")
    assert not EXPRESSIONS["room"].search("no room for an answer")
    assert EXPRESSIONS["go on"].search("it goes on") and EXPRESSIONS["go on"].search("_go_on")
    assert not EXPRESSIONS["go on"].search("cargo on")


if __name__ == "__main__":
    if "--table" in sys.argv:
        for folder, words in sorted(counted().items()):
            print(f"    {folder!r}: {dict(sorted(words.items()))},".replace("'", '"'))
    else:
        for where, word, line in found():
            print(f"{where}: {word}: {line[:140]}")
