"""Arguments of a call of the processor, which may come by name or in groups, as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TextOptions(NamedTuple):
    """How prompts become rows of ids."""

    padding: bool | str = True
    padding_side: str | None = None
    truncation: bool = False
    max_length: int | None = None
    add_special_tokens: bool | None = None
    return_tensors: str | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> TextOptions:
        """From arguments by name.

        Raises:
            TypeError: one of them does not exist.
        """
        if unknown := sorted(given.keys() - set(cls._fields)):
            raise TypeError(
                f"text_kwargs has the unknown arguments {', '.join(unknown)}; known: {', '.join(cls._fields)}"
            )
        return cls(**given)


def merge_options(name: str, alone: Mapping[str, Any], group: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments by name, with those of a group; without those that nobody gave.

    Args:
        name: of the group, for messages.
        alone: values by name; None, and what :class:`TextOptions` has by default, count as not given.
        group: the same in a mapping.

    Raises:
        ValueError: an argument comes both ways, with different values.
    """
    defaults = TextOptions._field_defaults
    given = {key: value for key, value in alone.items() if value is not None and value is not defaults.get(key)}
    for key, value in (group or {}).items():
        if key in given and given[key] != value:
            raise ValueError(f"{key} is {given[key]!r}, and {value!r} in {name}; give it once")
        given[key] = value
    return given
