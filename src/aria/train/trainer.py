"""The training loop: one for adapters and full weights, one process or many, and any objective.

It knows nothing of files and formats: :mod:`aria.train.assemble` gives it model, data, optimizer and checkpoints, and
:mod:`aria.train.run` what happens before and after it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from aria.ops import current
from aria.train.objective import Losses, Step
from aria.train.progress import Metrics, Reporter
from aria.train.ranks import Ranks
from aria.train.schedule import Budget, lr_factor
from aria.train.update import ParameterUpdate

Objective = Callable[[Any, Step], Losses]


class Stream(Protocol):
    """Batches of one rank, with the state after the last batch.

    ``state_dict`` is called before every step, and what it returns must not change later: it is loaded again where the
    data of any rank fail. A stream that ends may have a method ``filler``, which returns a batch without targets: a
    rank whose data end before another's takes part in the last steps with such batches. Without it, all ranks end with
    the first.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs from a recipe."""

    accumulate: int = 1
    log_every: int = 10
    evaluate_every: int | None = None
    max_skipped: int = 0
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of :func:`aria.train.schedule.lr_factor`."""
    stop_after: float | None = None
    """Seconds after which this run saves and stops."""
    rate: float | None = None
    """Measured FLOP/s of matrix products, the base of MFU; None reports no MFU."""


@dataclass
class Position:
    """Progress of a training; saved in its checkpoints."""

    step: int = 0
    progress: float = 0.0
    seconds: float = 0.0
    """Time of training steps over all runs, without the first step of each run, which may compile."""
    tokens: int = 0
    """Tokens seen by all ranks, filler included."""


class Session(NamedTuple):
    """What one run of the loop holds open."""

    batches: Iterator[Any]
    termination: Termination


