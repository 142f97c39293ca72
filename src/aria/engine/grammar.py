"""Structured output: schemas and grammars compiled for a vocabulary, after a trial in a worker process, and cached.

V vocabulary, W = ceil(V / 32) words of a token mask, lowest bit first.

llguidance, an optional dependency, compiles the grammars; `docs/structured-output.md` says why, and which parts of JSON
Schema it supports.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from aria.engine.matcher import Grammar, Matcher
from aria.grammars import trial
from aria.grammars.limits import MAX_CHARACTERS, check_schema
from aria.grammars.sources import from_choices, from_regex, from_structural_tag
from aria.processor import AriaTokenizer, Prompt
from aria.processor.chat import END_OF_TURN
from aria.workers import Workers

if TYPE_CHECKING:
    import llguidance

__all__ = ["Constraint", "Grammars", "from_choices", "from_regex", "from_structural_tag"]

Constraint = Mapping[str, Any] | bool | str
"""A JSON schema, True for any object, or a grammar as text: llguidance's Lark or GBNF."""
KEPT_GRAMMARS = 16
"""A grammar takes hundreds of kilobytes, and up to 50 MB at the limits of its lexer."""
KEPT_VERDICTS = 512
KEPT_CHARACTERS = 16_000_000
"""Total length of all constraints with cached verdicts, and of their grammars."""
_QUICK_SECONDS = 0.1
"""Grammars that take longer to compile are compiled one at a time."""
_FORCED_CHARACTERS = 256
"""Characters of a forced text that are tokenised: only the next token matters."""


class Verdict(NamedTuple):
    """Result of checking a constraint."""

    source: str = ""
    """The grammar for llguidance."""
    error: str | None = None
    """Why it is not supported, or None."""
    seconds: float = 0.0
    """CPU time of its trial."""
    tried: bool = False
    """Whether it was compiled in a worker process."""


