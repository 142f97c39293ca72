"""From gradients to new weights: clipping, the optimizer's step, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aria import private_api


class ParameterUpdate:
    """Updates parameters from their gradients. Steps with a gradient that is not finite change nothing.

    Args:
        parameters: Trained parameters by name.
        optimizer: Optimizer over these parameters; the learning rates of its groups are the peak rates.
        clip: ``clip(parameters, max_norm)`` scales gradients in place and returns their norm before.
        clip_norm: Maximum norm of all gradients together.
        average: Decay of the moving average of the weights; None keeps no average.
        sources: Tensors to average in place of parameters, by name: float32 masters of narrower weights.
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

    def step(self, number: int, lr_factor: float) -> dict[str, Tensor]:
        """Run optimizer step ``number`` and clear the gradients.

        Args:
            number: Optimizer steps made before.
            lr_factor: Fraction of the peak learning rates.

        Returns:
            Metrics: the gradient norm before clipping, and 1 where the step was skipped.
        """
        with_gradient = [p for p in self.parameters.values() if p.grad is not None]
        if not with_gradient:
            raise ValueError("the loss reaches no trained parameter; check [targets] and the targets in the data")
        norm = self._clip(with_gradient, self._clip_norm)
        skipped = (~norm.isfinite()).float()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        if self.optimizer.defaults.get("fused"):
            # The kernels leave weights and moments alone where `found_inf` is 1, without a wait for the host.
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._decay is not None:
            decay = min(self._decay, (1 + number) / (10 + number))
            sources = [source.float() for source in self._sources.values()]
            private_api.foreach_lerp(list(self.average.values()), sources, 1.0 - decay)
        return {"gradient norm": norm, "skipped": skipped}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the parameters by their averages, if there are any, inside the ``with`` block."""
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
