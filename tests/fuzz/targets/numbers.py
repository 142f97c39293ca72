"""Bounds and divisors of numbers: the merged schema allows exactly the integers that all of them allow."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from aria.grammars.numbers import EXACT, MAX_DIGITS, numeric
from tests.fuzz.draw import Draw

LONGEST = 64
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    integer = draw.flag()
    said = [
        {draw.one((*_BOUNDS, "multipleOf")): _number(draw) for _ in range(1 + draw.below(3))}
        for _ in range(1 + draw.below(2))
    ]
    for one in said:
        if "multipleOf" in one:
            one["multipleOf"] = abs(one["multipleOf"]) or 1
    try:
        found = numeric(said, integer)
    except ValueError:
        return
    for number in _candidates(said):
        fits = all(_fits(one, number) for one in said)
        assert _allows(found, number) == fits, f"{number}: {said} became {found}"


def _number(draw: Draw) -> float:
    match draw.below(5):
        case 0:
            return draw.below(40) - 20
        case 1:
            return (1 if draw.flag() else -1) * (EXACT + draw.below(40) - 20)
        case 2:
            return int.from_bytes(draw.bytes(1 + draw.below(16)), "little", signed=True)
        case 3:
            return draw.below(1000) / 8 - 20
    return draw.one((0.1, 1e-7, 1e22, -1e22, 2.5e15, 10**40, 10**41, -(10**40), 2**32, 2**31, 3))


def _candidates(said: list[dict[str, Any]]) -> set[int]:
    """Integers around all that is said; none of more digits than patterns spell."""
    near = {0, EXACT, -EXACT}
    for one in said:
        near |= {int(value) for value in one.values()}
        near |= {int(value) * factor for value in one.values() for factor in (2, 7)}
    return {one + step for one in near for step in range(-2, 3) if abs(one) < 10 ** (MAX_DIGITS - 1)}


def _fits(one: dict[str, Any], number: int) -> bool:
    return (
        number >= Fraction(one.get("minimum", number))
        and number <= Fraction(one.get("maximum", number))
        and number > Fraction(one.get("exclusiveMinimum", number - 1))
        and number < Fraction(one.get("exclusiveMaximum", number + 1))
        and number % Fraction(str(one.get("multipleOf", 1))) == 0
    )


def _allows(found: Any, number: int) -> bool:
    if found is False:
        return False
    if "x-number" in found:
        return re.fullmatch(found["x-number"], str(number)) is not None
    for key, meets in (("anyOf", any), ("allOf", all)):
        if key in found:
            return meets(_allows(one, number) for one in found[key])
    return _fits(found, number)


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (chance.randbytes(24) for _ in range(30))
