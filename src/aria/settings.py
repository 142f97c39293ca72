"""`Setting`: help text, unit, range and command-line option of a settings field, declared beside its default."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Describes a dataclass field: ``max_queue: Annotated[int, Setting(help="...", minimum=0)] = 256``.

    Attributes:
        help: What the field sets, in one sentence.
        option: Its name on the command line, such as ``--max-queue``; None if it has none.
        unit: Unit of the value, such as ``bytes``.
        minimum: Smallest valid value.
        maximum: Largest valid value.
        above: Exclusive lower bound.
    """

    help: str
    option: str | None = None
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    @property
    def expected(self) -> str:
        """The valid range in words; empty if every value is valid."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum} to {self.maximum}"
        if self.minimum is not None:
            return f"at least {self.minimum}"
        return "" if self.above is None else f"more than {self.above}"

    def allows(self, value: Any) -> bool:
        """Whether a value lies in the range; NaN never does."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
        )


@dataclass(frozen=True)
class Field:
    """A field that is annotated with a :class:`Setting`.

    Attributes:
        type: Its type, without the annotation.
        setting: The annotation.
    """

    type: Any
    setting: Setting

    @property
    def optional(self) -> bool:
        """Whether the value may be None."""
        return type(None) in get_args(self.type)


@functools.cache
def fields_of(kind: type) -> Mapping[str, Field]:
    """The annotated fields of a dataclass by name, in their order."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            type_, *extras = get_args(hint)
            if settings := [extra for extra in extras if isinstance(extra, Setting)]:
                found[name] = Field(type_, settings[0])
    return MappingProxyType(found)


def check_ranges(settings: Any) -> None:
    """Check every annotated field of a dataclass instance.

    Raises:
        ValueError: A value is out of its range.
    """
    for name, field in fields_of(type(settings)).items():  # type: ignore[arg-type]  # mypy: types are not hashable
        value, setting = getattr(settings, name), field.setting
        if setting.expected and not (field.optional if value is None else setting.allows(value)):
            raise ValueError(f"{name} is {value}; expected {setting.expected}{', or None' if field.optional else ''}")
