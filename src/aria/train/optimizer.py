"""Optimizers for float32 and bf16 weights: AdamW, AdamW with 8-bit moments, and Muon.

Everything is computed on this rank's shards (:mod:`aria.train.shards`). State dicts have global tensors by the names of
parameters, so that any number of ranks can resume from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw

from aria import private_api
from aria.train.shards import copies, local, spread_as

AWAY_FROM_MUON = ("*embed*", "*head*", "*router*", "*.query", "*.adapter.*")
"""Matrices that AdamW updates although the kind is Muon: embedding tables, heads, routers, adapters."""
CHUNK_ELEMENTS = 2**26
"""Elements that an optimizer step processes at once, unless a single parameter has more."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (Keller Jordan's, as in PyTorch)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """``[optimizer]`` of a recipe."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """``adamw8bit`` keeps moments in 8 bits (torchao); ``muon`` orthogonalizes the updates of matrices, each expert's
    separately, and leaves the rest to AdamW at the same rate."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    rates: dict[str, float] = field(default_factory=dict)
    """Pattern of parameter names -> multiplier of the learning rate; the first match counts."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    """Momentum of Muon."""
    clip_norm: float = 1.0
    """Maximum norm of all gradients together."""
    rounding: Literal["masters", "stochastic", "nearest"] = "masters"
    """How bf16 weights keep small updates: with float32 masters (4 bytes per weight), by stochastic rounding (no
    memory), or not at all. ``adamw8bit`` has no masters: ``masters`` means ``stochastic`` there."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} should be above 0, but is {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay should be 0 or above, but is {self.weight_decay}")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} should be at least 0 and below 1, but is {value}")
        for pattern, rate in self.rates.items():
            if rate < 0:
                raise ValueError(f"rates.{pattern} should be 0 or above, but is {rate}")


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> Optimizer:
    """The optimizer of a recipe.

    Args:
        named: Trained parameters by name, sharded or not.
        settings: ``[optimizer]``.

    Raises:
        ValueError: A pattern of ``rates`` matches no parameter, or torchao is needed and not installed.
    """
    parameters = dict(named)
    for pattern in settings.rates:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(f"[optimizer] rates: nothing that trains is called {pattern!r}")
    return Optimizer(parameters, settings)


Parameters = list[nn.Parameter]
States = list[dict[str, Tensor]]
Group = Mapping[str, Any]


