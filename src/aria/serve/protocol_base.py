"""What request bodies are made of: objects that refuse unknown fields, lists, unions discriminated by a field."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

from aria.grammars.limits import check_json
from aria.serve import field_rules

Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list that reports its first wrong item only: a million of them would take minutes and gigabytes."""

Text = Annotated[str, Field(max_length=1 << 24)]
"""What is said: more than any prompt has."""
Source = Annotated[str, Field(max_length=1 << 40)]
"""A medium, or where it is; the body's own limits count."""
Arguments = Annotated[str, Field(max_length=1 << 20)]
"""JSON, or a grammar, which is read on its own."""
Description = Annotated[str, Field(max_length=1 << 16)]
"""What a function is for."""

MAX_CHARACTERS = 4096
"""Of all other strings, which are names."""
MAX_PARTS = 16_384
"""Of one message."""
MAX_FIELDS = 100
MAX_NAME = 256
"""Characters of an unknown field's name that an error repeats."""


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    # Python reads more than JSON: NaN, and halves of surrogate pairs.
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return value


Json = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""An object that can be told again, such as a schema."""


def at_most(count: int) -> BeforeValidator:
    """Refuses objects of more members before each of them is looked at: a million faults take minutes to list."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"it has {len(value):,} members; expected at most {count}")
        return value

    return BeforeValidator(check)


def _whole(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON's strings may hold and pydantic does not take."""
    return text.encode("utf-8", "replace").decode()


def discriminated_by_field(key: str, default: str | None = None) -> Discriminator:
    """Tells the members of a union by the value of a field; tags stand in brackets, see `errors`."""

    def tell(value: Any) -> str | None:
        kind = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        kind = default if kind is None else kind
        return _whole(f"<{kind:.40}>") if isinstance(kind, str) else None

    tell.__name__ = key  # which errors repeat
    return Discriminator(tell)


def discriminated_by(tell: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Tells the members of a union by a function, which gives None where a value is not what was ``expected``."""
    return Discriminator(tell, custom_error_type="wrong_type", custom_error_message=f"should be {expected}")


def json_type(value: Any) -> str | None:
    """Tells text, lists and objects."""
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) else "<object>" if isinstance(value, dict | BaseModel) else None


def field_error(field: str, message: str, kind: str = "invalid_value") -> PydanticCustomError:
    """An error of one field that a validator of the whole object found; `errors` adds the field to its place.

    Args:
        field: as clients spell it.
        message: what follows the field's name.
        kind: the code that clients read.
    """
    told = {"field": _whole(field[:MAX_NAME]), "message": _whole(message)}
    return PydanticCustomError(kind, "{message}", told)  # type: ignore[arg-type]


def _with_ignored(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the fields that are accepted without effect to a model's JSON schema."""
    assert issubclass(model, Body)
    for name, rule in model.known.items():
        if rule.schema is not None and name not in names_of(model):
            schema.setdefault("properties", {})[name] = rule.schema


class Body(BaseModel):
    """What a client sends. A field with a default may be null, which counts as absent."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_max_length=MAX_CHARACTERS,
        json_schema_extra=_with_ignored,
    )
    known: ClassVar[field_rules.FieldRules] = {}
    """Fields of OpenAI's or vLLM's interface that are not implemented."""

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:  # each would be a fault of its own
            raise ValueError(f"an object of {len(value):,} fields, most of which cannot be known here")
        names, kept = names_of(cls), {}
        if (kind := value.get("type")) is not None and (kinds := kinds_of(cls)) and kind not in kinds:
            # Its other fields are of that kind, and say nothing of what is wrong.
            tag = _whole(f"{kind!s:.40}")
            told = {"discriminator": "type()", "tag": tag, "expected_tags": ", ".join(map(repr, kinds))}
            raise PydanticCustomError("union_tag_invalid", "", told)
        for name, one in value.items():
            if name not in names:
                _check_known(cls, name, one)
            elif one is not None or names[name]:
                # JSON has one kind of numbers: some programs write 1.0 for 1.
                kept[name] = int(one) if isinstance(one, float) and one.is_integer() else one
        return kept


@functools.cache
def names_of(model: type[BaseModel]) -> dict[str, bool]:
    """Names of a model's fields as clients spell them, and whether each is required."""
    return {field.alias or name: field.is_required() for name, field in model.model_fields.items()}


@functools.cache
def kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """What the field ``type`` of a model may be; empty: anything, or there is none."""
    field = model.model_fields.get("type")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _check_known(model: type[Body], name: str, value: Any) -> None:
    """Refuse a field that is not implemented, unless its value has no effect."""
    rule = model.known.get(name)
    if value is None or (rule is not None and rule.accepts(value)):
        return
    kind = "unsupported_value" if rule is not None and rule.values else "unsupported_field"
    if rule is not None:
        message = f"is not supported{' with this value' if rule.values else ''}: {rule.reason}"
    else:
        like = field_rules.nearest(name, [*names_of(model), *model.known])
        message = f"is not supported; {f'did you mean {like}?' if like else 'leave it out'}"
    raise field_error(name, message, kind)
