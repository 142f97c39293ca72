"""The first training loop: what ``recipes.nano.train`` runs on until its stages are recipes of ``aria train``."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from aria.train.schedule import Budget

LossFunction = Callable[[Any, float], tuple[Tensor, Mapping[str, Tensor]]]
"""``(batch, progress 0..1) -> (loss to descend, scalars to log)``."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to descend; what to descend is the loss function's."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02
    """Share of the learning rate that is left at the end of the cosine."""
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    average: float | None = None
    """Decay of an exponential moving average of the weights; None keeps none."""
    dtype: torch.dtype = torch.float32
    """What the model computes in. Below float32 the optimizer keeps float32 masters of the weights."""
    log_every: int = 50
    save_seconds: float | None = None
    """Save a checkpoint this often; one is saved at every end in any case."""
    max_skipped: int = 0
    """Updates with a gradient that is not finite that one log interval forgives; they change no weight."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} should be above 0, but is {getattr(self, name)}")
        if self.average is not None and not 0.0 < self.average < 1.0:
            raise ValueError(f"average should lie between 0 and 1, but is {self.average}")


def cosine_rate(step: int, progress: float, config: TrainerConfig) -> float:
    """Learning rate: linear warm-up over steps, then a cosine over progress down to ``final_learning_rate``."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    floor = config.final_learning_rate
    cosine = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * warm * cosine


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices; norms, biases and tables of positions, queries and tokens go without."""
    tables = ("position_embedding.weight", "embed_tokens.weight", "query")
    return parameter.ndim > 1 and not name.endswith(tables)


class Trainer:
    """Trains the parameters of ``model`` that require gradients.

    Weights whose ``dtype`` is below float32 get float32 masters; gradients are copied to them, the optimizer steps
    there, and the rounded result is copied back. Metrics stay on the device between log lines.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, config: TrainerConfig, out: str | Path):
        self.model, self.loss, self.config, self.out = model, loss, config, Path(out)
        self.step, self.progress, self.seconds = 0, 0.0, 0.0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.weights:
            raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
        self.masters = {name: p.detach().float().clone() for name, p in self.weights.items()}
        model.to(config.dtype)
        if config.dtype == torch.float32:
            self.masters = {name: p.detach() for name, p in self.weights.items()}
        self.average = {name: m.clone() for name, m in self.masters.items()} if config.average is not None else {}
        decayed = [m for name, m in self.masters.items() if decays(name, m)]
        others = [m for name, m in self.masters.items() if not decays(name, m)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
        )
        self._metrics = _Metrics()

    def run(
        self,
        data: Callable[[int], Iterable[Any]],
        budget: Budget,
        *,
        until: float = 1.0,
        on_step: Callable[[int, float], None] | None = None,
    ) -> str:
        """Train until the budget's progress reaches ``until``, the data end, or SIGTERM asks to stop; then save.

        Args:
            data: ``data(step)`` gives the batches from that step on, so that a resumed run goes on where it was.
            budget: how far training is.
            on_step: called before each step with its number and progress.

        Returns:
            ``"done"``, ``"data ended"`` or ``"terminated"``.

        Raises:
            FloatingPointError: more updates than ``max_skipped`` were not finite; the weights before them are saved.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        began = saved = time.monotonic()
        seconds_before = self.seconds
        batches: Iterator[Any] = iter(data(self.step))
        with _Termination() as termination:
            while True:
                self.seconds = seconds_before + time.monotonic() - began
                self.progress = budget.progress(self.step)
                reason = "terminated" if termination.asked else "done" if self.progress >= until else None
                batch = next(batches, None) if reason is None else None
                reason = reason or ("data ended" if batch is None else None)
                if reason:
                    self._log()
                    self.save()
                    return reason
                if on_step is not None:
                    on_step(self.step, self.progress)
                self.update(batch)
                if self.step % self.config.log_every == 0:
                    self._log()
                if self.config.save_seconds and time.monotonic() - saved > self.config.save_seconds:
                    self.save()
                    saved = time.monotonic()

    def update(self, batch: Any) -> None:
        """One step on one batch."""
        loss, metrics = self.loss(batch, self.progress)
        loss.backward()
        self.descend({"loss": loss, **metrics})

    def descend(self, metrics: Mapping[str, Tensor]) -> None:
        """Clip, step, average and clear the gradients that a backward pass left."""
        config = self.config
        names = [name for name, weight in self.weights.items() if weight.grad is not None]
        if not names:
            raise ValueError("the loss reaches no trained parameter; check what is frozen and what the batch teaches")
        self._fill_master_gradients(names)
        gradients = [gradient for name in names if (gradient := self.masters[name].grad) is not None]
        norm = nn.utils.get_total_norm(gradients)
        # The fused kernel leaves weights and moments alone where `found_inf` is one: no wait for the host, and no NaN
        # ever reaches a weight.
        skipped = (~norm.isfinite()).float()
        torch._foreach_mul_(gradients, (config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        rate = cosine_rate(self.step, self.progress, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.config.dtype != torch.float32:
            with torch.no_grad():
                torch._foreach_copy_([self.weights[n] for n in names], [self.masters[n] for n in names])
        self.clear_gradients()
        if config.average is not None:
            decay = min(config.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1.0 - decay)
        self.step += 1
        self._metrics.add({**metrics, "gradient norm": norm, "skipped": skipped})

    def _fill_master_gradients(self, names: list[str]) -> None:
        gradients = [gradient for name in names if (gradient := self.weights[name].grad) is not None]
        masters = [self.masters[name] for name in names]
        if self.config.dtype != torch.float32:
            # All in one call: hundreds of small parameters would cost a kernel each.
            wide = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(wide, gradients)
            gradients = wide
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient

    def clear_gradients(self) -> None:
        for name, weight in self.weights.items():
            weight.grad = self.masters[name].grad = None

    def _log(self) -> None:
        """Write one line and stop if too many updates were skipped."""
        metrics, steps = self._metrics.drain()
        if not steps:
            return
        skipped = round(metrics.pop("skipped") * steps)
        line = {
            "step": self.step,
            "progress": round(self.progress, 5),
            "seconds": round(self.seconds, 2),
            "learning rate": self.optimizer.param_groups[0]["lr"],
            **{name: round(value, 6) if math.isfinite(value) else None for name, value in metrics.items()},
            "skipped": skipped,
        }
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if skipped > self.config.max_skipped:
            self.save()
            raise FloatingPointError(
                f"{skipped} of the last {steps} updates before step {self.step} had a gradient that is not finite; "
                f"the weights from before them are in {self.out / 'last.pt'}; try a lower learning rate"
            )

    def save(self, file: str | Path | None = None) -> Path:
        """Write everything that a resumed run needs, to ``last.pt`` where no file is named; the old one goes last."""
        path = Path(file) if file is not None else self.out / "last.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "weights": self.masters,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "progress": self.progress,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)
        return path

    def resume(self, file: str | Path) -> None:
        """Go on from a checkpoint of :meth:`save`.

        Raises:
            ValueError: it was made for other parameters.
        """
        device = next(iter(self.masters.values())).device
        state = torch.load(file, map_location=device, weights_only=True)
        saved, own = state["weights"], self.masters
        wrong = sorted(saved.keys() ^ own.keys()) or [n for n in own if own[n].shape != saved[n].shape]
        if wrong:
            raise ValueError(f"{file} is of another model; these parameters differ: {', '.join(wrong[:8])}")
        if self.average and not state["average"]:
            raise ValueError(f"{file} holds no averaged weights; resume with average=None")
        with torch.no_grad():
            for name, master in own.items():
                master.copy_(saved[name])
                self.weights[name].copy_(master)
                if self.average:
                    self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.progress, self.seconds = state["step"], state["progress"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])


class _Metrics:
    """Sums of scalars on the device, read by the host once a log line."""

    def __init__(self) -> None:
        # One vector for each set of names: dozens of scalars would cost a kernel each.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._steps: dict[tuple[str, ...], int] = {}

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        names, values = tuple(scalars), torch.stack([value.detach().float() for value in scalars.values()])
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._steps[names] = self._steps.get(names, 0) + 1

    def drain(self) -> tuple[dict[str, float], int]:
        """Means since the last call, and how many steps they are over."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, sums in self._sums.items():
            for name, total in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + self._steps[names]
        steps = sum(self._steps.values())
        self._sums, self._steps = {}, {}
        return {name: total / counts[name] for name, total in totals.items()}, steps


class _Termination:
    """Notes SIGTERM instead of dying of it, so that the loop can save; only the main thread may listen."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
