"""Outputs of `AriaForConditionalGeneration`, readable in every way that transformers' outputs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from aria.private_api import register_pytree_node


class Fields(dict[str, Any]):
    """Fields by attribute, by key, or by index and slice as in a tuple; those that are None exist as attributes only.

    Can be constructed from a mapping of fields, as accelerate and `torch.nn.DataParallel` do.
    """

    names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        # FSDP and static graphs of DDP look for the tensors of an output through its tree.
        register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __init__(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any) -> None:
        """
        Raises:
            TypeError: A field does not exist.
        """
        given = {**dict(fields), **more}
        if unknown := sorted(given.keys() - set(self.names)):
            raise TypeError(
                f"{type(self).__name__} has no field {', '.join(unknown)}; there are {', '.join(self.names)}"
            )
        super().__init__({name: given[name] for name in self.names if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name}; there are {', '.join(self.names)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        # Rebuilt, because a dict keeps the order of insertion, and places in the tuple are by field.
        changed = type(self)(self, **{name: value})
        self.clear()
        self.update(changed)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())


class AriaOutput(Fields):
    """Output of a forward pass.

    Attributes:
        loss: Next-token cross-entropy, float32.
        logits: ``(B, S, V)``, or of the positions that ``logits_to_keep`` names; rows of padding are zeros.
        hidden_states: ``(B, S, D)`` before the first decoder layer and after each, the last normed; zeros on padding.
        router_logits: ``(T, E)`` of each layer, for the tokens that are not padding.
    """

    names = ("loss", "logits", "hidden_states", "router_logits")
    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


class GenerateOutput(Fields):
    """What ``generate(return_dict_in_generate=True)`` gives, of R sequences.

    Attributes:
        sequences: int64 ``(R, S + new)``: prompts, then what was generated.
        scores: float32 ``(R, V)`` of each new token, after processors, temperature and truncation, which are -inf.
        logits: float32 ``(R, V)`` of each new token, as the model gives them.
    """

    names = ("sequences", "scores", "logits")
    sequences: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
