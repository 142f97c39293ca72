"""How tokens are chosen, and when an answer ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to end.

    Penalties and bias change the scores first; then come temperature, ``top_k``, ``top_p`` and ``min_p``.

    Raises:
        ValueError: a value outside its limits.
    """

    max_tokens: int = 256
    """At least 1."""
    temperature: float = 0.0
    """0 to 2; 0 is greedy."""
    top_p: float = 1.0
    """Above 0, at most 1: keep the smallest set of likeliest tokens that holds so much probability."""
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    """0 to 1: drop tokens less likely than so many times the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """0.01 to 100: scores of tokens in the prompt or the answer are divided by it where positive, else multiplied."""
    frequency_penalty: float = 0.0
    """-2 to 2: taken from a token's score for each time that the answer holds it."""
    presence_penalty: float = 0.0
    """-2 to 2: taken from a token's score if the answer holds it."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id -> what is added to its score, -100 to 100."""
    seed: int | None = None
    """None draws one from torch's global generator, so ``torch.manual_seed`` makes a program repeatable."""
    stop: str | Sequence[str] | None = ()
    """Texts at which an answer ends; none of them is part of it."""
    ignore_eos: bool = False
    """Go on past the end of the text or of the turn, to ``max_tokens`` or a text of ``stop``: for benchmarks."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside each chosen one, to 20; 0 reports the chosen one alone."""
    n: int = 1
    """Answers to one prompt."""
    json_schema: Mapping[str, Any] | bool | None = field(default=None, hash=False)
    """The answer is JSON that follows this schema, without optional white space; True: any object. It ends with its
    last brace, or in the middle where ``max_tokens`` is reached."""

    def __new__(cls, **fields: object) -> SamplingParams:
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"unknown sampling fields: {', '.join(unknown)}; expected some of {known}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(self.logit_bias) or None)
        for name, holds, expected in (
            ("max_tokens", _whole(self.max_tokens, 1), "a whole number, at least 1"),
            ("temperature", _number(self.temperature, 0, 2), "a number from 0 to 2"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0 and at most 1"),
            ("top_k", _whole(self.top_k, 0), "a whole number, 0 (keep all) or more"),
            ("min_p", _number(self.min_p, 0, 1), "a number from 0 (keep all) to 1"),
            # Far beyond what changes anything, and scores stay in float32's range.
            ("repetition_penalty", _number(self.repetition_penalty, 0.01, 100), "a number from 0.01 to 100"),
            ("frequency_penalty", _number(self.frequency_penalty, -2, 2), "a number from -2 to 2"),
            ("presence_penalty", _number(self.presence_penalty, -2, 2), "a number from -2 to 2"),
            ("logit_bias", _biases(self.logit_bias), "None, or a mapping from token ids to numbers from -100 to 100"),
            ("seed", self.seed is None or _whole(self.seed), "None or a whole number"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("logprobs", self.logprobs is None or _whole(self.logprobs, 0, 20), "None, or a whole number from 0 to 20"),
            ("n", _whole(self.n, 1), "a whole number, at least 1"),
            (
                "json_schema",
                self.json_schema is None or self.json_schema is True or isinstance(self.json_schema, Mapping),
                "None, True (any object) or a mapping, the JSON schema",
            ),
            ("ignore_eos", not (self.ignore_eos and self.json_schema is not None), "False beside json_schema"),
            ("stop", all(isinstance(text, str) and text for text in stop), "texts that are not empty"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


def _number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def _whole(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _biases(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(_whole(token, 0) and _number(bias, -100, 100) for token, bias in value.items())
