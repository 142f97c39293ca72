"""TOML tables to frozen dataclasses and back, with an error for everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from aria.wording import similar_names

S = TypeVar("S")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def build(kind: type[S], table: Mapping[str, Any], where: str = "") -> S:
    """Make a settings dataclass from a table.

    Args:
        kind: A dataclass whose fields are bools, numbers, strings, paths, literals, tuples, mappings, unions of these,
            or dataclasses.
        table: A table from TOML or JSON.
        where: Name of the table in errors, such as ``schedule``; empty at the top.

    Raises:
        ValueError: An unknown key (the nearest one is named), a value of another type, or one that the dataclass
            refuses.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    table = _renamed(table, fields, where)
    for name in table:
        if name not in fields:
            raise ValueError(_unknown(name, fields, where))
    values = {name: convert(hints[name], value, _dotted(where, name)) for name, value in table.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{_dotted(where, missing[0])} is missing, and has no default")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"[{where}] {error}" if where else str(error)) from error


def setting(default: Any, *, former: str | None = None, former_values: Mapping[str, str] | None = None) -> Any:
    """A field of a settings dataclass that had another name, or values of other names, in earlier versions.

    :func:`build` accepts the former names with a :class:`DeprecationWarning` and turns them into today's, so that a
    recipe that an earlier version saved is equal to today's.

    Args:
        default: Default value.
        former: Former name of the key.
        former_values: Former names of values, each with today's.
    """
    return dataclasses.field(default=default, metadata={"former": former, "former_values": former_values or {}})


def _renamed(table: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]], where: str) -> dict[str, Any]:
    """The table with today's names in place of former ones."""
    table = dict(table)
    for name, field in fields.items():
        former, values = field.metadata.get("former"), field.metadata.get("former_values", {})
        if former in table and name not in table:
            _warn(f"{_dotted(where, former)} is now called {_dotted(where, name)}")
            table[name] = table.pop(former)
        value = table.get(name)
        if isinstance(value, str) and value in values:
            _warn(f"{_dotted(where, name)} = {value!r} is now called {values[value]!r}")
            table[name] = values[value]
    return table


def _warn(text: str) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=4)


def convert(hint: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to the type of a field; integers pass as floats, lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r:.200}; expected {_listed(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return _any_of(arguments, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r:.200}; expected a list")
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) != len(value):
            raise ValueError(f"{where} has {len(value)} entries; expected {len(inner)}")
        return tuple(convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r:.200}; expected a table")
        return {name: convert(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r:.200}; expected a table of settings")
        return build(hint, value, where)  # type: ignore[arg-type]
    return _plain(hint, value, where)


def _plain(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} is {value!r:.200}; expected {_WORDS.get(hint, getattr(hint, '__name__', hint))}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value!r:.200}; expected a finite number")
    return value


def _any_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = [hint for hint in hints if hint is not type(None)]
    if value is None and len(kinds) < len(hints):
        return None
    errors = []
    # The type that the value already has comes first: 3 for `float | int` stays an int.
    for hint in sorted(kinds, key=lambda hint: type(value) is not hint):
        try:
            return convert(hint, value, where)
        except ValueError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ValueError(f"{where} is {value!r:.200}; expected {_listed(_WORDS.get(kind, str(kind)) for kind in kinds)}")


def _unknown(name: str, known: Iterable[str], where: str) -> str:
    known = list(known)
    near = similar_names(name, known)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown key {name!r} in {f'[{where}]' if where else 'the recipe'}; {hint}"


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def as_table(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain tables, lists and values, without fields that are None: TOML has no null."""
    return {
        field.name: _as_plain(value)
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }


def _as_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_table(value)
    if isinstance(value, Mapping):
        return {str(name): _as_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text of plain tables, lists and values."""
    return "\n".join(_toml_lines(table, ())) + "\n"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    inner = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    if path and (len(inner) < len(table) or not table):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for name, value in table.items():
        if name not in inner:
            yield f"{_key(name)} = {_toml_value(value)}"
    for name, value in inner.items():
        yield from _toml_lines(value, (*path, name))


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else json.dumps(name, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(k)} = {_toml_value(v)}' for k, v in value.items())}}}"
    # A TOML float needs a point or an exponent, which repr always writes; other JSON values are valid TOML.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
