"""Request bodies -> `GenerationRequest`: messages and sampling parameters. Needs neither a server nor a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aria.engine import SamplingParams, grammar
from aria.media.open import Base64
from aria.processor import calls
from aria.serve import field_rules, tool_calls
from aria.serve.errors import ApiError
from aria.serve.output_formats import (
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuralTagFormat,
    StructuredOutputs,
    TextFormat,
)
from aria.serve.protocol import (
    AllowedToolsChoice,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    FileData,
    FilePart,
    ImageUrl,
    ImageUrlPart,
    Message,
    NamedTool,
    Templated,
    TextPart,
    Tool,
    ToolMessage,
    VideoUrl,
    VideoUrlPart,
    WithoutEffect,
)

COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` in ``/v1/completions``, as in OpenAI's interface."""

_SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("seed", "n", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Fields that have the same names in bodies and in `SamplingParams`."""

_ENDINGS = ("add_generation_prompt", "continue_final_message")
"""Fields of a body that may also be given as variables of the chat template."""


@dataclass(frozen=True)
class Defaults:
    """Values of fields that bodies leave out."""

    sizes: Sequence[int]
    """Crop sizes of the model, in pixels."""
    max_model_len: int
    """Default of ``max_tokens``; the engine reduces it to what fits."""
    temperature: float = 1.0
    variables: frozenset[str] = frozenset()
    """Variables of the chat template."""


class ConstraintPart(NamedTuple):
    """A schema or grammar in a body."""

    param: str
    """The field that holds it."""
    name: str
    """Name for error messages."""
    constraint: Any


@dataclass(frozen=True)
class GenerationRequest:
    """What a request asks the engine to generate."""

    prompts: Sequence[Sequence[Mapping[str, Any]] | str | Sequence[int]]
    """Conversations, texts or token ids. Each gets ``params.n`` choices."""
    params: SamplingParams
    functions: tuple[str, ...] = ()
    """Names of functions that the response may call."""
    untagged: bool = False
    """Whether a grammar forces one call without tags, or one JSON value."""
    parallel: bool = True
    """Whether a response may hold several calls; otherwise it ends with the first."""
    token_ids: bool = False
    """Whether to return the token ids of prompts and responses."""
    truncate: bool = False
    """Whether to drop the oldest messages of a conversation that does not fit."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Options of the chat template, see :meth:`aria.engine.Engine.prepare`."""
    prompt_logprobs: int | None = None
    """Number of most likely tokens to return for each prompt token; None returns no prompt log-probabilities."""
    echo: bool = False
    """Whether a response begins with its prompt."""
    bound: tuple[ConstraintPart, ...] = ()
    """Parts of the constraint on the response, for errors."""

    @property
    def media(self) -> int:
        """Number of images, videos and documents in the prompts."""
        return sum(count_media(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class OfferedTools:
    """The functions of a request."""

    offered: tuple[dict[str, Any], ...] = ()
    """Name, description and parameters of functions that may be called."""
    required: tuple[dict[str, Any], ...] = ()
    """One of these must be called."""
    parallel: bool = True
    params: tuple[str, ...] = ()
    """The fields that hold the functions' parameters, for errors."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["name"] for tool in self.offered)


def chat(body: ChatRequest, defaults: Defaults) -> GenerationRequest:
    """Read a body of ``/v1/chat/completions``.

    Raises:
        ApiError: 400, its fields contradict each other.
    """
    return conversation(
        body,
        body.messages,
        read_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        output_constraint(body.response_format, body.structured_outputs),
        defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens or defaults.max_model_len,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


@dataclass(frozen=True)
class OutputConstraint:
    """A constraint on a response: a schema (True: any object), a grammar, or none."""

    schema: Any = None
    grammar: str | None = None
    param: str = ""
    """The field that holds it."""

    @property
    def bound(self) -> tuple[ConstraintPart, ...]:
        constraint = self.grammar if self.schema is None else self.schema
        return () if constraint is None else (ConstraintPart(self.param, self.param, constraint),)


def output_constraint(response_format: Any, structured: StructuredOutputs | None = None) -> OutputConstraint:
    """The constraint that a body puts on the response.

    Raises:
        ApiError: 400, both arguments give one.
    """
    wanted = None if isinstance(response_format, TextFormat) else response_format
    if structured is not None:
        if wanted is not None:
            raise ApiError(400, "give response_format or structured_outputs, and not both", param="structured_outputs")
        return _structured(structured)
    if isinstance(wanted, StructuralTagFormat):
        return OutputConstraint(grammar=grammar.from_structural_tag(wanted.tag), param="response_format")
    if isinstance(wanted, JsonObjectFormat):
        return OutputConstraint(
            True if wanted.json_schema is None else wanted.json_schema, param="response_format.schema"
        )
    if isinstance(wanted, JsonSchemaFormat):
        given = wanted.json_schema.json_schema if wanted.json_schema else wanted.bare_schema
        param = "response_format.json_schema.schema" if wanted.json_schema else "response_format.schema"
        return OutputConstraint(True if given is None else given, param=param)
    return OutputConstraint()


def _structured(wanted: StructuredOutputs) -> OutputConstraint:
    if wanted.json_schema is not None:
        return OutputConstraint(wanted.json_schema, param="structured_outputs.json")
    if wanted.json_object:
        return OutputConstraint(True, param="structured_outputs.json_object")
    if wanted.structural_tag is not None:
        tag = grammar.from_structural_tag(wanted.structural_tag)
        return OutputConstraint(grammar=tag, param="structured_outputs.structural_tag")
    if wanted.regex is not None:
        return OutputConstraint(grammar=grammar.from_regex(wanted.regex), param="structured_outputs.regex")
    if wanted.choice is not None:
        return OutputConstraint(grammar=grammar.from_choices(wanted.choice), param="structured_outputs.choice")
    return OutputConstraint(grammar=wanted.grammar, param="structured_outputs.grammar")


def conversation(
    body: WithoutEffect,
    given: Sequence[Message],
    functions: OfferedTools,
    form: OutputConstraint,
    defaults: Defaults,
    **fields: Any,
) -> GenerationRequest:
    """Combine messages, functions and a constraint on the response; see :func:`sampling`.

    Raises:
        ApiError: 400, functions together with a grammar.
    """
    schema = form.schema
    if functions.offered and form.grammar is not None:
        raise ApiError(400, f"{form.param} cannot be combined with tools; leave them out", param=form.param)
    bound = [
        ConstraintPart(place, f"the parameters of {tool['name']!r}", tool_calls.parameters(tool))
        for place, tool in zip(functions.params, functions.offered, strict=True)
    ]
    bound += form.bound
    if functions.required:
        schema = tool_calls.call_schema(functions.required)
    elif functions.offered and schema is not None:
        # Either a call, or a response that follows the constraint.
        schema = tool_calls.any_of(
            [tool_calls.call_schema(functions.offered), {"type": "object"} if schema is True else schema]
        )
    return GenerationRequest(
        prompts=[messages(given, functions.offered, defaults.sizes)],
        params=sampling(body, defaults, json_schema=schema, grammar=form.grammar, **fields),
        functions=functions.names,
        untagged=schema is not None,
        parallel=functions.parallel,
        token_ids=bool(getattr(body, "return_token_ids", None)),
        truncate=getattr(body, "truncation", None) == "auto",
        template=template(body, defaults) if isinstance(body, Templated) else {},
        prompt_logprobs=getattr(body, "prompt_logprobs", None),
        bound=tuple(bound),
    )


def completion(body: CompletionRequest, defaults: Defaults) -> GenerationRequest:
    """Read a body of ``/v1/completions``."""
    prompt = body.prompt
    several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    prompts: Any = prompt if several else [prompt]
    echoed = body.logprobs if body.echo else None
    wanted = [count for count in (echoed, body.prompt_logprobs) if count is not None]
    form = output_constraint(body.response_format, body.structured_outputs)
    params = sampling(
        body,
        defaults,
        json_schema=form.schema,
        grammar=form.grammar,
        max_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(wanted, default=None),
    )
    return GenerationRequest(
        prompts=prompts,
        params=params,
        token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs,
        echo=bool(body.echo),
        bound=form.bound,
    )


def sampling(body: WithoutEffect, defaults: Defaults, **fields: Any) -> SamplingParams:
    """Sampling parameters of a body.

    Args:
        body: Provides the fields whose names are the same.
        defaults: Values of fields that it leaves out.
        fields: Fields whose names differ between bodies.
    """
    given = {name: value for name in _SAME_NAMES if (value := getattr(body, name, None)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    own = getattr(body, "stop", None) or ()
    bias = {int(token): value for token, value in (getattr(body, "logit_bias", None) or {}).items()}
    return SamplingParams(
        stop=own,
        logit_bias=bias or None,
        **{"temperature": defaults.temperature, **given, **fields},
    )


def template(body: Templated, defaults: Defaults) -> dict[str, Any]:
    """Options of the chat template, for :meth:`aria.processor.AriaProcessor.prepare`.

    Raises:
        ApiError: 400, a variable that the template does not read, or contradicting options.
    """
    given = {name: value for name, value in (body.chat_template_kwargs or {}).items() if value is not None}
    endings = {name: getattr(body, name) for name in _ENDINGS}
    for name in endings.keys() & given.keys():
        endings[name] = given.pop(name)
        if not isinstance(endings[name], bool):
            raise ApiError(400, f"chat_template_kwargs.{name} should be true or false", param="chat_template_kwargs")
    continues = bool(endings["continue_final_message"])
    opens = not continues if endings["add_generation_prompt"] is None else endings["add_generation_prompt"]
    if opens and continues:
        message = "add_generation_prompt and continue_final_message exclude each other; set one of them to false"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    for name in given.keys() - defaults.variables:
        rule = field_rules.TEMPLATE.get(name)
        if rule is not None and rule.accepts(given[name]):
            del given[name]  # a variable of other models' templates, without effect here
            continue
        like = field_rules.nearest(name, [*_ENDINGS, *defaults.variables, *field_rules.TEMPLATE])
        advice = rule.reason if rule is not None else f"did you mean {like}?" if like else "leave it out"
        message = f"chat_template_kwargs.{name:.80} is not a variable of the chat template; {advice}"
        raise ApiError(400, message, param=f"chat_template_kwargs.{name:.80}", code="unsupported_field")
    return {"add_generation_prompt": opens, "continue_final_message": continues, "variables": given}


def read_tools(
    offered: Sequence[Tool] | None,
    choice: str | NamedTool | AllowedToolsChoice | None,
    parallel: bool | None,
    where: str = "tools[{}].function.parameters",
) -> OfferedTools:
    """Read functions and ``tool_choice``.

    Raises:
        ApiError: 400, a choice without functions or of an unknown one, or parameters that are not an object.
    """
    if choice == "none" or (not offered and choice in (None, "auto")):
        return OfferedTools()
    if not offered:
        raise ApiError(400, "tool_choice asks for a call, but tools is empty", param="tool_choice")
    described = {
        where.format(i): tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        for i, tool in enumerate(offered)
    }
    names = [tool["name"] for tool in described.values()]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    for place, tool in described.items():
        try:
            tool_calls.parameters(tool)
        except ValueError as error:
            raise ApiError(400, str(error), param=place) from None
    chosen = [choice] if isinstance(choice, NamedTool) else []
    if isinstance(choice, AllowedToolsChoice):
        chosen = choice.allowed_tools.tools
    wanted = [tool.function.name for tool in chosen]
    if unknown := [name for name in wanted if name not in names]:
        raise ApiError(400, f"tool_choice names {unknown[0]!r}, which is not in tools", param="tool_choice")
    if isinstance(choice, AllowedToolsChoice):
        described = {place: tool for place, tool in described.items() if tool["name"] in wanted}
        choice = choice.allowed_tools.mode
    required: list[dict[str, Any]] = []
    if choice not in (None, "auto"):
        required = [tool for tool in described.values() if choice == "required" or tool["name"] in wanted]
    return OfferedTools(tuple(described.values()), tuple(required), parallel is not False, tuple(described))


def messages(
    given: Sequence[Message], offered: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Convert messages to the processor's format.

    Args:
        given: OpenAI's messages.
        offered: Functions to describe to the model.
        sizes: Crop sizes of the model, in pixels.
    """
    converted = [_message(message, sizes) for message in given]
    if not offered:
        return converted
    return calls.add_instructions(converted, offered)


def count_media(prompt: Sequence[Any]) -> int:
    """Number of images, videos and documents in a conversation; 0 for other prompts."""
    contents = (message["content"] for message in prompt if isinstance(message, Mapping))
    return sum(part["type"] != "text" for content in contents if isinstance(content, list) for part in content)


def characters(prompt: str | Sequence[Any]) -> int:
    """Number of characters of a text, or of all texts in a conversation; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    contents = (message["content"] for message in prompt if isinstance(message, Mapping))
    return sum(
        len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
        for content in contents
    )


def _message(message: Message, sizes: Sequence[int]) -> dict[str, Any]:
    if isinstance(message, AssistantMessage):
        return {"role": "assistant", "content": _answer(message)}
    content = message.content if isinstance(message.content, str) else [_part(p, sizes) for p in message.content]
    if isinstance(message, ToolMessage) and message.name:
        named = f"{message.name}: "
        content = named + content if isinstance(content, str) else [{"type": "text", "text": named}, *content]
    return {"role": message.role, "content": content}


def _answer(message: AssistantMessage) -> str:
    """Text of an earlier response, with its calls in the model's own format."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
    made = [calls.format_past_call(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return "\n".join(text for text in (content or message.refusal or "", *made) if text)


def _part(part: Any, sizes: Sequence[int]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImageUrlPart):
        return _image(part.image_url, sizes) | _given(uuid=part.uuid)
    if isinstance(part, VideoUrlPart):
        return _video(part.video_url, sizes) | _given(uuid=part.uuid)
    assert isinstance(part, FilePart), "the protocol allows no other part"
    return _document(part.file, sizes)


def _image(image: ImageUrl, sizes: Sequence[int]) -> dict[str, Any]:
    size = min(sizes) if image.detail == "low" else max(sizes)
    return _given(type="image", url=image.url, max_image_size=size, split_image=image.split)


def _video(video: VideoUrl, sizes: Sequence[int]) -> dict[str, Any]:
    return _given(
        type="video",
        url=video.url,
        max_image_size=max(sizes) if video.detail in ("high", "original") else min(sizes),
        num_frames=video.num_frames,
        fps=video.fps,
        max_frames=video.max_frames,
        timestamps=video.timestamps,
    )


def _document(file: FileData, sizes: Sequence[int]) -> dict[str, Any]:
    source: dict[str, Any] = {"url": file.file_url or file.file_data or ""}
    if file.file_data and file.file_data[:5].lower() != "data:":
        source = {"document": Base64(file.file_data)}
    size = min(sizes) if file.detail == "low" else max(sizes)
    return _given(type="document", **source, pages=file.pages, max_image_size=size, split_image=file.split)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
