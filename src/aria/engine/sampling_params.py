"""`SamplingParams`: how tokens are sampled, and when an answer ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any


class ParameterError(ValueError):
    """A sampling parameter has an invalid value.

    Args:
        name: Name of the parameter.
        problem: Its value and what was expected; the message is the name followed by this.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample tokens, and when to end.

    Penalties and biases are applied to the logits first, then temperature, ``top_k``, ``top_p`` and ``min_p``.

    Raises:
        ParameterError: A value is out of range.
    """

    max_tokens: int = 256
    """Maximum number of tokens, 0 or more. 0 only reads the prompt, for ``prompt_logprobs``."""
    min_tokens: int = 0
    """Minimum number of tokens, at most ``max_tokens``. Until then end tokens are not sampled, and texts of ``stop`` do
    not count."""
    temperature: float = 0.0
    """0 to 2; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling threshold, 0 to 1: keep the smallest set of most likely tokens with this total probability. 0 is
    greedy."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """0 to 1: drop tokens less likely than this times the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """0.01 to 100: positive logits of tokens in the prompt or answer are divided by it, negative ones multiplied."""
    frequency_penalty: float = 0.0
    """-2 to 2: subtracted from a token's logit once for each time the token is in the answer."""
    presence_penalty: float = 0.0
    """-2 to 2: subtracted from a token's logit if the token is in the answer."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id -> value to add to its logit, -100 to 100."""
    seed: int | None = None
    """None draws a seed from torch's global generator, so ``torch.manual_seed`` makes a program reproducible."""
    stop: str | Sequence[str] | None = ()
    """Texts that end an answer. They are not part of it, unless ``include_stop_str_in_output``."""
    stop_token_ids: Sequence[int] | None = ()
    """Tokens that end an answer, beside the model's own. Their text is not part of it."""
    include_stop_str_in_output: bool = False
    """Keep the stop text, or the text of the end token, that ended the answer."""
    ignore_eos: bool = False
    """Continue past the end of text or turn, until ``max_tokens``, ``stop`` or ``stop_token_ids``."""
    skip_special_tokens: bool = True
    """Leave special tokens, such as the end of text, out of the answer's text."""
    logprobs: int | None = None
    """Number of most likely tokens to return beside each sampled one, up to 20; 0 returns the sampled one alone."""
    prompt_logprobs: int | None = None
    """Number of most likely tokens to return beside each token of the prompt, up to 20; 0 returns the prompt's own
    alone. Such a prompt is computed as a whole, without the prefix cache."""
    n: int = 1
    """Number of answers to one prompt."""
    json_schema: Mapping[str, Any] | bool | None = field(default=None, hash=False)
    """The answer is JSON that follows this schema, without optional white space; True means any object. An answer of
    ``max_tokens`` is incomplete."""
    grammar: str | None = None
    """The answer follows this grammar: llguidance's Lark or llama.cpp's GBNF; see also ``from_regex``,
    ``from_choices`` and ``from_structural_tag`` of :mod:`aria.engine.grammar`."""

    def __new__(cls, **fields: object) -> SamplingParams:
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"unknown sampling fields: {', '.join(unknown)}; expected some of {known}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(self.logit_bias) or None)
        constraint = "json_schema" if self.grammar is None else "grammar"
        for name, holds, expected in (
            ("max_tokens", _integer(self.max_tokens, 0), "a whole number, 0 or more"),
            ("min_tokens", _integer(self.min_tokens, 0), "a whole number, 0 or more"),
            ("temperature", _number(self.temperature, 0, 2), "a number from 0 to 2"),
            ("top_p", _number(self.top_p, 0, 1), "a number from 0 (greedy) to 1"),
            ("top_k", _integer(self.top_k, 0), "a whole number, 0 (keep all) or more"),
            ("min_p", _number(self.min_p, 0, 1), "a number from 0 (keep all) to 1"),
            # More would change nothing, and logits stay in the range of float32.
            ("repetition_penalty", _number(self.repetition_penalty, 0.01, 100), "a number from 0.01 to 100"),
            ("frequency_penalty", _number(self.frequency_penalty, -2, 2), "a number from -2 to 2"),
            ("presence_penalty", _number(self.presence_penalty, -2, 2), "a number from -2 to 2"),
            ("logit_bias", _biases(self.logit_bias), "None, or a mapping from token ids to numbers from -100 to 100"),
            ("seed", self.seed is None or _integer(self.seed), "None or a whole number"),
            ("stop_token_ids", isinstance(self.stop_token_ids, tuple), "None, or token ids: whole numbers, 0 or more"),
            *(
                (name, isinstance(getattr(self, name), bool), "True or False")
                for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
            ),
            *(
                (name, value is None or _integer(value, 0, 20), "None, or a whole number from 0 to 20")
                for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            ),
            ("n", _integer(self.n, 1), "a whole number, at least 1"),
            (
                "json_schema",
                self.json_schema is None or self.json_schema is True or isinstance(self.json_schema, Mapping),
                "None, True (any object) or a mapping, the JSON schema",
            ),
            ("grammar", self.grammar is None or (isinstance(self.grammar, str) and self.grammar), "None, or a text"),
            ("grammar", self.grammar is None or self.json_schema is None, "None beside json_schema"),
            ("ignore_eos", not (self.ignore_eos and self.constraint is not None), f"False beside {constraint}"),
            ("min_tokens", not (self.min_tokens and self.constraint is not None), f"0 beside {constraint}"),
            ("stop", all(isinstance(text, str) and text for text in stop), "texts that are not empty"),
        ):
            if not holds:
                raise ParameterError(name, f"is {getattr(self, name)!r}; expected {expected}")
        if self.min_tokens > self.max_tokens:
            problem = f"is {self.min_tokens}; expected at most max_tokens, which is {self.max_tokens}"
            raise ParameterError("min_tokens", problem)

    @property
    def constraint(self) -> Mapping[str, Any] | bool | str | None:
        """``json_schema`` or ``grammar``, whichever is set."""
        return self.grammar if self.json_schema is None else self.json_schema


def _number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def _integer(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _ids(value: Any) -> Any:
    """A tuple of token ids. Anything else is returned unchanged, to be rejected."""
    if value is None:
        return ()
    listed = isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)
    return tuple(value) if listed and all(_integer(token, 0) for token in value) else value


def _biases(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(_integer(token, 0) and _number(bias, -100, 100) for token, bias in value.items())
