"""The training loop: one for adapters and full weights, one process and many, and for any objective.

It knows no files and no formats; :mod:`aria.train.run` puts model, data, optimizer and checkpoints into it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aria.ops import current
from aria.train.objective import Losses, Step
from aria.train.progress import Metrics, Reporter
from aria.train.schedule import Budget, rate_share

Objective = Callable[[Any, Step], Losses]


class Stream(Protocol):
    """Batches of one rank. Its state is that of the last batch it gave.

    It is asked for before every step, and must stay as it was then; where the data of any rank fail, it is given back.
    One that ends may have a method ``filler``, which gives a batch without targets: where one rank's data end before
    another's, it takes part in the last steps with such batches. Without it, all ranks end with the first.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Ranks(Protocol):
    """What the loop asks of the processes that train together."""

    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks that have data of their own."""
        ...

    def max(self, value: int) -> int:
        """Over all ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop reads of a recipe."""

    accumulate: int = 1
    log_every: int = 10
    evaluate_every: int | None = None
    max_skipped: int = 0
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of :func:`aria.train.schedule.rate_share`."""
    stop_after: float | None = None
    """Seconds after which this run saves and stops, wherever the training is."""
    rate: float | None = None
    """FLOP/s of matrix products that MFU is a share of; None tells no MFU."""


@dataclass
class Position:
    """Where a training is; saved with it."""

    step: int = 0
    progress: float = 0.0
    seconds: float = 0.0
    """Spent on steps, by all runs of this training together, but for the first step of each, which may compile."""
    tokens: int = 0
    """Seen by all ranks, filler included."""


class Descent:
    """From gradients to new weights: clipped, never with a number that is not finite, and averaged if asked to.

    Args:
        parameters: what trains, by name.
        optimizer: over these parameters; the learning rates of its groups are their peak.
        clip: ``clip(parameters, most)`` scales gradients in place to a norm of at most ``most``; gives the norm before.
        clip_norm: the most.
        average: decay of the moving average of the weights; None keeps none.
        sources: what is averaged in place of the parameters, by name: float32 masters of weights that are narrower.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        clip: Callable[[Iterable[nn.Parameter], float], Tensor],
        clip_norm: float,
        average: float | None = None,
        sources: Mapping[str, Tensor] | None = None,
    ):
        if not parameters:
            raise ValueError("nothing trains: all parameters are frozen; see [targets]")
        self.parameters, self.optimizer = dict(parameters), optimizer
        self._clip, self._clip_norm, self._decay = clip, clip_norm, average
        self._sources = {name: (sources or {}).get(name, p).detach() for name, p in self.parameters.items()}
        self.average = {n: s.float().clone() for n, s in self._sources.items()} if average is not None else {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self, number: int, share: float) -> dict[str, Tensor]:
        """Make optimizer step ``number`` at this share of the peak rates; gradients are cleared. Gives metrics."""
        with_gradient = [p for p in self.parameters.values() if p.grad is not None]
        if not with_gradient:
            raise ValueError("the loss reaches nothing that trains; check [targets] and what the data teach")
        norm = self._clip(with_gradient, self._clip_norm)
        skipped = (~norm.isfinite()).float()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        if self.optimizer.defaults.get("fused"):
            # Weights and moments are left alone where `found_inf` is one: no wait for the host.
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._decay is not None:
            decay = min(self._decay, (1 + number) / (10 + number))
            sources = [source.float() for source in self._sources.values()]
            torch._foreach_lerp_(list(self.average.values()), sources, 1.0 - decay)
        return {"gradient norm": norm, "skipped": skipped}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their averages, if there are any."""
        if not self.average:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._copy(self.average)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


