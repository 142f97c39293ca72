"""Compile untrusted grammars: first as a trial in a worker process that may die, then here on a large enough stack."""

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
"""Stack size of compiling threads. Unused stack takes no memory."""
TRIAL_STACK_BYTES = STACK_BYTES // 2
"""Stack size in a trial: half, so that anything that passes there fits here."""
MAX_SECONDS = 2.0
"""CPU time of a trial. 5,000 properties, or enums of 20,000 values, take less than one second."""
MAX_BYTES = 256 << 20
"""Memory of a trial. The same take 70 MB."""
TRIAL_SECONDS = 10.0
"""Time limit of a trial, including waiting for a worker."""
MAX_TOKEN_SECONDS = 0.02
"""CPU time to compute the tokens allowed at one position in a trial, with its vocabulary of 840 tokens. With 100,000
tokens ambiguous grammars take five times as long; 500 optional properties take 1.5 ms here."""
_MAX_SHOWN = 400
"""Characters shown of the beginning and of the end of an error, which may repeat the whole grammar."""
_STEPS = 48
_POLL_SECONDS = 0.02
_STACK_LOCK = threading.Lock()


class TrialError(Exception):
    """A trial was aborted."""


def grammar(name: str, text: str) -> str:
    """Return the llguidance grammar of a constraint.

    Args:
        name: ``json_schema`` or ``grammar``.
        text: JSON, or a text grammar.

    Raises:
        ValueError: Not supported; the message begins with the name and says why.
    """
    try:
        return sources.of_schema(text) if name == "json_schema" else sources.of_grammar(text)
    except ValueError as error:
        raise _refused(name, str(error)) from None


def compiled(name: str, source: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile a grammar to a matcher in its initial state. Must run with a stack of :data:`STACK_BYTES`.

    Args:
        name: Name of the constraint for errors.
        source: A grammar from :func:`grammar`.
        tokenizer: The vocabulary. The compiled grammar does not depend on it.

    Raises:
        ValueError: It cannot be compiled.
    """
    from llguidance import LLMatcher, LLParserLimits

    # Grammars that need more work per token fail: no schema should delay other requests. Text grammars may be
    # ambiguous, and their cost grows with the square of the row size.
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
    """Take the first steps, which detects schemas that no finite value matches.

    Raises:
        ValueError: No token is possible at the beginning.
    """
    probe = matcher.deep_copy()
    probe.compute_bitmask()
    if probe.is_stopped() and reason(probe.get_error()) in ("", "NoExtensionBias"):
        what = "cannot be followed: no JSON value matches it" if name == "json_schema" else "matches nothing"
        raise ValueError(f"{name} {what}")
    if probe.consume_tokens(probe.compute_ff_tokens()) and not probe.is_stopped():
        probe.compute_bitmask()
    if probe.is_error():
        raise _refused(name, probe.get_error())


def _refused(name: str, error: str) -> ValueError:
    return ValueError(f"{name} cannot be followed: {reason(error)}")


def reason(error: str) -> str:
    """The error message of llguidance, without its state dump."""
    found = error.partition("\n<")[0].strip()
    _, of_schema, why = found.partition("failed to compile JSON schema: ")
    if of_schema:
        found = why.partition("\n   1 | ")[0]  # without the surrounding grammar
    if found.startswith("panic"):
        found = f"it is too large, or the compiler fails on it ({found})"
    if len(found) > 2 * _MAX_SHOWN:
        found = f"{found[:_MAX_SHOWN]} ... {found[-_MAX_SHOWN:]}"
    return "it is nested too deeply" if found.startswith("recursion limit") else found


def on_stack(size: int, work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a thread with a stack of ``size`` bytes."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    with _STACK_LOCK:
        # A process-wide setting. Another thread started at this moment gets such a stack too, which is harmless.
        before = threading.stack_size(size)
        try:
            threading.Thread(target=run, name="aria-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return outcome


# In a worker


def trial(job: Any, name: str, text: str) -> dict[str, Any]:
    """Job: compile a constraint in a worker process, where crashes, hangs and memory growth do no harm.

    Compiling does not depend on the vocabulary, so a small one is used: with 100,352 tokens, time and memory are the
    same, but setting up that vocabulary would take 0.2 s and 30 MB in each worker.

    Args:
        job: See :class:`aria.workers.child.Job`. ``end`` is called when a limit is exceeded, which kills the worker.
        name: ``json_schema`` or ``grammar``.
        text: JSON, or a text grammar.

    Returns:
        ``source`` for :func:`compiled`, and the ``seconds`` of CPU time used.

    Raises:
        ValueError: It cannot be compiled.
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
    """Memory used by this process."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        # Sandboxed workers on Linux cannot read /proc.
        words = ctypes.c_size_t * 10
        heap = ctypes.CDLL(None).mallinfo2
        heap.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [("words", words)]})
        mapped, used = 4, 7
        found = heap().words
        return int(found[mapped] + found[used])


def _walk_randomly(name: str, matcher: LLMatcher) -> None:
    """Follow a grammar for some random tokens.

    Raises:
        ValueError: Computing the allowed tokens takes too long, such as when many rules match the same text.
    """
    choice = random.Random(0)
    for _ in range(_STEPS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        seconds = time.thread_time() - began
        if seconds > MAX_TOKEN_SECONDS:
            raise _refused(
                name,
                f"computing the allowed tokens takes {seconds:.2g} s; expected at most {MAX_TOKEN_SECONDS:g} s: too "
                "many of its alternatives match the same text",
            )
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(_VOCABULARY), bitorder="little")
        if matcher.is_error() or matcher.is_stopped() or not bits.any():
            return
        # Prefer tokens that nest values deeper.
        inner = bits & _OPENING
        [allowed] = (inner if inner.any() else bits).nonzero()
        matcher.consume_token(int(choice.choice(allowed)))


_VOCABULARY = [bytes([code]) for code in range(256)] + [
    "".join(letters).encode() for size in (2, 3) for letters in itertools.product('[]{}",:a', repeat=size)
]
_OPENING = np.array([token[-1:] in (b"[", b"{", b"(") for token in _VOCABULARY], np.uint8)


@cache
def _tokenizer() -> LLTokenizer:
    """A small vocabulary: every byte, and short runs of JSON punctuation."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_TrialVocabulary()), n_vocab=len(_VOCABULARY) + 1)


class _TrialVocabulary:
    """The tokenizer interface that llguidance expects."""

    bos_token_id = None
    eos_token_id = len(_VOCABULARY)

    def __init__(self) -> None:
        self.tokens = [*_VOCABULARY, b"<end>"]
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