class Grammars:
    """Compiles schemas and grammars for a vocabulary, and caches the latest. Thread-safe.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: V of the model, which may be larger than the tokenizer's.
        workers: Returns the worker processes in which untrusted schemas are tried first. With None they are compiled in
            this process, so that anything that :mod:`aria.grammars.limits` accepts and llguidance crashes or hangs on
            affects this process.
    """

    def __init__(self, tokenizer: AriaTokenizer, vocab_size: int, workers: Callable[[], Workers | None] = lambda: None):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._workers = workers
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._verdicts: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._trie: llguidance.LLTokenizer | None = None
        self._lock, self._slow = threading.Lock(), threading.Lock()
        self._ends: dict[tuple[str, ...], np.ndarray] = {}

    def load(self) -> None:
        """Prepare the vocabulary now instead of with the first schema; a quarter of a second for Aria's.

        Raises:
            ModuleNotFoundError: llguidance is not installed.
        """
        with self._lock:
            if self._trie is None:
                self._trie = _prepare_vocabulary(self._tokenizer, self._vocab_size)

    def check(self, schema: Constraint) -> None:
        """Check that a schema is supported; takes milliseconds, up to two seconds with thousands of properties.

        Args:
            schema: A JSON schema, True for any object, or a grammar as text.

        Raises:
            ValueError: It is no JSON schema, has an unsupported keyword, is unsatisfiable, or is too expensive.
            BusyError: The workers were too busy with other requests.
            WorkerError: No worker process can be started.
            ModuleNotFoundError: llguidance is not installed.
        """
        name, text = _text(schema)
        if not self._verdict(name, text, schema).tried:
            self._grammar(schema)

    def compile(self, schema: Constraint, stops: Sequence[str] = ()) -> None:
        """Check a schema and cache its grammar. It takes up to twice as long as :meth:`check`.

        Args:
            schema: A JSON schema, True for any object, or a grammar as text.
            stops: As in :meth:`matchers`.

        Raises:
            ValueError, BusyError, WorkerError, ModuleNotFoundError: As :meth:`check`.
        """
        self._grammar(schema)
        self._ends_mask(tuple(stops))

    def matchers(self, schema: Constraint, count: int, stops: Sequence[str] = ()) -> list[Matcher]:
        """Make matchers at the start of a schema's grammar, which is compiled if needed.

        Args:
            schema: A JSON schema, True for any object, or a grammar as text.
            count: Number of matchers.
            stops: Texts with which the model ends its turn. Their first tokens may end a value that could continue,
                such as a number.

        Raises:
            ValueError, BusyError, WorkerError, ModuleNotFoundError: As :meth:`check`.
        """
        grammar = self._grammar(schema)
        ends = self._ends_mask(tuple(stops))
        end = _end_of_text(self._tokenizer) if isinstance(schema, str) else None
        return [Matcher(grammar, ends, end) for _ in range(count)]

    def _grammar(self, schema: Constraint) -> Grammar:
        key = name, text = _text(schema)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        verdict = self._verdict(name, text, schema)
        try:
            with self._slow if verdict.seconds > _QUICK_SECONDS else contextlib.nullcontext():
                matcher = trial.on_stack(trial.STACK_BYTES, partial(self._build, name, verdict)).result()
        except ValueError as error:
            self._keep_verdict(key, Verdict(error=str(error)))
            raise
        grammar = Grammar(matcher, forget=partial(self._forget, key))
        with self._lock:
            self._compiled[key] = grammar
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return grammar

    def _build(self, name: str, verdict: Verdict) -> llguidance.LLMatcher:
        assert self._trie is not None, "the vocabulary is prepared before the verdict"
        matcher = trial.compiled(name, verdict.source, self._trie)
        if not verdict.tried:
            trial.check_beginning(name, matcher)
        return matcher

    def _forget(self, key: tuple[str, str], error: str | None) -> None:
        """Remove a grammar from the cache; with an error, reject it from now on."""
        with self._lock:
            self._compiled.pop(key, None)
        if error is not None:
            self._keep_verdict(key, Verdict(error=f"{key[0]} cannot be followed: {error}"))

    def _verdict(self, name: str, text: str, schema: Constraint) -> Verdict:
        """Verdict on a constraint, from the cache or a trial.

        Raises:
            ValueError: It is not supported.
        """
        self.load()
        key = name, text
        with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is not None:
                self._verdicts.move_to_end(key)
        if verdict is None:
            try:
                verdict = self._tried(name, text, schema)
            except ValueError as error:
                verdict = Verdict(error=str(error))
            self._keep_verdict(key, verdict)
        if verdict.error is not None:
            raise ValueError(verdict.error)
        return verdict

    def _tried(self, name: str, text: str, schema: Constraint) -> Verdict:
        if isinstance(schema, Mapping):
            try:
                check_schema({**schema})
            except ValueError as error:
                raise ValueError(f"{name} cannot be followed: {error}") from None
        workers = self._workers()
        if workers is None:
            return Verdict(trial.on_stack(trial.STACK_BYTES, lambda: trial.grammar(name, text)).result())
        try:
            result, _ = workers.run(
                trial.trial, name, text, name=name, seconds=trial.TRIAL_SECONDS, calls={"end": _end_trial}
            )
        except trial.TrialError as error:
            raise ValueError(f"{name} cannot be followed: {error}") from None
        return Verdict(str(result["source"]), seconds=float(result["seconds"]), tried=True)

    def _keep_verdict(self, key: tuple[str, str], verdict: Verdict) -> None:
        with self._lock:
            kept = self._verdicts
            kept[key] = verdict
            size = sum(len(text) + len(one.source) for (_, text), one in kept.items())
            while len(kept) > KEPT_VERDICTS or size > KEPT_CHARACTERS:
                (_, text), one = kept.popitem(last=False)
                size -= len(text) + len(one.source)

    def _ends_mask(self, stops: tuple[str, ...]) -> np.ndarray:
        """Mask of the tokens that end an answer: the end of text, and those that begin a stop text."""
        ends = self._ends.get(stops)
        if ends is None:
            texts = [stop.encode() for stop in stops]
            ids = [_end_of_text(self._tokenizer)]
            for index in range(min(self._vocab_size, len(self._tokenizer))):
                data = self._tokenizer.token_bytes(index)
                if data and any(text.startswith(data) or data.startswith(text) for text in texts):
                    ids.append(index)
            bits = np.zeros(-(-self._vocab_size // 32) * 32, dtype=np.uint8)
            bits[ids] = 1
            ends = self._ends[stops] = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
        return ends


def _text(schema: Constraint) -> tuple[str, str]:
    """Name of a constraint in error messages, and its text.

    Raises:
        ValueError: It is not JSON, or too large.
    """
    name, text = "grammar", schema
    if not isinstance(text, str):
        name = "json_schema"
        try:
            text = json.dumps({**schema} if isinstance(schema, Mapping) else {"type": "object"}, allow_nan=False)
        except RecursionError:
            raise ValueError("json_schema cannot be followed: it is nested too deeply, or contains itself") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"json_schema is not JSON: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} cannot be followed: it has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}"
        )
    return name, text


def _end_trial(reason: object) -> NoReturn:
    raise trial.TrialError(f"{reason}")


def _prepare_vocabulary(tokenizer: AriaTokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'json_schema needs the package llguidance: pip install "aria-moe[serve]"', name="llguidance"
        ) from None
    return LLTokenizer(TokenizerWrapper(_ModelVocabulary(tokenizer, vocab_size)), n_vocab=vocab_size)


class _ModelVocabulary:
    """The tokenizer in the form that llguidance expects."""

    bos_token_id = None

    def __init__(self, tokenizer: AriaTokenizer, vocab_size: int):
        known = min(vocab_size, len(tokenizer))
        self._encode: Callable[[str], list[int]] = tokenizer.encode
        self.eos_token_id = _end_of_text(tokenizer)
        self.tokens = [tokenizer.token_bytes(index) for index in range(known)] + [b""] * (vocab_size - known)
        # If the end of a turn is a single token, that token is not text.
        marks = [index for index, data in enumerate(self.tokens) if END_OF_TURN.encode() in data]
        self.special_token_ids = sorted({*tokenizer.all_special_ids, *marks})

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("the tokenizer takes text; invalid UTF-8 is encoded byte by byte")
        # Markers in a schema are text, not control tokens.
        return self._encode(Prompt(text[:_FORCED_CHARACTERS]))


def _end_of_text(tokenizer: AriaTokenizer) -> int:
    return tokenizer.unk_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