class Trainer:
    """Descends an objective over the batches of a stream until the budget is spent.

    Args:
        objective: gives the losses of a batch.
        stream: this rank's batches.
        descent: what is descended, and how.
        budget: how far a training is.
        settings: of the loop.
        ranks: the processes that train together.
        position: where the training is; a resumed one goes on there.
        save: called to save everything, with whether to wait until it is on disk, and whether older checkpoints may go;
            it is asked once more at every end.
        due: whether it is time to save, asked after each step.
        evaluate: called at its interval, gives what to log.
        reporter: of the rank that tells; None elsewhere.
        flops: FLOPs of a batch as MFU counts them.
        evaluated: the step of the last evaluation, which is not made again.

    Attributes:
        finished: whether the training came to its end, whatever happens to what is done after the last step.
    """

    def __init__(
        self,
        objective: Objective,
        stream: Stream,
        descent: Descent,
        budget: Budget,
        settings: LoopSettings,
        ranks: Ranks,
        *,
        position: Position | None = None,
        data_ranks: int = 1,
        save: Callable[[bool, bool], None] = lambda wait, prune: None,
        due: Callable[[int], bool] = lambda step: False,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        reporter: Reporter | None = None,
        flops: Callable[[Any], float] | None = None,
        evaluated: int = -1,
    ):
        self.objective, self.stream, self.descent, self.budget = objective, stream, descent, budget
        self.settings, self.ranks, self.position = settings, ranks, position or Position()
        self._data_ranks, self._save, self._due, self._evaluate = data_ranks, save, due, evaluate
        self._reporter, self._flops = reporter, flops
        self._metrics = Metrics()
        self.clock = Clock(self.position.seconds)
        self.finished = False
        self._first = (self.position.step, self.position.progress)
        self._interval = _Interval()
        self._interval.evaluated = evaluated

    def run(self) -> str:
        """Train until the budget is spent, the data end, a signal or ``stop_after`` asks to stop; then save.

        Returns:
            ``"done"``, ``"data ended"``, ``"terminated"`` or ``"time is up"``.

        Raises:
            FloatingPointError: more steps than are forgiven had a gradient that is not finite. They changed nothing:
                the weights from before them are saved.
            Exception: whatever the data raise, or held-out data; the steps before are saved.
            ValueError: the data end before the first step.
        """
        if self._reporter is not None:
            self._reporter.start(self.position.progress)
        batches = iter(self.stream)
        with current(self.ranks.device), Termination() as termination, _closing(batches):
            if self.position.step:
                # The run before may have ended while it asked held-out data.
                self._evaluated()
            while True:
                reason = self._agreed_end(termination)
                micro = [] if reason else self._next(batches)
                reason = reason or ("" if micro else "data ended")
                if reason:
                    return self._ended(reason)
                self._step(micro)
                step = self.position.step
                if step % self.settings.log_every == 0:
                    self._log()
                self._evaluated()
                if self.ranks.max(int(self._due(step))):
                    self._refuse_skipped()
                    self._save(False, True)

    def _ended(self, reason: str) -> str:
        """Log, save and, if the training is over, ask held-out data."""
        ended = reason in ("done", "data ended")
        if ended and not self.position.step:
            raise ValueError("the data ended before the first step: there is nothing in them to train on")
        self._log()
        self.finished = ended
        if self.finished and self._reporter is not None:
            self._reporter.advance(1.0)
        # Before held-out data are asked, which may fail after hours.
        self._save(True, True)
        if self.finished:
            self._evaluated(ended=True)
        return reason

    def _agreed_end(self, termination: Termination) -> str:
        """Why to stop before the next step, or nothing; every rank comes to the same."""
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
        """Of the rank that is the least far: it still has rows that count."""
        return -self.ranks.max(-round(self.budget.progress(step) * 10**9)) / 10**9

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of a step: as many on every rank, on the device.

        Where the data of any rank fail, all of them save what was before this step, and end with an error.
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
                failed = RuntimeError("the data of another process failed; its own message says at what")
            self._log()
            raise self._saved_before(failed, stream=before)
        if missing and (filler := getattr(self.stream, "filler", None)) is not None:
            micro += [filler() for _ in range(self.ranks.max(len(micro)) - len(micro))]
        else:
            micro = micro[: wanted - missing]
        return [self._sent(batch) for batch in micro]

    def _saved_before(self, error: Exception, *, stream: dict[str, Any] | None = None) -> Exception:
        """Save the steps that were made before an error; gives it, or one that also says that saving failed."""
        try:
            if stream is not None:
                self.stream.load_state_dict(stream)
            if self.position.step:
                self._save(True, False)
        except Exception as unsaved:
            both = RuntimeError(f"{error}. Nor could the steps before it be saved: {unsaved}")
            both.__cause__ = error
            return both
        return error

    def _sent(self, batch: Any) -> Any:
        """A batch on the device; from pinned memory the copy does not wait for the work before it."""
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
            # Parts add up to the step, which counts once.
            last = int(number == len(micro) - 1)
            self._metrics.add(losses.metrics, count=last)
            if losses.loads is not None:
                self._metrics.add_loads(losses.loads, count=last)
            self._interval.add(batch, self._flops(batch) if self._flops is not None else 0.0)
        # The rows of this step are read: data of less than a step would be learnt at no rate at all without them.
        reached = self._agreed_progress(position.step + 1)
        share = rate_share(position.step, position.progress, reached=reached, **self.settings.schedule)
        made = self.descent.step(position.step, share)
        # The same on every rank, where the others are parts of a sum.
        self._metrics.add({name: value / self._data_ranks for name, value in made.items()})
        position.step, position.progress = position.step + 1, reached
        position.tokens += self._interval.last_tokens * len(micro) * self._data_ranks
        if not self.clock.running:
            # The first step may have compiled what all others use; neither budget nor speed should count that.
            self.clock.start()
            self._first = (position.step, position.progress)
            self._interval.restart(self.ranks.device)
        if self._reporter is not None:
            self._reporter.advance(position.progress)

    def _log(self) -> None:
        """Write a line, and stop if too many steps were skipped."""
        steps = self._metrics.steps
        if not steps:
            return
        metrics = self._metrics.drain(self.ranks.sum if self._data_ranks > 1 else lambda x: x)
        skipped = round(metrics.pop("skipped") * steps)
        position = self.position
        if self._reporter is not None:
            speed = self._interval.report(self.ranks.device, self._data_ranks, self.settings.rate)
            rates = [group["lr"] for group in self.descent.optimizer.param_groups]
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
            # The weights may have gone astray before: run again and again, it would leave none from before that.
            raise self._saved_before(
                FloatingPointError(
                    f"{skipped} of the last {steps} steps before step {position.step} had a gradient that is not "
                    "finite; none of them changed a weight, and the weights are saved. Rerun to resume behind them: "
                    "with --set optimizer.learning_rate at something lower, or schedule.max_skipped for data that do "
                    "this now and then; to resume from older weights, delete the newest folder of checkpoints first"
                )
            )

    def _left(self) -> dict[str, float]:
        """Steps in all, and, from this run's second step on, seconds to come."""
        position, (step, progress) = self.position, self._first
        if not position.progress > progress:
            return {"total steps": round(position.step / position.progress)} if position.progress else {}
        share = (1.0 - position.progress) / (position.progress - progress)
        return {
            "total steps": position.step + round((position.step - step) * share),
            "seconds left": self.clock.counted * share,
        }

    def _refuse_skipped(self) -> None:
        """What is saved in mid-interval must not let a resumed run forget steps that were skipped."""
        if self._metrics.peek("skipped") * self._data_ranks > self.settings.max_skipped + 0.5:
            self._log()

    def _evaluated(self, *, ended: bool = False) -> None:
        every, position = self.settings.evaluate_every, self.position
        due = ended or (every is not None and position.step % every == 0)
        if self._evaluate is None or not due or position.step == self._interval.evaluated:
            return
        self._refuse_skipped()
        with self.clock.paused():
            try:
                found = self._evaluate()
            except Exception as error:
                if ended:
                    raise
                # It must not take the steps since the last checkpoint with it.
                raise self._saved_before(error)  # noqa: B904 (it is the error itself, or names it as its cause)
        self._interval.evaluated = position.step
        if self._reporter is not None and found:
            self._reporter.write({"step": position.step, **found})
        self._interval.restart(self.ranks.device)


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[None]:
    """Let a generator end its workers at once, however the loop ends."""
    try:
        yield
    finally:
        if hasattr(batches, "close"):
            batches.close()