class Trainer:
    """Minimizes an objective over the batches of a stream until the budget is spent.

    Args:
        objective: Computes the losses of a batch.
        stream: This rank's batches.
        update: Updates the parameters from their gradients.
        budget: Says how far the training is.
        settings: Settings of the loop.
        ranks: The processes that train together.
        position: Where the training is; resuming continues from there.
        clock: Time of training so far; None starts one.
        data_ranks: Number of ranks with data of their own.
        save: ``save(wait, prune)`` writes a checkpoint: ``wait`` until it is on disk, ``prune`` older ones.
        due: ``due(step)`` says whether to save after this step.
        evaluate: Evaluates, and returns what to log.
        reporter: Logs and shows progress on rank 0; None on other ranks.
        flops: FLOPs of a batch, for MFU.
        evaluated: Step of the last evaluation, which is not repeated.

    Attributes:
        finished: Whether the training reached its end, whatever happens after the last step.
    """

    def __init__(
        self,
        objective: Objective,
        stream: Stream,
        update: ParameterUpdate,
        budget: Budget,
        settings: LoopSettings,
        ranks: Ranks,
        *,
        position: Position | None = None,
        clock: Clock | None = None,
        data_ranks: int = 1,
        save: Callable[[bool, bool], None] = lambda wait, prune: None,
        due: Callable[[int], bool] = lambda step: False,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        reporter: Reporter | None = None,
        flops: Callable[[Any], float] | None = None,
        evaluated: int = -1,
    ):
        self.objective, self.stream, self.update, self.budget = objective, stream, update, budget
        self.settings, self.ranks, self.position = settings, ranks, position or Position()
        self._data_ranks, self._save, self._due, self._evaluate = data_ranks, save, due, evaluate
        self._reporter, self._flops = reporter, flops
        self._metrics = Metrics()
        self.clock = clock or Clock(self.position.seconds)
        self.finished = False
        self._first = (self.position.step, self.position.progress)
        self._interval = _Interval()
        self._interval.evaluated = evaluated

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Make the rank's device current, catch signals, and close the stream at the end, however the run ends."""
        batches = iter(self.stream)
        with current(self.ranks.device), Termination() as termination, _closing(batches):
            yield Session(batches, termination)

    def train(self, session: Session) -> str:
        """Train until the budget is spent, the data end, a signal arrives or ``stop_after`` has passed.

        Logs, evaluates and saves at their intervals. :func:`aria.train.run.run_to_end` does what follows the last step.

        Returns:
            ``"done"``, ``"data ended"``, ``"terminated"`` or ``"time is up"``.

        Raises:
            FloatingPointError: More steps than allowed had a gradient that is not finite. They changed nothing: the
                weights from before them are saved.
            Exception: Any error of the data or of held-out data; the steps before it are saved.
            ValueError: The data end before the first step.
        """
        if self._reporter is not None:
            self._reporter.start(self.position.progress)
        if self.position.step:
            # The run before may have ended during an evaluation.
            self._evaluate_at_interval()
        while True:
            reason = self._agreed_end(session.termination)
            micro = [] if reason else self._next(session.batches)
            reason = reason or ("" if micro else "data ended")
            if reason:
                break
            self._step(micro)
            step = self.position.step
            if step % self.settings.log_every == 0:
                self._log()
            self._evaluate_at_interval()
            if self.ranks.max(int(self._due(step))):
                self._refuse_skipped()
                self._save(False, True)
        over = reason in ("done", "data ended")
        if over and not self.position.step:
            raise ValueError("the data ended before the first step: there is nothing in them to train on")
        self._log()
        self.finished = over
        if over and self._reporter is not None:
            self._reporter.advance(1.0)
        return reason

    def save(self) -> None:
        """Write a checkpoint and wait until it is on disk."""
        self._save(True, True)

    def evaluate(self) -> None:
        """Evaluate on held-out data, unless this step was evaluated already. An error is raised as it is."""
        if self._evaluate is not None and self.position.step != self._interval.evaluated:
            self._refuse_skipped()
            self._run_evaluation(self._evaluate)

    def _agreed_end(self, termination: Termination) -> str:
        """Why to stop before the next step, or an empty string; the same on every rank."""
        position = self.position
        position.seconds = self.clock.seconds
        # Clocks differ between ranks, and a signal may reach only some of them.
        position.progress = self._agreed_progress(position.step)
        late = self.settings.stop_after is not None and self.clock.this_run >= self.settings.stop_after
        asked = self.ranks.max(2 * int(termination.asked) + int(late))
        if position.progress >= 1.0:
            return "done"
        return "terminated" if asked >= 2 else "time is up" if asked else ""

    def _agreed_progress(self, step: int) -> float:
        """Progress of the rank that is least far: it still has rows to train on."""
        return -self.ranks.max(-round(self.budget.progress(step) * 10**9)) / 10**9

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of a step, as many on every rank, on the device.

        Where the data of any rank fail, all ranks save the state before this step and raise an error.
        """
        wanted, before = self.settings.accumulate, self.stream.state_dict()
        failed: Exception | None = None
        micro: list[Any] = []
        try:
            micro = list(islice(batches, wanted))
        except Exception as error:
            failed = error
        missing = self.ranks.max(wanted - len(micro) if failed is None else wanted + 1)
        if missing > wanted:
            if failed is None:
                failed = RuntimeError("the data of another process failed; see its own message")
            self._log()
            raise self._saved_before(failed, stream=before)
        if missing and (filler := getattr(self.stream, "filler", None)) is not None:
            micro += [filler() for _ in range(self.ranks.max(len(micro)) - len(micro))]
        else:
            micro = micro[: wanted - missing]
        return [self._sent(batch) for batch in micro]

    def _saved_before(self, error: Exception, *, stream: dict[str, Any] | None = None) -> Exception:
        """Save the steps before an error. Returns the error, or one that also says that saving failed."""
        try:
            if stream is not None:
                self.stream.load_state_dict(stream)
            if self.position.step:
                self._save(True, False)
        except Exception as unsaved:
            both = RuntimeError(f"{error}. The steps before it could not be saved either: {unsaved}")
            both.__cause__ = error
            return both
        return error

    def _sent(self, batch: Any) -> Any:
        """The batch on the device, copied from pinned memory without a wait for earlier work."""
        device = self.ranks.device
        if device.type == "cuda" and hasattr(batch, "pin"):
            batch = batch.pin()
        return batch.to(device) if hasattr(batch, "to") else batch

    def _step(self, micro: list[Any]) -> None:
        position = self.position
        labels: Any = float(sum(getattr(batch, "labels", 0) for batch in micro))
        if self._data_ranks > 1:
            labels = self.ranks.sum(torch.tensor(labels, device=self.ranks.device))
        step = Step(labels, len(micro) * self._data_ranks, position.progress)
        for number, batch in enumerate(micro):
            losses = self.objective(batch, step)
            losses.total.backward()
            # Micro-batches add up to one step.
            last = int(number == len(micro) - 1)
            self._metrics.add(losses.metrics, count=last)
            if losses.loads is not None:
                self._metrics.add_loads(losses.loads, count=last)
            self._interval.add(batch, self._flops(batch) if self._flops is not None else 0.0)
        # Includes the rows of this step: data of less than one step would otherwise have a learning rate of zero.
        reached = self._agreed_progress(position.step + 1)
        factor = lr_factor(position.step, position.progress, reached=reached, **self.settings.schedule)
        made = self.update.step(position.step, factor)
        # These are equal on every rank; other metrics are summed over ranks.
        self._metrics.add({name: value / self._data_ranks for name, value in made.items()})
        position.step, position.progress = position.step + 1, reached
        position.tokens += self._interval.last_tokens * len(micro) * self._data_ranks
        if not self.clock.running:
            # The first step may compile kernels, which neither the budget nor the throughput should count.
            self.clock.start()
            self._first = (position.step, position.progress)
            self._interval.restart(self.ranks.device)
        if self._reporter is not None:
            self._reporter.advance(position.progress)

    def _log(self) -> None:
        """Write a log line, and stop if too many steps were skipped."""
        steps = self._metrics.steps
        if not steps:
            return
        metrics = self._metrics.drain(self.ranks.sum if self._data_ranks > 1 else lambda x: x)
        skipped = round(metrics.pop("skipped") * steps)
        position = self.position
        if self._reporter is not None:
            speed = self._interval.report(self.ranks.device, self._data_ranks, self.settings.rate)
            rates = [group["lr"] for group in self.update.optimizer.param_groups]
            self._reporter.write(
                {
                    "step": position.step,
                    "progress": position.progress,
                    "seconds": self.clock.seconds,
                    "tokens": position.tokens,
                    **self._left(),
                    "learning rate": max(rates),
                    **metrics,
                    "skipped": skipped,
                    **speed,
                }
            )
        self._interval.restart(self.ranks.device)
        if skipped > self.settings.max_skipped:
            # Keeps older checkpoints: the weights may have diverged before, and reruns must not delete all good ones.
            raise self._saved_before(
                FloatingPointError(
                    f"{skipped} of the last {steps} steps before step {position.step} had a gradient that is not "
                    "finite; they changed no weight, and the weights are saved. Rerun to resume after them, with a "
                    "lower --set optimizer.learning_rate, or with schedule.max_skipped for data that cause this now "
                    "and then; to resume from older weights, first delete the newest checkpoint"
                )
            )

    def _left(self) -> dict[str, float]:
        """Total steps, and, from this run's second step on, seconds left."""
        position, (step, progress) = self.position, self._first
        if not position.progress > progress:
            return {"total steps": round(position.step / position.progress)} if position.progress else {}
        share = (1.0 - position.progress) / (position.progress - progress)
        return {
            "total steps": position.step + round((position.step - step) * share),
            "seconds left": self.clock.counted * share,
        }

    def _refuse_skipped(self) -> None:
        """Log before a save or an evaluation in mid-interval if too many steps were skipped, which raises an error."""
        if self._metrics.peek("skipped") * self._data_ranks > self.settings.max_skipped + 0.5:
            self._log()

    def _evaluate_at_interval(self) -> None:
        """Evaluate in the middle of training; where that fails, the steps since the last checkpoint are saved."""
        every, step = self.settings.evaluate_every, self.position.step
        if self._evaluate is None or every is None or step % every or step == self._interval.evaluated:
            return
        self._refuse_skipped()
        try:
            self._run_evaluation(self._evaluate)
        except Exception as error:
            raise self._saved_before(error)  # noqa: B904 (it is the error itself, or names it as its cause)

    def _run_evaluation(self, evaluate: Callable[[], Mapping[str, Any]]) -> None:
        with self.clock.paused():
            found = evaluate()
        self._interval.evaluated = self.position.step
        if self._reporter is not None and found:
            self._reporter.write({"step": self.position.step, **found})
        self._interval.restart(self.ranks.device)


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[None]:
    """Close a generator, which ends its workers, however the loop ends."""
    try:
        yield
    finally:
        if hasattr(batches, "close"):
            batches.close()


