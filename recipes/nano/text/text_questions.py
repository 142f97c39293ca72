"""Questions without an image: definitions, sums, facts about words and the calendar, and questions beyond nano.

Each kind holds something out of training: wordings of the question for definitions and questions beyond nano, pairs of
numbers for sums, words for spelling and plurals. ``held_out=True`` uses only what was held out.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random

from recipes.nano.text import dialogue, glosses

Turn = tuple[str, str]  # question, its only right answer

UNKNOWN_WORD = "I do not know this word."
UNKNOWN_FACT, NO_PICTURE = dialogue.UNKNOWN_FACT, dialogue.NO_PICTURE

# Wordings of a question: those of training, then held-out ones.
Forms = tuple[Sequence[str], Sequence[str]]
DEFINE: Forms = (
    (
        *("Define {}.", "Define the word {}.", "What does {} mean?", "What is the meaning of {}?", "Meaning of {}?"),
        *("What does the word {} mean?", "Give the definition of {}.", "Give a definition of the word {}."),
        *("Explain the word {}.", "What is meant by {}?", "Tell me what {} means.", "definition of {}", "Explain {}."),
        *("Do you know what {} means?", "Please explain {}.", "I want to know what {} means.", "What is {}?"),
    ),
    (
        "What is the definition of {}?",
        "Please define {}.",
        "Can you tell me what {} means?",
        "Tell me the meaning of {}.",
    ),
)
AROUND = (
    *(("Hello. ", ""), ("Good morning! ", ""), ("OK. ", ""), ("Next word. ", ""), ("A question: ", ""), ("Now: ", "")),
    *(("", " Thanks."), ("", " Thank you!"), ("I read a book. ", ""), ("It is for my homework. ", ""), ("So, ", "")),
    *(("", " I have forgotten it."), ("I saw it somewhere. ", ""), ("", " It is in my book."), ("Well. ", "")),
)
"""Text before and after a question."""
ADD: Forms = (
    (
        *(
            "What is {} + {}?",
            "{} + {}",
            "{} + {} = ?",
            "What is {} plus {}?",
            "How much is {} + {}?",
            "Add {} and {}.",
        ),
        *("How much is {} plus {}?", "Calculate {} + {}.", "What is the sum of {} and {}?", "{} plus {}"),
    ),
    (),
)
TAKE: Forms = (
    ("What is {} - {}?", "{} - {}", "What is {} minus {}?", "How much is {} - {}?", "Calculate {} - {}."),
    (),
)
TIMES: Forms = (("What is {} x {}?", "What is {} times {}?", "How much is {} times {}?", "{} times {}"), ())
PLURAL = ("What is the plural of {}?", "Plural of {}?", "Give the plural of {}.")
SPELL = ("Spell {}.", "How do you spell {}?", "Spell the word {}.")
LETTERS = ("How many letters does {} have?", "How many letters are in {}?", "Count the letters of {}.")
FIRST = ("What is the first letter of {}?", "Which letter does {} begin with?")
LAST = ("What is the last letter of {}?", "Which letter does {} end with?")
OPPOSITE = ("What is the opposite of {}?", "Opposite of {}?", "Give the opposite of {}.")
AFTER = ("What comes after {}?", "Which one comes after {}?", "What follows {}?")
BEFORE = ("What comes before {}?", "Which one comes before {}?")
BEYOND: Forms = (  # never taught: people, news, places, advice
    (
        *("Who won the {}?", "When was the {} invented?", "How much does a {} cost?", "What is the weather in {}?"),
        *("What is the capital of {}?", "Who wrote {}?", "How old is the {}?", "What happened in {}?", "Who is {}?"),
        *("Write a poem about a {}.", "Tell me a story about the {}.", "How do I cook a {}?", "Where can I buy a {}?"),
        *("Translate {} into French.", "Who discovered the {}?", "How far is it to {}?", "Why is the {} so big?"),
    ),
    ("Who invented the {}?", "How do I repair a {}?", "What is the population of {}?", "Write a song about the {}."),
)

OPPOSITES = (
    *("big small", "hot cold", "old young", "high low", "long short", "fast slow", "light dark", "hard soft"),
    *("wet dry", "full empty", "open closed", "early late", "good bad", "happy sad", "rich poor", "strong weak"),
    *("thick thin", "wide narrow", "clean dirty", "loud quiet", "up down", "left right", "in out", "near far"),
    *("first last", "day night", "summer winter", "north south", "east west", "yes no", "true false", "begin end"),
    *("give take", "buy sell", "push pull", "win lose", "love hate", "always never", "above below", "inside outside"),
)
ROWS = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    *(
        ("January", "February", "March", "April", "May", "June"),
        ("July", "August", "September", "October", "November", "December"),
    ),
    ("spring", "summer", "autumn", "winter"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
)


def held(text: str, one_in: int = 10) -> bool:
    """Return whether something is held out: one in ``one_in``, by checksum."""
    return zlib.crc32(text.encode()) % one_in == 0


@cache
def words(held_out: bool) -> list[str]:
    """Return defined words whose spelling and plural are taught, or held out."""
    return [word for word in glosses.read().definitions if held(f"word {word}") == held_out]


@cache
def others(held_out: bool) -> list[str]:
    """Return words without a definition that training asks for, or that it never asks for."""
    return [word for word in glosses.read().others if held(f"other {word}", 4) == held_out]


def definition(rng: Random, held_out: bool = False) -> Turn:
    """Ask for a definition. All words are taught (nobody could guess one); only wordings are held out."""
    known = glosses.read().definitions
    word = rng.choice(list(known))
    question = _form(DEFINE, rng, held_out).format(word)
    if not held_out and rng.random() < 0.3:
        # So that the word is recognised at any position.
        before, after = rng.choice(AROUND)
        question = f"{before}{question}{after}"
    return question, dialogue.sentence(known[word])


def unknown_word(rng: Random, held_out: bool = False) -> Turn:
    """Ask for a word that is not taught; held-out words are never asked for in training."""
    return rng.choice(DEFINE[0]).format(rng.choice(others(held_out))), UNKNOWN_WORD


def sum_of_two(rng: Random, held_out: bool = False) -> Turn:
    """Ask for the sum of two numbers of two digits, in training also of one. Pairs are held out in both orders."""
    low = 10 if held_out or rng.random() < 0.8 else 0
    while True:
        a, b = rng.randint(low, 99), rng.randint(low, 99)
        if held(f"{min(a, b)} + {max(a, b)}") == held_out:
            return _form(ADD, rng, False).format(a, b), f"{a + b}."


def reckoning(rng: Random, held_out: bool = False) -> Turn:
    """Ask for a difference of numbers up to 99, or a product up to ten times ten (no product is held out)."""
    if not held_out and rng.random() < 0.2:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return _form(TIMES, rng, False).format(a, b), f"{a * b}."
    while True:
        b, a = sorted((rng.randint(0, 99), rng.randint(0, 99)))
        if held(f"{a} - {b}") == held_out:
            return _form(TAKE, rng, False).format(a, b), f"{a - b}."


def plural_of(noun: str) -> str:
    """Return the plural of a regular English noun."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