class Clock:
    """Seconds of training: from a run's second step on, evaluations left out, added to those of runs before."""

    def __init__(self, before: float):
        self._before, self._left_out, self._left_out_before = before, 0.0, 0.0
        self._began: float | None = None
        self._started = time.monotonic()

    @property
    def running(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        """The first step is made."""
        self._began, self._left_out_before = time.monotonic(), self._left_out

    @property
    def counted(self) -> float:
        """Of this run, from its second step on."""
        if self._began is None:
            return 0.0
        return time.monotonic() - self._began - (self._left_out - self._left_out_before)

    @property
    def seconds(self) -> float:
        """Of all runs of this training."""
        return self._before + self.counted

    @property
    def spent(self) -> float:
        """As ``seconds``, with this run's first step."""
        return self._before + self.this_run - self._left_out

    @property
    def this_run(self) -> float:
        """Seconds since this run's loop was made, everything counted."""
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._left_out += time.monotonic() - began


class _Interval:
    """Speed since the last line."""

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
        """Tokens a second of all ranks, MFU and peak memory in bytes of this one; nothing of a run's first step."""
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
    """Notes SIGTERM, Ctrl-C and a terminal that is closed (SIGHUP) instead of dying of them, so that the loop can save;
    a second Ctrl-C does not wait.

    Only the main thread may listen, and what the process was started to ignore stays ignored.
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
