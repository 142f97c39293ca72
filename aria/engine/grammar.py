"""Answers that follow a JSON schema: schemas -> grammars, and which tokens a grammar allows next.

G answers with a grammar, V vocabulary, W = ceil(V / 32) words of a mask of tokens, the lowest bit first.

The grammars are those of llguidance, an optional dependency; `docs/structured-output.md` says why, and what of JSON
Schema it reads.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aria.engine import structural_tags
from aria.engine.exact_grammar import lark
from aria.engine.schemas import plain
from aria.processor import AriaTokenizer, Prompt
from aria.processor.chat import END_OF_TURN

if TYPE_CHECKING:
    import llguidance

_SETTINGS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}
_ESCAPES = 'nrbtf\\"'
"""Without those by number: halves of surrogate pairs are no text, and a name has one way to be spelled."""
_CONTROL = re.compile(r"\\u00[01][0-9a-f]|\\u007f")
"""Characters that have no other escape; in a schema that holds one, all escapes are allowed."""

Constraint = Mapping[str, Any] | bool | str
"""A JSON schema, True for any object, or a grammar as text: llguidance's Lark, or GBNF."""
End = Literal["complete", "over", "error"]
"""How a grammar ends an answer: with this token, which belongs to it; before this token; or because it gave up."""
MOST_RULES = 1000
"""Of a grammar as text. llguidance follows rules that lead to rules by recursion: some thousands overflow its stack."""
_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w.-]*[ \t]*(\[[^\]\n]*\][ \t]*)?(::=|:)", re.MULTILINE)
_TAG = '{"structural_tag":'
KEPT_GRAMMARS = 32
"""One takes some hundreds of kilobytes, and at the limits of its lexer 30 MB."""


