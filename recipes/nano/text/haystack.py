"""Long texts with needles to find, for the long-context stage and the evaluation."""

from random import Random

from recipes.nano.text import glosses, text_questions
from recipes.nano.text.text_questions import Turn

OWNERS = (
    *("fox", "owl", "bear", "king", "queen", "baker", "pilot", "sailor", "wizard", "farmer", "doctor", "painter"),
    *("tiger", "mouse", "robot", "teacher", "gardener", "captain", "singer", "judge"),
)
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "golden", "silver", "pink")
NEEDLE = "The secret number of the {} is {}."
ASK = ("What is the secret number of the {}?", "Which secret number does the {} have?", "Tell me the number of the {}.")
MARKERS = 26
"""Upper bound of the tokens that the chat format adds to a question and its answer."""


def haystack(
    rng: Random, length: int, depth: float | None = None, *, questions: int = 1, held_out: bool = False
) -> list[Turn]:
    """Generate a text of about ``length`` tokens with numbers of several owners, and questions about some of them.

    There is another owner for every 600 tokens, so that finding any number is not enough.

    Args:
        rng: Source of all choices.
        length: Maximum number of tokens (letters) of the whole conversation; it is rarely shorter by more than a line.
        depth: Position of the first needle that is asked for, from 0 (start) to 1 (end); None draws it.
        questions: Maximum number of turns.
        held_out: Use owners (a colour and an animal or person) and numbers that training never uses.
    """
    owners = [f"{c} {o}" for c in COLOURS for o in OWNERS if text_questions.held(f"owner {c} {o}") == held_out]
    numbers = {owner: _number(rng, held_out) for owner in rng.sample(owners, min(len(owners), 2 + length // 600))}
    turns = [(rng.choice(ASK).format(owner), f"{number}.") for owner, number in list(numbers.items())[:questions]]
    needle, *lines = [NEEDLE.format(owner, number) for owner, number in numbers.items()]
    remaining = length - sum(MARKERS + len(question) + len(answer) for question, answer in turns)
    remaining -= len(needle) + 1 + sum(len(line) + 1 for line in lines)
    known = glosses.read().definitions
    words = list(known)
    while True:
        word = rng.choice(words)
        line = f"{word}: {known[word]}."
        remaining -= len(line) + 1
        if remaining < 0:
            break
        lines.append(line)
    rng.shuffle(lines)
    lines.insert(round((rng.random() if depth is None else depth) * len(lines)), needle)
    question, answer = turns[0]
    return [("\n".join([*lines, question]), answer), *turns[1:]]


def _number(rng: Random, held_out: bool) -> str:
    while True:
        number = str(rng.randint(1000, 9999))
        if text_questions.held(f"number {number}") == held_out:
            return number