class Clock:
    """Seconds of training over all runs: from each run's second step on, without evaluations."""

    def __init__(self, before: float):
        self._before, self._left_out, self._left_out_before = before, 0.0, 0.0
        self._began: float | None = None
        self._started = time.monotonic()

    @property
    def running(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        """Start counting, after the first step."""
        self._began, self._left_out_before = time.monotonic(), self._left_out

    @property
    def counted(self) -> float:
        """Seconds of this run, from its second step on."""
        if self._began is None:
            return 0.0
        return time.monotonic() - self._began - (self._left_out - self._left_out_before)

    @property
    def seconds(self) -> float:
        """Seconds of all runs of this training."""
        return self._before + self.counted

    @property
    def spent(self) -> float:
        """``seconds`` plus this run's first step."""
        return self._before + self.this_run - self._left_out

    @property
    def this_run(self) -> float:
        """Wall time of this run."""
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._left_out += time.monotonic() - began


class _Interval:
    """Throughput since the last log line."""

    def __init__(self) -> None:
        self.last_tokens = 0
        self.evaluated = -1
        self._began: float | None = None
        self._tokens, self._flops = 0, 0.0

    def add(self, batch: Any, flops: float) -> None:
        ids = batch["input_ids"] if isinstance(batch, Mapping) else getattr(batch, "input_ids", ())
        self.last_tokens = len(ids)
        self._tokens += self.last_tokens
        self._flops += flops

    def restart(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._began, self._tokens, self._flops = time.monotonic(), 0, 0.0

    def report(self, device: torch.device, data_ranks: int, rate: float | None) -> dict[str, float]:
        """Tokens per second of all ranks, MFU and peak memory (bytes) of this rank, without a run's first step."""
        found: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            found["memory"] = torch.cuda.max_memory_allocated(device)
        if self._began is not None and self._tokens:
            seconds = max(1e-9, time.monotonic() - self._began)
            found["tokens/s"] = self._tokens * data_ranks / seconds
            if rate is not None and self._flops:
                found["MFU"] = self._flops / seconds / rate
        return found


class Termination:
    """Catches SIGTERM, Ctrl-C and SIGHUP (a closed terminal), so that the loop can save; a second Ctrl-C interrupts.

    Only the main thread can handle signals. Signals that the process was started to ignore stay ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP"))
            for number in filter(None, known):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
