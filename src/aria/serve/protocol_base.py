"""Building blocks of request bodies: objects that refuse unknown fields, lists, discriminated unions."""

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
"""A list that reports only its first invalid item: a million of them would take minutes and gigabytes."""

Text = Annotated[str, Field(max_length=1 << 24)]
"""Text of messages; the limit exceeds any prompt."""
Source = Annotated[str, Field(max_length=1 << 40)]
"""A medium or its URL; only the limit on the body applies."""
Arguments = Annotated[str, Field(max_length=1 << 20)]
"""JSON or a grammar, which is parsed separately."""
Description = Annotated[str, Field(max_length=1 << 16)]
"""Description of a function."""

MAX_CHARACTERS = 4096
"""Maximum length of all other strings, which are names."""
MAX_PARTS = 16_384
"""Maximum number of parts of one message."""
MAX_FIELDS = 100
MAX_NAME = 256
"""Maximum number of characters of an unknown field's name in an error."""


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    # Python accepts more than JSON: NaN and lone surrogates.
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return value


Json = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""An object that can be encoded as JSON again, such as a schema."""


def at_most(count: int) -> BeforeValidator:
    """Refuse objects with more members before validating any: a million errors take minutes to list."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"it has {len(value):,} members; expected at most {count}")
        return value

    return BeforeValidator(check)


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON strings may hold and pydantic does not accept."""
    return text.encode("utf-8", "replace").decode()


def discriminated_by_field(key: str, default: str | None = None) -> Discriminator:
    """Discriminate a union by the value of a field; tags are in angle brackets, see `errors`."""

    def discriminate(value: Any) -> str | None:
        kind = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        kind = default if kind is None else kind
        return _without_surrogates(f"<{kind:.40}>") if isinstance(kind, str) else None

    discriminate.__name__ = key  # errors contain it
    return Discriminator(discriminate)


def discriminated_by(discriminate: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Discriminate a union by a function, which returns None for values other than ``expected``."""
    return Discriminator(discriminate, custom_error_type="wrong_type", custom_error_message=f"should be {expected}")


def json_type(value: Any) -> str | None:
    """Distinguish strings, lists and objects."""
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) else "<object>" if isinstance(value, dict | BaseModel) else None


def field_error(field: str, message: str, kind: str = "invalid_value") -> PydanticCustomError:
    """An error of one field that a validator of the whole object found; `errors` appends the field to its path.

    Args:
        field: Name of the field in JSON.
        message: What follows the field's name.
        kind: Error code for clients.
    """
    context = {"field": _without_surrogates(field[:MAX_NAME]), "message": _without_surrogates(message)}
    return PydanticCustomError(kind, "{message}", context)


def _with_ignored(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add fields that are accepted without effect to a model's JSON schema."""
    assert issubclass(model, Body)
    for name, rule in model.known.items():
        if rule.schema is not None and name not in names_of(model):
            schema.setdefault("properties", {})[name] = rule.schema


class Body(BaseModel):
    """Base of request bodies. A field with a default may be null, which counts as absent."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_max_length=MAX_CHARACTERS,
        json_schema_extra=_with_ignored,
    )
    known: ClassVar[field_rules.FieldRules] = {}
    """Known fields that are not implemented."""

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:  # each would be an error of its own
            raise ValueError(f"an object of {len(value):,} fields, more than any known object has")
        names, kept = names_of(cls), {}
        if (kind := value.get("type")) is not None and (kinds := kinds_of(cls)) and kind not in kinds:
            # Errors about its other fields would only mislead.
            tag = _without_surrogates(f"{kind!s:.40}")
            context = {"discriminator": "type()", "tag": tag, "expected_tags": ", ".join(map(repr, kinds))}
            raise PydanticCustomError("union_tag_invalid", "", context)
        for name, one in value.items():
            if name not in names:
                _check_known(cls, name, one)
            elif one is not None or names[name]:
                # JSON has one type of numbers: some programs write 1.0 for 1.
                kept[name] = int(one) if isinstance(one, float) and one.is_integer() else one
        return kept


@functools.cache
def names_of(model: type[BaseModel]) -> dict[str, bool]:
    """Names of a model's fields in JSON, and whether each is required."""
    return {field.alias or name: field.is_required() for name, field in model.model_fields.items()}


@functools.cache
def kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """Allowed values of a model's ``type`` field; empty if any is allowed or there is no such field."""
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