# Endings of irregular nouns and of nouns without a common plural.
_ODD = (
    "man",
    "foot",
    "tooth",
    "goose",
    "mouse",
    "child",
    "fe",
    "lf",
    "af",
    "ief",
    "sis",
    "us",
    "um",
    "fish",
    "eaf",
    "ox",
)


def about_word(rng: Random, held_out: bool = False) -> Turn:
    """Ask for the spelling, number of letters, first letter, last letter or plural of a word."""
    word = rng.choice(words(held_out))
    forms: list[tuple[Sequence[str], str]] = [
        (SPELL, f"{'-'.join(word.upper())}."),
        (LETTERS, f"{len(word)}."),
        (FIRST, f"{word[0].upper()}."),
        (LAST, f"{word[-1].upper()}."),
    ]
    if not word.endswith((*_ODD, "s", "ing", "ness")):
        forms.append((PLURAL, dialogue.sentence(plural_of(word))))
    asked, answer = rng.choice(forms)
    return rng.choice(list(asked)).format(word), answer


def fact(rng: Random, held_out: bool = False) -> Turn:
    """Ask for an opposite or a neighbour in a sequence (days, letters, ...); none is held out."""
    if rng.random() < 0.4:
        a, b = rng.choice(OPPOSITES).split()
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return rng.choice(OPPOSITE).format(a), dialogue.sentence(b)
    row = rng.choice(ROWS)
    place = rng.randrange(len(row) - 1)
    first, second = row[place : place + 2]
    if rng.random() < 0.7:
        return rng.choice(AFTER).format(first), dialogue.sentence(second)
    return rng.choice(BEFORE).format(second), dialogue.sentence(first)


def beyond(rng: Random, held_out: bool = False) -> Turn:
    """Ask something that is never taught."""
    pool = others(held_out) if rng.random() < 0.5 else words(held_out)
    return _form(BEYOND, rng, held_out).format(rng.choice(pool)), UNKNOWN_FACT


def unseen(rng: Random, held_out: bool = False) -> Turn:
    """Ask about an image although there is none; the last wording of each kind is held out."""
    kinds = (dialogue.READ, dialogue.DESCRIBE, dialogue.NAME_EMOJI, dialogue.COUNT, dialogue.COLOUR_OF, dialogue.WHERE)
    forms = rng.choice(kinds)
    form = forms[-1] if held_out else rng.choice(forms[:-1])
    what = rng.choice(("circle", "square", "star", "heart", "triangle"))
    return form.format(dialogue.plural(what) if forms is dialogue.COUNT else what), NO_PICTURE


def talk(rng: Random, held_out: bool = False) -> Turn:
    """Greet nano, or ask about nano itself."""
    return dialogue.small_talk(rng)


KINDS: Mapping[str, Callable[..., Turn]] = {
    "definitions": definition,
    "unknown words": unknown_word,
    "sums": sum_of_two,
    "reckoning": reckoning,
    "words": about_word,
    "facts": fact,
    "beyond": beyond,
    "no picture": unseen,
    "talk": talk,
}


def conversation(rng: Random, shares: Mapping[str, float], longest: int = 3) -> list[Turn]:
    """Draw turns by the shares of their kinds, no question twice, typed as people type.

    Args:
        rng: Source of all choices.
        shares: Key of ``KINDS`` -> weight.
        longest: Maximum number of turns.
    """
    count = rng.choices(range(1, longest + 1), [0.6, 0.25, 0.15][:longest])[0]
    turns = [KINDS[kind](rng) for kind in rng.choices(list(shares), list(shares.values()), k=count)]
    return [(dialogue.asked([question], rng), answer) for question, answer in dict(turns).items()]


def text(rng: Random, lines: int = 4) -> str:
    """Draw lines of plain text: words with their definitions, as in a dictionary."""
    known = glosses.read().definitions
    return "\n".join(f"{word}: {known[word]}." for word in rng.sample(list(known), lines))


def _form(forms: Forms, rng: Random, held_out: bool) -> str:
    return rng.choice(list(forms[1] if held_out else forms[0]))
