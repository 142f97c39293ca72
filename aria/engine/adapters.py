"""The adapters that an engine serves: stacked for the decoder, beside shared weights for pictures.

What an adapter changes in the decoder and its head is added token by token, in steps that requests of other adapters
share. What it changes in the vision tower or the projector changes picture tokens: these are made, and kept, for each
such adapter apart, by modules that share all weights with the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from aria.model import Aria
from aria.model.adapter import LoRA, adapters, attach
from aria.model.stacks import AdapterStacks, StepAdapters
from aria.ops import LowRank

Changes = Mapping[str, LowRank]
"""What one adapter changes, by names of modules."""

DECODER = "language_model."


class Adapters:
    """Adapters by name.

    Args:
        model: laid out for inference; its weights are not touched.
        changes: of each adapter.

    Raises:
        ValueError: a name is empty, or an adapter does not fit the model.
    """

    def __init__(self, model: Aria, changes: Mapping[str, Changes] | None = None):
        changes = changes or {}
        self.encoding: dict[str | None, Aria] = {None: model}
        """What encodes pictures: the model, and for adapters that change its vision tower or projector a twin."""
        self._numbers: dict[str | None, int] = {None: 0}
        for name, one in changes.items():
            if not name:
                raise ValueError("an adapter has no name; give it one that requests can ask for")
            if not one:
                raise ValueError(f"the adapter {name!r} changes nothing")
            pictures = {module: low_rank for module, low_rank in one.items() if not module.startswith(DECODER)}
            try:
                if pictures:
                    self.encoding[name] = _twin(model, pictures)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"the adapter {name!r} does not fit the model: {error}") from error
            self._numbers[name] = len(self._numbers)
        decoder = [
            {module: low_rank for module, low_rank in one.items() if module.startswith(DECODER)}
            for one in changes.values()
        ]
        self.stacks = AdapterStacks(model, decoder)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._numbers if name is not None)

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        twins = (twin for name, twin in self.encoding.items() if name is not None)
        beside = (adapter for twin in twins for adapter in adapters(twin).values())
        return self.stacks.nbytes + sum(adapter.a.nbytes + adapter.b.nbytes for adapter in beside)

    def check(self, name: str | None) -> None:
        """Refuse a name that is not here.

        Raises:
            ValueError: it says which are.
        """
        if name not in self._numbers:
            offered = f"there are {', '.join(self.names)}" if self.names else "the engine was started without any"
            raise ValueError(f"there is no adapter {name!r:.200}; {offered}")

    def number(self, name: str | None) -> int:
        """The adapter's number in a step's tensors, 0 for none."""
        return self._numbers[name]

    def step(self, owners_T: Tensor) -> StepAdapters | None:
        """The adapters of a step, from the number of each token's; None where they change nothing in the decoder."""
        return StepAdapters(self.stacks, owners_T) if len(self.stacks) else None


@torch.no_grad()
def _twin(model: Aria, changes: Changes) -> Aria:
    """The model with an adapter beside its vision tower and projector, on the same weights."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for part in ("vision_tower", "multi_modal_projector"):
        module = model.get_submodule(part)
        shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        setattr(twin, part, copy.deepcopy(module, shared))
    for name, low_rank in changes.items():
        rank = low_rank.a.shape[0]
        adapter = attach(twin, name, LoRA(rank=rank, alpha=low_rank.scaling * rank, dropout=0.0))
        if (adapter.a.shape, adapter.b.shape) != (low_rank.a.shape, low_rank.b.shape):
            raise ValueError(
                f"{name} has the shapes {tuple(low_rank.a.shape)} and {tuple(low_rank.b.shape)}; expected "
                f"{tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}"
            )
        adapter.a.copy_(low_rank.a)
        adapter.b.copy_(low_rank.b)
        adapter.requires_grad_(False)
    return twin
