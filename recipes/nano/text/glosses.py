"""Definitions of English nouns from WordNet: which words, which of their senses, and the text of it.

``python -m recipes.nano.text.glosses`` writes ``.nano/glosses.json`` (WordNet 3.0 from Debian's ``wordnet-base``).
"""

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
"""About 60 letters each, 1.5 bits a letter: 0.2 Mbit, little beside a decoder of 8M parameters. Each has to be seen
some hundred times, and that is what bounds their number."""
LONGEST = 84  # letters of a definition
# Lexicographers' files of things that have a look: animals, artefacts, body, food, objects, plants, substances.
THINGS = (5, 6, 8, 13, 17, 20, 27)
LEAST_TAGGED = 3
_EXCLUDED = re.compile(
    r"offensive|slur|derogatory|disparaging|obscene|vulgar|sexual|ethnic|genital|intercourse|excre|insult"
)


class Words(NamedTuple):
    """Nouns of English."""

    definitions: dict[str, str]
    """Word -> definition, of the words that are taught."""
    others: list[str]
    """Words as common that are not taught, so that not knowing can be."""


def choose(folder: Path, words: int = WORDS) -> Words:
    """Things first, then by how often WordNet's tagged texts use a word.

    Args:
        folder: WordNet's ``index.noun``, ``data.noun`` and ``cntlist.rev``.
        words: how many.
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
    """Words of 3 to 12 letters and where their senses stand in ``data.noun``, in WordNet's order."""
    with file.open(encoding="ascii") as lines:
        for line in lines:
            word, *rest = line.split()
            if re.fullmatch(r"[a-z]{3,12}", word) and not line.startswith(" ") and not is_excluded(word):
                yield word, [int(offset) for offset in rest[-int(rest[1]) :]]


def _counts(file: Path) -> dict[str, dict[int, int]]:
    """Word -> sense (from 0) -> how often the tagged texts mean it, of nouns."""
    found: dict[str, dict[int, int]] = {}
    with file.open(encoding="ascii") as lines:
        for line in lines:
            key, sense, count = line.split()
            word, _, kind = key.partition("%")
            if kind.startswith("1:"):
                found.setdefault(word, {})[int(sense) - 1] = int(count)
    return found


class Synset(NamedTuple):
    """A sense: its lexicographer's file, its words, and the definition without remarks in brackets and examples."""

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
    """Which sense people mean, and whether it is a thing.

    The commonest, but for a thing that is at least a third as common: whoever asks what a crane is has seen one.
    """
    commonest = max(range(len(files)), key=lambda n: (counts.get(n, 0), -n))
    things = [n for n, file in enumerate(files) if file in THINGS and 3 * counts.get(n, 0) >= counts.get(commonest, 0)]
    best = max(things, key=lambda n: (counts.get(n, 0), -n), default=commonest)
    return best, files[best] in THINGS


@cache
def read(file: Path = FILE) -> Words:
    """What :func:`choose` chose.

    Raises:
        FileNotFoundError: the file has not been made.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; build it with: python -m recipes.nano.text.glosses")
    return Words(**json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    """Write the file, and say how many there are."""
    root = Sources(FOLDER / "src").debian(WORD_PACKAGES)
    found = choose(root / "usr" / "share" / "wordnet")
    FILE.write_text(json.dumps(found._asdict(), indent=0) + "\n", encoding="utf-8")
    letters = sum(map(len, found.definitions.values())) / len(found.definitions)
    print(f"{len(found.definitions)} definitions of {letters:.0f} letters, {len(found.others)} other words -> {FILE}")


if __name__ == "__main__":
    main()