class Rule:
    """How one kind of parameter is updated. A rule owns its state: allocation, step and saved form.

    The saved form has the same names and shapes on every rank, also where a rank's shard of a parameter is empty.
    """

    moments: tuple[str, ...]
    """Names of the float32 moments."""

    def __init__(self, settings: OptimizerSettings):
        self.settings = settings

    def allocate(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """New state for this rank's shard of a parameter: ``step``, moments, and a master if one is kept."""
        part = local(parameter.detach())
        state = {"step": torch.zeros((), dtype=torch.float32, device=part.device)}
        state |= {name: torch.zeros_like(part, dtype=torch.float32) for name in self.moments}
        if part.dtype != torch.float32 and self.settings.rounding == "masters":
            state["master"] = part.float()
        return state

    def step(self, parameters: Parameters, states: States, group: Group, found_inf: Tensor | None) -> None:
        """Update parameters that all have a gradient in place, with ``lr`` and ``weight_decay`` of their group."""
        raise NotImplementedError

    def saved(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as checkpoints hold it, sharded like the parameter; shares the state's memory."""
        return {name: spread_as(tensor, parameter) if tensor.ndim else tensor for name, tensor in state.items()}

    @contextmanager
    def _in_float32(self, parameters: Parameters, states: States) -> Iterator[list[Tensor]]:
        """The weights in float32, masters where they exist; changes inside the ``with`` block reach the weights."""
        parts = [local(parameter.detach()) for parameter in parameters]
        wide = [state.get("master", part).float() for part, state in zip(parts, states, strict=True)]
        yield wide
        narrow = [n for n, part in enumerate(parts) if part is not wide[n]]
        kept = [n for n in narrow if "master" in states[n]]
        if kept:
            private_api.foreach_copy([parts[n] for n in kept], [wide[n] for n in kept])
        for n in narrow:
            if "master" not in states[n]:
                parts[n].copy_(stochastic_round(wide[n]) if self.settings.rounding == "stochastic" else wide[n])


class AdamW(Rule):
    """PyTorch's fused kernel."""

    moments = ("exp_avg", "exp_avg_sq")

    def step(self, parameters: Parameters, states: States, group: Group, found_inf: Tensor | None) -> None:
        with self._in_float32(parameters, states) as weights:
            adamw(
                weights,
                _gradients(parameters),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.settings.betas[0],
                beta2=self.settings.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.settings.eps,
                maximize=False,
            )


class AdamW8bit(Rule):
    """torchao's 8-bit AdamW. A moment is uint8 codes of the parameter's shape and float32 scales of blocks of a row."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, settings: OptimizerSettings):
        super().__init__(settings)
        self._torchao = _torchao_adam()
        self._maps: dict[tuple[bool, torch.device], Tensor] = {}

    def allocate(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        part, block = local(parameter.detach()), _block(parameter)
        state = {"step": torch.zeros((), dtype=torch.float32, device=part.device)}
        for name in self.moments:
            if block:
                rows = (*part.shape[:-1], part.shape[-1] // block)
                state[f"{name}.codes"] = torch.zeros_like(part, dtype=torch.uint8)
                state[f"{name}.scale"] = torch.zeros(rows, dtype=torch.float32, device=part.device)
            else:
                state[name] = torch.zeros_like(part, dtype=torch.float32)
        return state

    def step(self, parameters: Parameters, states: States, group: Group, found_inf: Tensor | None) -> None:
        step = self._torchao.step
        for parameter, gradient, state in zip(parameters, _gradients(parameters), states, strict=True):
            state["step"] += 1
            part = local(parameter.detach())
            if not part.numel():
                continue
            # Compiled, a step is one pass, and moments never exist in float32 as a whole.
            change = torch.compile(step, fullgraph=True, dynamic=False) if part.is_cuda else step
            with private_api.unlimited_recompiles():
                change(
                    part,
                    gradient,
                    state["step"],
                    self._moment(state, "exp_avg", signed=True),
                    self._moment(state, "exp_avg_sq", signed=False),
                    None,
                    torch.tensor(group["lr"], dtype=torch.float32, device=part.device),
                    *self.settings.betas,
                    group["weight_decay"],
                    self.settings.eps,
                    True,
                    parameter.dtype == torch.bfloat16 and self.settings.rounding != "nearest",
                )

    def _moment(self, state: Mapping[str, Tensor], name: str, *, signed: bool) -> Tensor:
        """A moment as torchao's step takes it; writes to it reach the state."""
        if name in state:
            return state[name]
        codes, scale = state[f"{name}.codes"], state[f"{name}.scale"]
        kind = self._torchao.moment
        key = signed, codes.device
        if key not in self._maps:
            self._maps[key] = kind.zeros((1,), signed, 1, codes.device).qmap
        return kind(codes, scale.view(-1), self._maps[key], signed, torch.float32)


class Muon(Rule):
    """Orthogonalized momentum (Muon); each expert's matrix is orthogonalized separately."""

    moments = ("momentum",)

    def step(self, parameters: Parameters, states: States, group: Group, found_inf: Tensor | None) -> None:
        gradients, buffers = _gradients(parameters, found_inf), [state["momentum"] for state in states]
        # As in the fused AdamW: nothing changes where a gradient is not finite, without a wait for the host.
        keep: Tensor | float = 1.0 if found_inf is None else 1.0 - found_inf
        private_api.foreach_add([state["step"] for state in states], keep)
        changes = private_api.foreach_sub(gradients, buffers)
        private_api.foreach_mul(changes, (1 - self.settings.momentum) * keep)
        private_api.foreach_add(buffers, changes)
        private_api.foreach_lerp(gradients, buffers, self.settings.momentum)
        updates = _orthogonal_parts(gradients, parameters)
        # Updates of AdamW's size, so that both share one learning rate (Moonlight, arXiv 2502.16982).
        rates = [-group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:])) for parameter in parameters]
        private_api.foreach_mul(updates, rates)
        private_api.foreach_mul(updates, keep)
        with self._in_float32(parameters, states) as weights:
            private_api.foreach_mul(weights, 1 - group["lr"] * group["weight_decay"] * keep)
            private_api.foreach_add(weights, updates)


