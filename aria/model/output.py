"""What a forward pass of `AriaForConditionalGeneration` gives, readable in every way that transformers' outputs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

_FIELDS = ("loss", "logits", "hidden_states", "router_logits")


class AriaOutput(dict[str, Any]):
    """Fields by attribute, by key, or by index and slice as in a tuple; those that are None exist as attributes only.

    ``AriaOutput(mapping)`` makes one again from another's fields, as accelerate and `torch.nn.DataParallel` do.

    Attributes:
        loss: next-token cross-entropy, float32.
        logits: ``(B, S, V)``, or of the positions that ``logits_to_keep`` names; rows of padding are zeros.
        hidden_states: ``(B, S, D)`` before the first decoder layer and after each, the last normed; zeros on padding.
        router_logits: ``(T, E)`` of each layer, for the tokens that are not padding.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None

    def __init__(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any) -> None:
        """
        Raises:
            TypeError: a field that does not exist.
        """
        given = {**dict(fields), **more}
        if unknown := sorted(given.keys() - set(_FIELDS)):
            raise TypeError(f"AriaOutput has no field {', '.join(unknown)}; there are {', '.join(_FIELDS)}")
        super().__init__({name: given[name] for name in _FIELDS if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:
            return self.get(name)
        raise AttributeError(f"AriaOutput has no field {name}; there are {', '.join(_FIELDS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        # Made anew, because a dict keeps the order in which keys came, and places in the tuple are by field.
        changed = AriaOutput(self, **{name: value})
        self.clear()
        self.update(changed)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order."""
        return tuple(self.values())


# FSDP and static graphs of DDP look for the tensors of an output through its tree.
pytree.register_pytree_node(
    AriaOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: AriaOutput(zip(names, values, strict=True)),
    serialized_type_name="aria.model.output.AriaOutput",
)
