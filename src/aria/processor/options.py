"""Arguments of the processor, given by name or in groups (``text_kwargs`` and the like), as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TextOptions(NamedTuple):
    """How prompts are tokenized and batched."""

    padding: bool | str = True
    padding_side: str | None = None
    truncation: bool = False
    max_length: int | None = None
    add_special_tokens: bool | None = None
    return_tensors: str | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> TextOptions:
        """Make options from a mapping.

        Raises:
            TypeError: An unknown argument.
        """
        if unknown := sorted(given.keys() - set(cls._fields)):
            raise TypeError(
                f"text_kwargs has the unknown arguments {', '.join(unknown)}; known: {', '.join(cls._fields)}"
            )
        return cls(**given)


def merge_options(name: str, alone: Mapping[str, Any], group: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge arguments given by name with those of a group; arguments that are not given are left out.

    Args:
        name: Name of the group for messages.
        alone: Arguments by name. None and the defaults of :class:`TextOptions` count as not given.
        group: The arguments of the group.

    Raises:
        ValueError: An argument is given both ways with different values.
    """
    defaults = TextOptions._field_defaults
    given = {key: value for key, value in alone.items() if value is not None and value is not defaults.get(key)}
    for key, value in (group or {}).items():
        if key in given and given[key] != value:
            raise ValueError(f"{key} is {given[key]!r}, and {value!r} in {name}; give it once")
        given[key] = value
    return given
