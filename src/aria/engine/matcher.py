"""`Matcher`: the tokens that a grammar allows next, computed in bounded time.

G answers with a grammar, V vocabulary, W = ceil(V / 32) words of a token mask, lowest bit first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from aria.grammars.trial import reason

if TYPE_CHECKING:
    import llguidance

End = Literal["complete", "over", "error"]
"""How a grammar ends an answer: with this token, before this token, or because it exceeded a limit."""
MOST_SECONDS = 0.1
"""CPU time for all slow masks of a step. A mask that takes longer ends its answer."""
LEAST_SECONDS = 0.01
"""CPU time for each further mask in such a step; a mask takes 15 microseconds on average."""
_POLL_SECONDS = 0.01


class Grammar:
    """A compiled grammar.

    Args:
        matcher: Matcher at the start. All copies share a lexer, behind a lock.
        forget: Removes the grammar from the cache; with an error, also rejects it for later answers.

    Attributes:
        error: Why all answers that follow it end; None unless a mask was too slow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, forget: Callable[[str | None], object]):
        self.matcher, self.forget = matcher, forget
        self.error: str | None = None


class Matcher:
    """State of one answer in its grammar. It depends on the accepted tokens alone, so preemption loses nothing.

    Args:
        grammar: The compiled grammar.
        ends_W: Mask of the tokens that may end the answer where the grammar may end.
        end_of_text: The end token that is never text; None if no end token can continue the answer.
    """

    def __init__(self, grammar: Grammar, ends_W: np.ndarray, end_of_text: int | None = None):
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._ends_W = ends_W
        self._end_of_text = end_of_text
        self._filled = False
        """Whether the mask of the next token was computed."""
        self._ending_W: np.ndarray | None = None
        """Mask of the tokens that end the answer here; None if it cannot end."""
        self.error: str | None = None
        """Why it gave up, or None."""

    def accept(self, token_id: int) -> End | None:
        """Accept the sampled token, and return how it ends the answer, if it does. Fast after :meth:`fill`."""
        if self.error is None and self._grammar.error is not None:
            self.give_up(self._grammar.error)
        if self.error is None and not self._filled:
            self.fill(np.zeros_like(self._ends_W))
        self._filled = False
        if self.error is not None:
            return "error"
        if self._ending_W is not None and int(self._ending_W[token_id // 32]) >> token_id % 32 & 1:
            return "over"
        if not self._matcher.consume_token(token_id):
            self.give_up(reason(self._matcher.get_error()))
            return "error"
        return "complete" if self._matcher.is_stopped() else None

    def fill(self, mask_W: np.ndarray) -> None:
        """Write the mask of the tokens that may come next; all tokens if it has given up."""
        self._filled, self._ending_W = True, None
        if self._grammar.error is None:
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if self.error is None and self._matcher.is_error():
            self.give_up(reason(self._matcher.get_error()))
        if self.error is not None or self._grammar.error is not None:
            mask_W.fill(-1)
        elif self._matcher.is_accepting():
            self._ending_W = self._ends_W
            if self._end_of_text is not None:
                # The first characters of an end text cannot continue a JSON value, but may continue the text of another
                # grammar. The end of the turn is then found in the text.
                self._ending_W = self._ends_W & ~mask_W
                self._ending_W[self._end_of_text // 32] |= np.int32(1) << self._end_of_text % 32
            mask_W |= self._ends_W

    def give_up(self, error: str, *, all: bool = False) -> None:
        """End the answer; with ``all``, also the others that follow the same grammar."""
        self.error = error
        if all:
            self._grammar.error = error
        # All answers to a schema share a lexer, which may be full, so later answers need a new one.
        self._grammar.forget(error if all else None)


def fill_masks(matchers: Sequence[Matcher], vocab_size: int) -> np.ndarray:
    """Masks of the tokens that may come next in each answer: int32 ``(G, W)``, one bit per token.

    A matcher that gives up allows all tokens. A mask takes about 15 microseconds, less than the device takes for the
    logits, so a single thread computes them while this one waits. If a grammar is very ambiguous, a mask may take
    minutes, and cannot be interrupted. Its thread is then abandoned, and its answer ends.
    """
    masks_GW = np.zeros((len(matchers), -(-vocab_size // 32)), dtype=np.int32)
    rows, late, left = list(zip(matchers, masks_GW, strict=True)), [], MOST_SECONDS
    while rows:
        filler = _Filler.take()
        filling = filler.fill(rows)
        slow = filling.wait(max(left, LEAST_SECONDS))
        if slow is None:
            filler.give_back()
            break
        left = 0.0
        late.append(len(matchers) - len(rows) + slow)
        matchers[late[-1]].give_up(f"finding the allowed tokens took over {MOST_SECONDS:g} s", all=True)
        rows = rows[slow + 1 :]
    if late:
        masks_GW = masks_GW.copy()  # abandoned threads may still write
        masks_GW[late] = -1
    return masks_GW


class _Filling:
    """Masks that a thread is filling.

    Args:
        rows: Matchers and their masks.
    """

    def __init__(self, rows: Sequence[tuple[Matcher, np.ndarray]]):
        self._rows = rows
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._left = False
        self._error: BaseException | None = None
        self._place: int | None = None
        self._began = 0.0
        self._clock = time.monotonic

    def run(self) -> bool:
        """Fill the masks. False if this thread was abandoned because it took too long."""
        self._clock = _clock_of_this_thread()
        try:
            for place, (matcher, mask_W) in enumerate(self._rows):
                with self._lock:
                    if self._left:
                        return False
                    self._place, self._began = place, self._clock()
                matcher.fill(mask_W)
        except BaseException as error:
            self._error = error
        with self._lock:
            self._done.set()
            return not self._left

    def wait(self, seconds: float) -> int | None:
        """Wait until all masks are filled.

        Returns:
            Index of a mask that takes over ``seconds``, whose thread is abandoned; None if all are filled.
        """
        while not self._done.wait(_POLL_SECONDS):
            with self._lock:
                late = self._place is not None and self._clock() - self._began > seconds * _SLACK
                if late and not self._done.is_set():
                    self._left = True
                    return self._place
        if self._error is not None:
            raise self._error
        return None


_SLACK = 1 if hasattr(time, "pthread_getcpuclockid") else 5
"""Tolerance without per-thread CPU clocks: other threads may have taken the time that passed."""


def _clock_of_this_thread() -> Callable[[], float]:
    """Clock of this thread's CPU time that any thread can read, if the system has one; else wall-clock time."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    return partial(time.clock_gettime, time.pthread_getcpuclockid(threading.get_ident()))


class _Filler:
    """A thread that fills masks."""

    _idle: ClassVar[list[_Filler]] = []

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Filling] = SimpleQueue()
        threading.Thread(target=self._run, name="aria-masks", daemon=True).start()

    @classmethod
    def take(cls) -> _Filler:
        """Return an idle one, or start one."""
        try:
            return cls._idle.pop()
        except IndexError:
            return cls()

    def give_back(self) -> None:
        self._idle.append(self)

    def fill(self, rows: Sequence[tuple[Matcher, np.ndarray]]) -> _Filling:
        filling = _Filling(rows)
        self._inbox.put(filling)
        return filling

    def _run(self) -> None:
        while self._inbox.get().run():
            pass


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Filler._idle.clear)  # threads do not survive a fork