class Matcher:
    """Where one answer stands in its grammar: a function of the tokens it has accepted, so preemption loses nothing."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        ends_W: np.ndarray,
        forget: Callable[[], object],
        end_of_text: int | None = None,
    ):
        """``end_of_text`` is the one token that is never text, None where none of the ends can continue an answer."""
        self._matcher = matcher
        self._ends_W = ends_W
        self._end_of_text = end_of_text
        self._forget = forget
        self.error: str | None = None
        """Why it gave up, once it has."""

    def accept(self, token_id: int) -> End | None:
        """Take the token that was chosen; None while more may come."""
        if self.error is None and self._is_end(token_id):
            return "over"
        if self.error is None and not self._matcher.consume_token(token_id):
            self._give_up()
        if self.error is not None:
            return "error"
        return "complete" if self._matcher.is_stopped() else None

    def fill(self, mask_W: np.ndarray) -> None:
        """Write the bits of the tokens that may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if self._matcher.is_error():
            self._give_up()
            mask_W.fill(-1)
        elif self._matcher.is_accepting():
            mask_W |= self._ends_W

    def _give_up(self) -> None:
        self.error = _reason(self._matcher.get_error())
        # All answers to a schema share a lexer: if that is what is full, the next one needs another.
        self._forget()

    def _is_end(self, token_id: int) -> bool:
        ends = int(self._ends_W[token_id // 32]) >> token_id % 32 & 1
        if not ends or not self._matcher.is_accepting():
            return False
        # The first characters of an end continue no JSON value, but may continue a text of another grammar. There the
        # end of the turn is found in the text.
        return self._end_of_text in (None, token_id) or self._matcher.validate_tokens([token_id]) == 0


def fill_masks(matchers: Sequence[Matcher], vocab_size: int) -> np.ndarray:
    """What each answer may go on with: int32 ``(G, W)``, a bit a token. Matchers that give up allow everything.

    It takes some 15 microseconds a row, less than the device takes for its scores meanwhile, so one thread does it.
    """
    masks_GW = np.zeros((len(matchers), -(-vocab_size // 32)), dtype=np.int32)
    for matcher, mask_W in zip(matchers, masks_GW, strict=True):
        matcher.fill(mask_W)
    return masks_GW


class Grammars:
    """Compiles schemas for a vocabulary and keeps the latest. Any thread may call it.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model, which may be more than the tokenizer's.
    """

    def __init__(self, tokenizer: AriaTokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._trie: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        self._ends: dict[tuple[str, ...], np.ndarray] = {}

    def load(self) -> None:
        """Lay out the vocabulary now and not with the first schema: a quarter of a second for Aria's.

        Raises:
            ModuleNotFoundError: llguidance is not installed.
        """
        with self._lock:
            if self._trie is None:
                self._trie = _lay_out(self._tokenizer, self._vocab_size)

    def compile(self, schema: Constraint, stops: Sequence[str] = ()) -> None:
        """Check a schema and keep its grammar: milliseconds, up to a second for one of thousands of properties.

        Args:
            schema: a JSON schema, True for any object, or a grammar as text.
            stops: as :meth:`matchers` will be told.

        Raises:
            ValueError: it is no JSON schema, it has a keyword that cannot be followed, or no value fits it.
            ModuleNotFoundError: llguidance is not installed.
        """
        self._grammar(schema)
        self._ends_mask(tuple(stops))

    def matchers(self, schema: Constraint, count: int, stops: Sequence[str] = ()) -> list[Matcher]:
        """Matchers at the beginning of a schema's grammar, compiled if need be.

        Args:
            schema: a JSON schema, True for any object, or a grammar as text.
            count: how many.
            stops: texts with which the model ends its turn. Their first tokens may end a value that could go on, as
                a number could.
        """
        text, grammar = self._grammar(schema)
        ends = self._ends_mask(tuple(stops))
        forget = partial(self._compiled.pop, text, None)
        end = _end_of_text(self._tokenizer) if isinstance(schema, str) else None
        return [Matcher(grammar.deep_copy(), ends, forget, end) for _ in range(count)]

    def _grammar(self, schema: Constraint) -> tuple[str, llguidance.LLMatcher]:
        if isinstance(schema, str):
            text = f"grammar {schema}"
        else:
            try:
                text = json.dumps(dict(schema) if isinstance(schema, Mapping) else {"type": "object"}, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"json_schema is not JSON: {error}") from None
        with self._lock:
            found = self._compiled.get(text)
            if found is not None:
                self._compiled.move_to_end(text)
                return text, found
        self.load()
        assert self._trie is not None, "the vocabulary was laid out"
        if isinstance(schema, str):
            grammar = _compile("grammar", partial(_source_of_grammar, schema), self._trie)
        else:
            grammar = _compile("json_schema", partial(_source_of_schema, text), self._trie)
        with self._lock:
            self._compiled[text] = grammar
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return text, grammar

    def _ends_mask(self, stops: tuple[str, ...]) -> np.ndarray:
        """Bits of the tokens that end an answer: the end of text, and those that begin a stop text."""
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


def _lay_out(tokenizer: AriaTokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'json_schema needs the package llguidance: pip install "aria-moe[serve]"', name="llguidance"
        ) from None
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)), n_vocab=vocab_size)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: AriaTokenizer, vocab_size: int):
        known = min(vocab_size, len(tokenizer))
        self._encode = tokenizer.encode
        self.eos_token_id = _end_of_text(tokenizer)
        self.tokens = [tokenizer.token_bytes(index) for index in range(known)] + [b""] * (vocab_size - known)
        # A vocabulary that has the end of a turn as one token does not mean it as text.
        marks = [index for index, data in enumerate(self.tokens) if END_OF_TURN.encode() in data]
        self.special_token_ids = sorted({*tokenizer.all_special_ids, *marks})

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("the tokenizer takes text; bytes are spelled out where they are no text")
        return self._encode(Prompt(text))  # a marker that a schema wants is text


def from_regex(pattern: str) -> str:
    """The grammar of texts that a pattern matches from end to end."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def from_choices(texts: Sequence[str]) -> str:
    """The grammar of some texts."""
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def from_structural_tag(tag: Mapping[str, Any]) -> str:
    """The grammar of a structural tag, see :mod:`aria.engine.structural_tags`; it is made when it is compiled."""
    return _TAG + json.dumps(tag) + "}"


def _inline(schema: Any) -> str:
    """A JSON schema within Lark."""
    settings = _settings(json.dumps(schema))
    found = plain(json.loads(json.dumps(schema)))
    found = {} if found is True else found
    if lark(found, settings) is not None:
        raise ValueError("numbers beyond 2^53 are not supported in schemas of structural tags")
    return f"%json {json.dumps({**found, 'x-guidance': settings})}"


def _settings(schema: str) -> Any:
    """Of llguidance for a schema."""
    return {**_SETTINGS, **({} if _CONTROL.search(schema) else {"json_allowed_escapes": _ESCAPES})}


def _source_of_schema(schema: str) -> str:
    from llguidance import LLMatcher

    found = plain(json.loads(schema))
    found = {} if found is True else found
    settings = _settings(schema)
    # All settings are given: a schema may carry some of its own under "x-guidance".
    exact = lark(found, settings)
    if exact is not None:
        _check_rules(exact)
        return exact
    return LLMatcher.grammar_from_json_schema(json.dumps(found), overrides=settings)


def _source_of_grammar(text: str) -> str:
    from llguidance import grammar_from

    if text.startswith('{"grammars"'):
        return text
    if text.startswith(_TAG):
        text = structural_tags.lark(json.loads(text)["structural_tag"], _inline)
    _check_rules(text)
    return grammar_from("grammar", text)


def _check_rules(text: str) -> None:
    if (count := len(_RULE.findall(text))) > MOST_RULES:
        raise ValueError(f"it has {count:,} rules; expected at most {MOST_RULES:,}")


def _compile(name: str, source_of: Callable[[], str], trie: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the beginning of a grammar; the name is that of the setting, for errors."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        source = source_of()
    except ValueError as error:
        raise ValueError(f"{name} cannot be followed: {_reason(str(error))}") from None
    # Grammars that need more work than this for a token give up: no schema should hold up the answers of others.
    limits = LLParserLimits(
        step_max_items=20_000, step_lexer_fuel=200_000, max_lexer_states=50_000, verbose_errors=False
    )
    grammar = LLMatcher(trie, source, log_level=0, limits=limits)
    if grammar.is_error():
        raise ValueError(f"{name} cannot be followed: {_reason(grammar.get_error())}")
    # First steps find what the grammar alone does not show: schemas that no value fits, or only endless ones.
    probe = grammar.deep_copy()
    probe.compute_bitmask()
    if probe.is_stopped():
        raise ValueError(
            f"{name} cannot be followed: no JSON value fits it" if name == "json_schema" else f"{name} matches nothing"
        )
    if probe.consume_tokens(probe.compute_ff_tokens()) and not probe.is_stopped():
        probe.compute_bitmask()
    if probe.is_error():
        raise ValueError(f"{name} cannot be followed: {_reason(probe.get_error())}")
    return grammar


def _reason(error: str) -> str:
    """What went wrong, without llguidance's state."""
    reason = error.partition("\n<")[0].strip()
    return "it is nested too deeply" if reason.startswith("recursion limit") else reason


def _end_of_text(tokenizer: AriaTokenizer) -> int:
    return tokenizer.unk_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
