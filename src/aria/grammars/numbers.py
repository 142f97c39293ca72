"""Exact bounds of numbers in JSON schemas: grammars compute with doubles, which have 53 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

EXACT = 2**53
"""Up to this value every integer is exact as a double."""
MAX_DIGITS = 40
"""Maximum digits of a bound that becomes a pattern."""
MAX_MULTIPLES = 1024
_LARGEST_DIVISOR = 2**32 - 1


def numeric(keywords: Sequence[dict[str, Any]], integer: bool) -> Any:
    """Return a schema of the numbers within bounds and multiples of divisors.

    Args:
        keywords: Sets of ``minimum``, ``maximum``, ``exclusiveMinimum``, ``exclusiveMaximum`` and ``multipleOf``, which
            all apply.
        integer: Integers only.

    Returns:
        A schema of a number, ``x-number`` with a pattern, ``anyOf`` these, or False.

    Raises:
        ValueError: A bound has too many digits, or there are too many multiples to list.
    """
    low = max((_low(one, integer) for one in keywords), default=None, key=_order(-1))
    high = min((_high(one, integer) for one in keywords), default=None, key=_order(1))
    low, high = low or (None, False), high or (None, False)
    if _is_empty(low, high):
        return False
    divisors = [Fraction(str(one["multipleOf"])) for one in keywords if one.get("multipleOf")]
    low, high = _within(low, -1), _within(high, 1)
    large = any(bound is not None and abs(bound) > EXACT for bound in (low[0], high[0]))
    if not large and all(divisor <= _LARGEST_DIVISOR for divisor in divisors):
        return _plain(integer, low, high, [one["multipleOf"] for one in keywords if one.get("multipleOf")])
    first, last = _whole(low, math.ceil, 1), _whole(high, math.floor, -1)
    if divisors:
        return _multiples(divisors, first, last, integer)
    if integer:
        return {"x-number": integers(first, last)}
    return _split(low, high, first, last)


Bound = tuple[Fraction | None, bool]
"""A number, None for unbounded, and whether it is excluded itself."""


def _is_empty(low: Bound, high: Bound) -> bool:
    """Whether there is no number between two bounds."""
    if low[0] is None or high[0] is None:
        return False
    return low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))


def _within(bound: Bound, outward: int) -> Bound:
    """Tighten a bound to the number of digits that patterns support."""
    number, most = bound[0], Fraction(10**MAX_DIGITS)
    if number is None or abs(number) <= most:
        return bound
    if number * outward < 0:
        raise ValueError(f"a bound has more than {MAX_DIGITS} digits")
    return most * outward, False


def _order(sign: int) -> Callable[[Bound], tuple[Any, bool]]:
    return lambda bound: (sign * math.inf if bound[0] is None else bound[0], bound[1] if sign < 0 else not bound[1])


def _low(one: dict[str, Any], integer: bool) -> Bound:
    bounds = [(Fraction(one[key]), key[0] == "e") for key in ("minimum", "exclusiveMinimum") if key in one]
    bound: Bound = max(bounds, default=(None, False))
    return (None if (first := _whole(bound, math.ceil, 1)) is None else Fraction(first), False) if integer else bound


def _high(one: dict[str, Any], integer: bool) -> Bound:
    bounds = [(Fraction(one[key]), key[0] == "e") for key in ("maximum", "exclusiveMaximum") if key in one]
    bound: Bound = min(bounds, default=(None, False), key=lambda bound: (bound[0], not bound[1]))
    return (None if (last := _whole(bound, math.floor, -1)) is None else Fraction(last), False) if integer else bound


def _whole(bound: Bound, rounded: Callable[[Fraction], int], step: int) -> int | None:
    """The closest integer within a bound."""
    number, exclusive = bound
    if number is None:
        return None
    whole = rounded(number)
    return whole + step if exclusive and whole == number else whole


def _plain(integer: bool, low: Bound, high: Bound, divisors: Sequence[Any] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer" if integer else "number"}
    for (number, exclusive), names in (
        (low, ("minimum", "exclusiveMinimum")),
        (high, ("maximum", "exclusiveMaximum")),
    ):
        if number is not None:
            found[names[exclusive]] = int(number) if number.denominator == 1 else float(number)
    if len(divisors) > 1:
        return {"allOf": [found, *({"type": found["type"], "multipleOf": divisor} for divisor in divisors)]}
    return {**found, "multipleOf": divisors[0]} if divisors else found


def _multiples(divisors: Sequence[Fraction], first: int | None, last: int | None, integer: bool) -> Any:
    """List the multiples within large bounds: grammars support divisors of 32 bits."""
    if not integer and any(divisor.denominator > 1 for divisor in divisors):
        raise ValueError("a fractional multipleOf is not supported with bounds beyond 2^53")
    divisor = math.lcm(*(one.numerator for one in divisors))
    if first is None or last is None or (last - first) // divisor >= MAX_MULTIPLES:
        raise ValueError(f"multipleOf beyond 32 bits, or with bounds beyond 2^53, allows over {MAX_MULTIPLES} numbers")
    found = range(-(-first // divisor) * divisor, last + 1, divisor)
    return {"x-number": "|".join(map(str, found))} if found else False


def _split(low: Bound, high: Bound, first: int | None, last: int | None) -> Any:
    """Split a range of numbers: exact doubles up to 2^53, integers beyond."""
    below: Bound = low if low[0] is not None and low[0] >= -EXACT else (Fraction(-EXACT), False)
    above: Bound = high if high[0] is not None and high[0] <= EXACT else (Fraction(EXACT), False)
    options: list[dict[str, Any]] = []
    if not _is_empty(below, above):
        options.append(_plain(False, below, above))
    for start, end in (
        (first, -EXACT if last is None else min(last, -EXACT)),
        (EXACT if first is None else max(first, EXACT), last),
    ):
        if start is None or end is None or start <= end:
            options.append({"x-number": integers(start, end)})
    return {"anyOf": options} if options else False


def integers(first: int | None, last: int | None) -> str:
    """A pattern that matches the integers from ``first`` to ``last``; None is unbounded.

    >>> integers(-1, 12)
    '-(1)|0|[1-9]|1[0-2]'
    """
    options = []
    if first is None or first < 0:
        smallest = 1 if last is None or last >= 0 else -last
        options.append(f"-({_digits(smallest, None if first is None else -first)})")
    if last is None or last >= 0:
        options.append(_digits(max(first or 0, 0), last))
    return "|".join(options)


def _digits(first: int, last: int | None) -> str:
    """The same for non-negative numbers, without a sign."""
    length = len(str(first))
    if last is not None and len(str(last)) == length:
        return "|".join(_same_length(str(first), str(last)))
    options = _same_length(str(first), "9" * length)
    if last is None:
        options.append(f"[1-9][0-9]{{{length},}}")
    else:
        if length + 1 < len(str(last)):
            options.append(f"[1-9][0-9]{{{length},{len(str(last)) - 2}}}")
        options += _same_length(f"1{'0' * (len(str(last)) - 1)}", str(last))
    return "|".join(options)


def _same_length(first: str, last: str) -> list[str]:
    if first == last:
        return [first]
    shared = next(i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b)
    head, a, b, rest = first[:shared], first[shared], last[shared], len(first) - shared - 1
    low, high = int(a), int(b)
    options = []
    if rest and first[shared + 1 :] != "0" * rest:
        options += [f"{head}{a}{tail}" for tail in _same_length(first[shared + 1 :], "9" * rest)]
        low += 1
    last_tail: list[str] = []
    if rest and last[shared + 1 :] != "9" * rest:
        last_tail = [f"{head}{b}{tail}" for tail in _same_length("0" * rest, last[shared + 1 :])]
        high -= 1
    if low <= high:
        digit = str(low) if low == high else f"[{low}-{high}]"
        options.append(f"{head}{digit}" + (f"[0-9]{{{rest}}}" if rest > 1 else "[0-9]" * rest))
    return options + last_tail