RULES: dict[str, type[Rule]] = {"adamw": AdamW, "adamw8bit": AdamW8bit, "muon": Muon}


class Optimizer(torch.optim.Optimizer):
    """Updates each parameter by its rule; see :func:`make_optimizer`.

    Attributes:
        found_inf: float32 scalar on the device; where 1, a step of AdamW or Muon changes nothing, without a wait for
            the host.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], settings: OptimizerSettings):
        self.names = {id(parameter): name for name, parameter in named.items()}
        self.settings = settings
        self.found_inf: Tensor | None = None
        groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, parameter in named.items():
            rate = next((r for pattern, r in settings.rates.items() if fnmatchcase(name, pattern)), 1.0)
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((_rule(name, parameter, settings), rate, decay), []).append(parameter)
        self._rules = {rule: RULES[rule](settings) for rule, _, _ in groups}
        super().__init__(
            [
                {"params": members, "rule": rule, "lr": settings.learning_rate * rate, "weight_decay": decay}
                for (rule, rate, decay), members in groups.items()
            ],
            # The loop checks this, here and for PyTorch's optimizers, before it sets `found_inf`.
            {"fused": settings.kind != "adamw8bit"},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "no rule here reevaluates the loss"
        for group in self.param_groups:
            rule = self._rules[group["rule"]]
            for parameters in _chunks(parameter for parameter in group["params"] if parameter.grad is not None):
                states = [self._state(parameter, rule) for parameter in parameters]
                rule.step(parameters, states, group, self.found_inf)

    def masters(self) -> dict[str, Tensor]:
        """float32 masters by name, for the parameters that have one."""
        found = {}
        for parameter, _, state in self._states():
            if "master" in state:
                found[self.names[id(parameter)]] = spread_as(state["master"], parameter)
        return found

    def _states(self) -> Iterable[tuple[nn.Parameter, Rule, dict[str, Tensor]]]:
        for group in self.param_groups:
            rule = self._rules[group["rule"]]
            for parameter in group["params"]:
                yield parameter, rule, self._state(parameter, rule)

    def _state(self, parameter: nn.Parameter, rule: Rule) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = rule.allocate(parameter)
        return self.state[parameter]

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Tensors by parameter and kind, sharded like the parameter; they share memory with the optimizer."""
        state = {self.names[id(parameter)]: rule.saved(parameter, kept) for parameter, rule, kept in self._states()}
        return {"kind": self.settings.kind, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, here or on another number of ranks.

        Raises:
            ValueError: It is the state of another kind of optimizer, or lacks tensors that this one needs.
        """
        if state_dict["kind"] != self.settings.kind:
            raise ValueError(
                f"the state is that of {state_dict['kind']}, but [optimizer] kind is {self.settings.kind}; resume with "
                "the same kind, or start over from the exported weights"
            )
        for name, kinds in self.state_dict()["state"].items():
            saved = state_dict["state"].get(name, {})
            if missing := kinds.keys() - saved.keys():
                raise ValueError(f"the optimizer's state has no {', '.join(sorted(missing))} of {name}")
            for kind, tensor in kinds.items():
                if tensor is not saved[kind]:
                    local(tensor).copy_(local(saved[kind]))


def _rule(name: str, parameter: nn.Parameter, settings: OptimizerSettings) -> str:
    if settings.kind != "muon":
        return settings.kind
    away = parameter.ndim not in (2, 3) or any(fnmatchcase(name, pattern) for pattern in AWAY_FROM_MUON)
    return "adamw" if away else "muon"


def _chunks(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in chunks: small ones share kernel launches, a large one gets float32 copies of its own."""
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        if chunk and sum(p.numel() for p in chunk) + parameter.numel() > CHUNK_ELEMENTS:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


def _gradients(parameters: list[nn.Parameter], found_inf: Tensor | None = None) -> list[Tensor]:
    """Gradients of this rank's shards as float32 copies that the caller may change; zeros where ``found_inf`` is 1."""
    found = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    # One allocation: hundreds of small ones take the host longer than the step takes the device.
    flat = torch.empty(sum(gradient.numel() for gradient in found), dtype=torch.float32, device=found[0].device)
    pieces = flat.split([gradient.numel() for gradient in found])
    wide = [piece.view(gradient.shape) for piece, gradient in zip(pieces, found, strict=True)]
    private_api.foreach_copy(wide, found)
    if found_inf is not None:
        flat.masked_fill_(found_inf > 0.0, 0.0)
    return wide


def _block(parameter: nn.Parameter) -> int:
    """Elements of an 8-bit moment that share a scale; 0: the moment is in float32, because it is small.

    Blocks are parts of rows, so that any number of ranks that share the rows hold whole blocks, and the same ones.
    """
    last = parameter.ndim - 1
    split = isinstance(parameter, DTensor) and any(place.is_shard(last) for place in parameter.placements)
    block = 0 if last < 1 or split else math.gcd(parameter.shape[last], 256)
    return block if block >= 16 and parameter.numel() >= 4096 else 0


def _torchao_adam() -> private_api.Adam8bit:
    try:
        return private_api.torchao_adam()
    except ImportError as error:
        raise ValueError(
            "[optimizer] kind adamw8bit needs torchao: pip install torchao (or aria-moe[train])"
        ) from error


def stochastic_round(wide: Tensor) -> Tensor:
    """Round float32 to bf16 stochastically: the mean of many roundings is the number itself.

    Values that are not finite stay as they are.
    """
    bits = wide.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(wide.isfinite() & rounded.isfinite(), rounded, wide).bfloat16()


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalize each matrix of ``(..., rows, columns)``; the result is bf16.

    Newton-Schulz iterations, as in :class:`torch.optim.Muon` for one matrix; singular values end between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # Sums are fused into the products: most matrices are small, and launches would cost more than arithmetic.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.reshape(matrices.shape)


def _orthogonal_parts(parts: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """This rank's shards of the orthogonal updates, in float32; matrices of one shape are processed together."""
    made = list(parts)
    alike: dict[torch.Size, list[int]] = {}
    for n, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            made[n] = _orthogonal_part(parts[n], parameter).float()
        else:
            alike.setdefault(parameter.shape[-2:], []).append(n)
    for shape, numbers in alike.items():
        stacks = [parts[n].reshape(-1, *shape) for n in numbers]
        steps = orthogonal(torch.cat(stacks)).float().split([len(stack) for stack in stacks])
        for n, step in zip(numbers, steps, strict=True):
            made[n] = step.view_as(parts[n])
    return made


def _orthogonal_part(part: Tensor, parameter: DTensor) -> Tensor:
    """This rank's shard of one update. Matrices are gathered for it; experts stay where they are."""
    spread = DTensor.from_local(
        part.bfloat16(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    gathered_as = [
        placement if parameter.ndim == 3 and placement == Shard(0) else Replicate()
        for placement in parameter.placements
    ]
    made = orthogonal(spread.redistribute(placements=gathered_as).to_local())
    shape, stride = parameter.shape, parameter.stride()
    gathered = DTensor.from_local(made, parameter.device_mesh, gathered_as, run_check=False, shape=shape, stride=stride)
    return gathered.redistribute(placements=parameter.placements).to_local()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their norm, over all parameters and ranks, is at most ``max_norm``.

    Returns:
        The norm before, a float32 scalar on the device, equal on every rank. If it is not finite, gradients stay as
        they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert gradients, "no parameter has a gradient"
    parts = [local(gradient) for gradient in gradients]
    # An element that several ranks hold counts once.
    squares = torch.stack(_norms(parts)).square()
    shares = [1.0 / copies(gradient) for gradient in gradients]
    if any(share != 1.0 for share in shares):
        squares *= torch.tensor(shares, device=squares.device)
    total = squares.sum()
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        dist.all_reduce(total)
    norm = total.sqrt()
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    share = torch.where(norm.isfinite(), share, torch.ones_like(share))
    private_api.foreach_mul(parts, share)
    return norm


def _norms(parts: list[Tensor]) -> list[Tensor]:
    """Norms in float32, for any dtype."""
    return list(private_api.foreach_norm(parts, 2.0, dtype=torch.float32))
