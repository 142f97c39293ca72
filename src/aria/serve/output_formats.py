"""Structured output in requests: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from aria.serve import field_rules, json_reader
from aria.serve.protocol_base import Arguments, Body, Description, Json, ListOf, discriminated_by_field


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]
    json_schema: Annotated[Json | None, Field(alias="schema")] = None
    """Extension of llama.cpp."""


class JsonSchema(Body):
    name: str | None = None
    description: Description | None = None
    json_schema: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Without effect: responses always follow the schema."""


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema | None = None
    bare_schema: Annotated[Json | None, Field(alias="schema")] = None
    """Extension of llama.cpp: the schema itself, in place of ``json_schema``."""

    @model_validator(mode="after")
    def _one(self) -> JsonSchemaFormat:
        if (self.json_schema is None) == (self.bare_schema is None):
            raise ValueError("give json_schema (OpenAI's form) or schema (llama.cpp's), and not both")
        return self


class StructuralTagFormat(Body):
    """Extension of vLLM: parts of a response between tags follow schemas."""

    type: Literal["structural_tag"]
    structures: ListOf[Json] | None = None
    triggers: ListOf[str] | None = None
    format: Json | None = None

    @property
    def tag(self) -> dict[str, Any]:
        """The tag in the format of `aria.grammars.structural_tags`."""
        return self.model_dump(exclude_none=True)


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[StructuralTagFormat, Tag("<structural_tag>")],
    discriminated_by_field("type"),
]


def _parsed(value: Any) -> Any:
    """Decode JSON that was sent as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json_reader.parse(value)
    except json_reader.TooLargeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


JsonText = Annotated[Json, BeforeValidator(_parsed)]


class StructuredOutputs(Body):
    """Extension of vLLM: a constraint on the response."""

    json_schema: Annotated[JsonText | None, Field(alias="json")] = None
    regex: Arguments | None = None
    choice: Annotated[ListOf[str], Field(min_length=1)] | None = None
    grammar: Annotated[Arguments, Field(min_length=1)] | None = None
    """In llguidance's Lark syntax or GBNF."""
    json_object: bool | None = None
    structural_tag: JsonText | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.STRUCTURED

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.given) != 1:
            names = ", ".join(field.alias or name for name, field in type(self).model_fields.items())
            raise ValueError(f"give one of {names}")
        return self

    @property
    def given(self) -> list[str]:
        """Names of the constraints that are set."""
        return [name for name in type(self).model_fields if getattr(self, name) not in (None, False)]
