"""Compiling what strangers send: in a process that may die of it first, and on a stack that is large enough here."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil

from aria.grammars import sources

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

STACK_BYTES = 256 << 20
"""Of threads that compile. What is not used takes no memory."""
TRIAL_STACK_BYTES = STACK_BYTES // 2
"""In a trial: what fits there fits here, whatever else differs."""
MAX_SECONDS = 2.0
"""Of CPU time for a trial. 5,000 properties, or enums of 20,000 values, take less than one."""
MAX_BYTES = 256 << 20
"""Of memory. The same take 70 MB."""
TRIAL_SECONDS = 10.0
"""For a trial with all waiting for others."""
MAX_TOKEN_SECONDS = 0.02
"""Of CPU time until it is known what may come at one place, in a trial and with its vocabulary of 840 tokens. With
100,000 tokens ambiguous grammars take five times as long; 500 properties that may be missing take 1.5 ms here."""
_MAX_TOLD = 400
"""Characters of the beginning and of the end of an error, which may repeat all of a grammar."""
_STEPS = 48
_POLL_SECONDS = 0.02
_STACK_LOCK = threading.Lock()


class TrialError(Exception):
    """A trial was ended."""


def grammar(name: str, text: str) -> str:
    """What llguidance compiles for a constraint.

    Args:
        name: ``json_schema`` or ``grammar``.
        text: JSON, or a grammar as text.

    Raises:
        ValueError: it cannot be followed; the message says why, and begins with the name.
    """
    try:
        return sources.of_schema(text) if name == "json_schema" else sources.of_grammar(text)
    except ValueError as error:
        raise _refused(name, str(error)) from None


def compiled(name: str, source: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of a grammar. To be called with a stack of :data:`STACK_BYTES`.

    Args:
        name: of the constraint, for errors.
        source: of :func:`grammar`.
        tokenizer: the vocabulary; what is compiled is the same for all.

    Raises:
        ValueError: it cannot be followed.
    """
    from llguidance import LLMatcher, LLParserLimits

    # Grammars that need more work than this for a token give up: no schema should hold up the answers of others. Those
    # as text may be ambiguous, and what a row of them takes grows with its square.
    rows = (2_000, 20_000) if name == "json_schema" else (1_000, 10_000)
    limits = LLParserLimits(
        max_items_in_row=rows[0], step_max_items=rows[1], step_lexer_fuel=200_000, max_lexer_states=50_000,
        verbose_errors=False,
    )  # fmt: skip
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise _refused(name, matcher.get_error())
    return matcher


def check_beginning(name: str, matcher: LLMatcher) -> None:
    """Take the first steps: they find schemas that no value fits, or only endless ones.

    Raises:
        ValueError: there is no way from the beginning.
    """
    probe = matcher.deep_copy()
    probe.compute_bitmask()
    if probe.is_stopped() and reason(probe.get_error()) in ("", "NoExtensionBias"):
        what = "cannot be followed: no JSON value fits it" if name == "json_schema" else "matches nothing"
        raise ValueError(f"{name} {what}")
    if probe.consume_tokens(probe.compute_ff_tokens()) and not probe.is_stopped():
        probe.compute_bitmask()
    if probe.is_error():
        raise _refused(name, probe.get_error())


def _refused(name: str, error: str) -> ValueError:
    return ValueError(f"{name} cannot be followed: {reason(error)}")


def reason(error: str) -> str:
    """What went wrong, without llguidance's state."""
    found = error.partition("\n<")[0].strip()
    _, of_schema, why = found.partition("failed to compile JSON schema: ")
    if of_schema:
        found = why.partition("\n   1 | ")[0]  # without the grammar that stands around it
    if found.startswith("panic"):
        found = f"it is too large, or the compiler fails at it ({found})"
    if len(found) > 2 * _MAX_TOLD:
        found = f"{found[:_MAX_TOLD]} ... {found[-_MAX_TOLD:]}"
    return "it is nested too deeply" if found.startswith("recursion limit") else found


def on_stack(size: int, work: Callable[[], T]) -> Future[T]:
    """Do work in a thread with a stack of so many bytes."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    with _STACK_LOCK:
        # It is a setting of the process. Another thread that starts now gets such a stack, too, and does not use it.
        before = threading.stack_size(size)
        try:
            threading.Thread(target=run, name="aria-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return outcome


# In a worker


def trial(job: Any, name: str, text: str) -> dict[str, Any]:
    """Compile a constraint where crashing, hanging and growing do no harm. Runs in a worker.

    Compiling does not depend on the vocabulary, so a small one does: measured with 100,352 tokens, times and memory
    are the same, and those tokens take 0.2 s and 30 MB in each worker to lay out.

    Args:
        job: see :class:`aria.workers.child.Job`; ``end`` is called when it takes too much, which kills the worker.

    Returns:
        ``source`` for :func:`compiled`, and the ``seconds`` that this took.

    Raises:
        ValueError: it cannot be followed.
    """
    began, size = time.process_time(), _memory()

    def work() -> str:
        source = grammar(name, text)
        matcher = compiled(name, source, _tokenizer())
        check_beginning(name, matcher)
        _walk_randomly(name, matcher)
        return source

    outcome = on_stack(TRIAL_STACK_BYTES, work)
    while True:
        try:
            source = outcome.result(_POLL_SECONDS)
            return {"source": source, "seconds": time.process_time() - began}
        except TimeoutError:
            if time.process_time() - began > MAX_SECONDS:
                job.call("end", f"compiling it takes over {MAX_SECONDS:g} s")
            if _memory() - size > MAX_BYTES:
                job.call("end", f"compiling it takes over {MAX_BYTES:,} bytes")


def _memory() -> int:
    """Bytes that this process holds."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        # Workers on Linux cannot read what the kernel says of them.
        words = ctypes.c_size_t * 10
        heap = ctypes.CDLL(None).mallinfo2
        heap.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [("words", words)]})
        mapped, used = 4, 7
        found = heap().words
        return int(found[mapped] + found[used])


def _walk_randomly(name: str, matcher: LLMatcher) -> None:
    """Follow a grammar for some random tokens.

    Raises:
        ValueError: what may come next takes too long to find, as where many rules or subschemas fit the same text.
    """
    choice = random.Random(0)
    for _ in range(_STEPS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        seconds = time.thread_time() - began
        if seconds > MAX_TOKEN_SECONDS:
            raise _refused(
                name,
                f"finding what may come next takes {seconds:.2g} s; expected at most {MAX_TOKEN_SECONDS:g} s: too "
                "many of its alternatives fit the same text",
            )
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(_VOCABULARY), bitorder="little")
        if matcher.is_error() or matcher.is_stopped() or not bits.any():
            return
        # Where they may, values go on within each other.
        inner = bits & _OPENING
        [allowed] = (inner if inner.any() else bits).nonzero()
        matcher.consume_token(int(choice.choice(allowed)))


_VOCABULARY = [bytes([code]) for code in range(256)] + [
    "".join(letters).encode() for size in (2, 3) for letters in itertools.product('[]{}",:a', repeat=size)
]
_OPENING = np.array([token[-1:] in (b"[", b"{", b"(") for token in _VOCABULARY], np.uint8)


@cache
def _tokenizer() -> LLTokenizer:
    """Each byte, and what JSON is made of in runs."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary()), n_vocab=len(_VOCABULARY) + 1)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None
    eos_token_id = len(_VOCABULARY)

    def __init__(self) -> None:
        self.tokens = [*_VOCABULARY, b"<end>"]
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
