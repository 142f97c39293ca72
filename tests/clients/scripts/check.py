"""Shared by the scripts: the server's address, questions, and the report of outcomes.

A script is run as ``python SCRIPT ADDRESS KEY`` and prints one line of JSON.
"""

from __future__ import annotations

import base64
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ADDRESS, KEY = sys.argv[1:3]
BASE_URL = f"{ADDRESS}/v1"
MODEL = "aria-nano"

_PICTURES = Path(__file__).parents[3] / "examples" / "pictures"
WORD = _PICTURES / "word.png"
SHAPES = _PICTURES / "shapes.png"

GREETING = "Hello! Show me a picture."
"""Nano's answer to "Hello"."""
THANKS = "Thank you."
WELCOME = "You are welcome."
"""Nano's answer to `THANKS`, also with tools and after their results."""
READ = "What does it say?"
"""Question about `WORD`, which says Welcome."""
CIRCLE = "What colour is the circle?"
"""Question about `SHAPES`; the circle is red."""
TOO_LONG = "x" * 5000
"""Text of more tokens than nano's 4,096."""


def base64_of(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64_of(picture)}"


def equal(found: object, expected: object) -> None:
    """Check that values are equal; the error shows both."""
    if found != expected:
        raise AssertionError(f"{found!r}; expected {expected!r}")


def raises(kinds: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> Exception:
    """Return the error that a call raises, which has to be of one of these types."""
    try:
        result = call()
    except kinds as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


def report(*checks: Callable[[], None]) -> None:
    """Run the checks and print their outcomes by name: "passes", or the error."""
    outcomes = {}
    for check in checks:
        try:
            check()
            outcomes[check.__name__] = "passes"
        except Exception as error:  # any error of a client is an outcome
            traceback.print_exc()
            outcomes[check.__name__] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcomes))
