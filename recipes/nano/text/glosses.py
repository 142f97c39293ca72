"""Definitions of English nouns from WordNet: which words, which of their senses, and the text.

``python -m recipes.nano.text.glosses`` writes ``.nano/glosses.json`` (WordNet 3.0 from Debian's ``wordnet-base``).
"""

import argparse
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

from recipes.nano.assets.archive import FOLDER
from recipes.nano.assets.excluded_words import is_excluded
from recipes.nano.assets.sources import WORD_PACKAGES, Sources

FILE = FOLDER / "glosses.json"
WORDS = 2400
"""Number of taught words. Capacity does not limit it (60 letters each at 1.5 bits are 0.2 Mbit), training time does:
each definition has to be seen some hundred times."""
LONGEST = 84  # maximum number of letters of a definition
# Lexicographer files of visible things: animals, artefacts, body, food, objects, plants, substances.
THINGS = (5, 6, 8, 13, 17, 20, 27)
LEAST_TAGGED = 3
_EXCLUDED = re.compile(
    r"offensive|slur|derogatory|disparaging|obscene|vulgar|sexual|ethnic|genital|intercourse|excre|insult"
)


class Words(NamedTuple):
    """English nouns."""

    definitions: dict[str, str]
    """Taught words: word -> definition."""
    others: list[str]
    """Equally common words that are not taught; they teach the answer "I do not know this word."."""


def choose(folder: Path, words: int = WORDS) -> Words:
    """Choose words: things first, then by how often WordNet's tagged texts use a word.

    Args:
        folder: Folder of WordNet's ``index.noun``, ``data.noun`` and ``cntlist.rev``.
        words: Number of taught words.
    """
    counts = _counts(folder / "cntlist.rev")
    found: list[tuple[bool, int, str, str]] = []
    common: set[str] = set()
    with (folder / "data.noun").open(encoding="latin-1") as data:
        for word, offsets in _nouns(folder / "index.noun"):
            senses = counts.get(word, {})
            if sum(senses.values()) < LEAST_TAGGED:
                continue
            synsets = [_synset(data, offset) for offset in offsets]
            number, is_thing = _sense([synset.file for synset in synsets], senses)
            text = synsets[number].text
            if word.capitalize() in synsets[number].words or word.upper() in synsets[number].words:
                continue  # a name
            common.add(word)
            if 8 <= len(text) <= LONGEST and text.isascii() and not _EXCLUDED.search(text) and word not in text.split():
                found.append((not is_thing, -sum(senses.values()), word, text))
    found.sort()
    taught = {word: text for _, _, word, text in found[:words]}
    return Words(taught, sorted(common - taught.keys()))


def _nouns(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield words of 3 to 12 letters and the offsets of their senses in ``data.noun``, in WordNet's order."""
    with file.open(encoding="ascii") as lines:
        for line in lines:
            word, *rest = line.split()
            if re.fullmatch(r"[a-z]{3,12}", word) and not line.startswith(" ") and not is_excluded(word):
                yield word, [int(offset) for offset in rest[-int(rest[1]) :]]


def _counts(file: Path) -> dict[str, dict[int, int]]:
    """Return counts in the tagged texts, of nouns: word -> sense (from 0) -> count."""
    found: dict[str, dict[int, int]] = {}
    with file.open(encoding="ascii") as lines:
        for line in lines:
            key, sense, count = line.split()
            word, _, kind = key.partition("%")
            if kind.startswith("1:"):
                found.setdefault(word, {})[int(sense) - 1] = int(count)
    return found


class Synset(NamedTuple):
    """A sense: its lexicographer file, its words, and its definition without brackets and examples."""

    file: int
    words: list[str]
    text: str


def _synset(data: TextIO, offset: int) -> Synset:
    data.seek(offset)
    # offset lex_filenum ss_type w_cnt (hexadecimal) word lex_id [word lex_id ...] ... | gloss
    line, _, gloss = data.readline().partition(" | ")
    fields = line.split()
    text = re.sub(r"\([^)]*\)", "", gloss.split('"')[0]).split(";")[0]
    return Synset(int(fields[1]), fields[4 : 4 + 2 * int(fields[3], 16) : 2], " ".join(text.split()).strip(" :,."))


def _sense(files: list[int], counts: dict[int, int]) -> tuple[int, bool]:
    """Return the sense to teach, and whether it is a thing.

    The most common sense, unless a thing is at least a third as common: "crane" is the bird or the machine.
    """
    commonest = max(range(len(files)), key=lambda n: (counts.get(n, 0), -n))
    things = [n for n, file in enumerate(files) if file in THINGS and 3 * counts.get(n, 0) >= counts.get(commonest, 0)]
    best = max(things, key=lambda n: (counts.get(n, 0), -n), default=commonest)
    return best, files[best] in THINGS


@cache
def read(file: Path = FILE) -> Words:
    """Read the words that :func:`choose` chose.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; build it with: python -m recipes.nano.text.glosses")
    return Words(**json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    """Write the file and print how many words it has."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    root = Sources(FOLDER / "src").debian(WORD_PACKAGES)
    found = choose(root / "usr" / "share" / "wordnet")
    FILE.write_text(json.dumps(found._asdict(), indent=0) + "\n", encoding="utf-8")
    letters = sum(map(len, found.definitions.values())) / len(found.definitions)
    print(f"{len(found.definitions)} definitions of {letters:.0f} letters, {len(found.others)} other words -> {FILE}")


if __name__ == "__main__":
    main()
