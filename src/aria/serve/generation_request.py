"""Bodies of requests -> messages and sampling parameters. Pure: no server and no model is needed."""

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
"""Of a completion that says nothing about its length, as OpenAI's interface has it."""

_ALIKE = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("seed", "n", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Fields that bodies and `SamplingParams` call by the same names."""

_ENDINGS = ("add_generation_prompt", "continue_final_message")
"""Fields of a body that may also stand among the variables of the chat template."""


@dataclass(frozen=True)
class Defaults:
    """What bodies leave to the model and its server."""

    sizes: Sequence[int]
    """Sides of crops that the model knows, in pixels."""
    max_model_len: int
    """Stands for an unlimited answer; the engine gives the room that is left."""
    temperature: float = 1.0
    variables: frozenset[str] = frozenset()
    """Of the chat template."""


class ConstraintPart(NamedTuple):
    """A schema or grammar of a body."""

    param: str
    """The field that holds it."""
    name: str
    """For people."""
    constraint: Any


@dataclass(frozen=True)
class GenerationRequest:
    """What a body asks the engine for."""

    prompts: Sequence[Sequence[Mapping[str, Any]] | str | Sequence[int]]
    """Conversations, texts, or token ids. Each is answered ``params.n`` times."""
    params: SamplingParams
    functions: tuple[str, ...] = ()
    """Names that the answer may call."""
    untagged: bool = False
    """A grammar makes the answer one call without tags, or one JSON value."""
    parallel: bool = True
    """An answer may hold several calls; otherwise it ends with its first."""
    token_ids: bool = False
    """Whether the ids of prompts and answers are returned."""
    truncate: bool = False
    """Whether the oldest messages may be dropped where a conversation does not fit."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """How conversations are written, see :meth:`aria.engine.Engine.prepare`."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are returned beside each token of a prompt; None: nothing of prompts is."""
    echo: bool = False
    """Whether an answer begins with its prompt."""
    bound: tuple[ConstraintPart, ...] = ()
    """What the answer follows, part by part, for errors."""

    @property
    def media(self) -> int:
        """Images, clips and documents of the prompts, which take more to read than text."""
        return sum(count_media(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class Tools:
    """What a request says of functions."""

    told: tuple[dict[str, Any], ...] = ()
    """Name, description and parameters of those that may be called."""
    demanded: tuple[dict[str, Any], ...] = ()
    """One of these has to be called."""
    parallel: bool = True
    places: tuple[str, ...] = ()
    """The fields of the functions' parameters."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["name"] for tool in self.told)


def chat(body: ChatRequest, defaults: Defaults) -> GenerationRequest:
    """A chat body.

    Raises:
        ApiError: 400, it contradicts itself.
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
    """What an answer follows: a schema (True: any object), a grammar, or nothing."""

    schema: Any = None
    grammar: str | None = None
    param: str = ""
    """The field that says so."""

    @property
    def bound(self) -> tuple[ConstraintPart, ...]:
        constraint = self.grammar if self.schema is None else self.schema
        return () if constraint is None else (ConstraintPart(self.param, self.param, constraint),)


def output_constraint(response_format: Any, structured: StructuredOutputs | None = None) -> OutputConstraint:
    """What bodies ask an answer to follow.

    Raises:
        ApiError: 400, both say something.
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
    said: Sequence[Message],
    offered: Tools,
    form: OutputConstraint,
    defaults: Defaults,
    **fields: Any,
) -> GenerationRequest:
    """What is asked for by messages, functions and the form of the answer; see :func:`sampling`.

    Raises:
        ApiError: 400, functions beside a grammar.
    """
    schema = form.schema
    if offered.told and form.grammar is not None:
        raise ApiError(400, f"{form.param} cannot be followed beside tools; leave them out", param=form.param)
    bound = [
        ConstraintPart(place, f"the parameters of {tool['name']!r}", tool_calls.parameters(tool))
        for place, tool in zip(offered.places, offered.told, strict=True)
    ]
    bound += form.bound
    if offered.demanded:
        schema = tool_calls.call_schema(offered.demanded)
    elif offered.told and schema is not None:
        # Either a call or an answer of the form that was asked for.
        schema = tool_calls.any_of(
            [tool_calls.call_schema(offered.told), {"type": "object"} if schema is True else schema]
        )
    return GenerationRequest(
        prompts=[messages(said, offered.told, defaults.sizes)],
        params=sampling(body, defaults, json_schema=schema, grammar=form.grammar, **fields),
        functions=offered.names,
        untagged=schema is not None,
        parallel=offered.parallel,
        token_ids=bool(getattr(body, "return_token_ids", None)),
        truncate=getattr(body, "truncation", None) == "auto",
        template=template(body, defaults) if isinstance(body, Templated) else {},
        prompt_logprobs=getattr(body, "prompt_logprobs", None),
        bound=tuple(bound),
    )


def completion(body: CompletionRequest, defaults: Defaults) -> GenerationRequest:
    """A body of plain text or token ids."""
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
    """How tokens are chosen.

    Args:
        body: its fields of the same names count.
        defaults: for fields that it leaves out.
        fields: those whose names differ between bodies.
    """
    given = {name: value for name in _ALIKE if (value := getattr(body, name, None)) is not None}
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
    """How a conversation is written, as :meth:`aria.processor.AriaProcessor.prepare` takes it.

    Raises:
        ApiError: 400, a variable that the template does not read, or two endings.
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
        message = (
            "add_generation_prompt opens a new turn and continue_final_message the last one; set one of them to false"
        )
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    for name in given.keys() - defaults.variables:
        rule = field_rules.TEMPLATE.get(name)
        if rule is not None and rule.accepts(given[name]):
            del given[name]  # a variable of other models' templates, which changes nothing here
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
) -> Tools:
    """Functions, and whether one has to be called.

    Raises:
        ApiError: 400, a choice without functions or of one that is not among them, or arguments that are no object.
    """
    if choice == "none" or (not offered and choice in (None, "auto")):
        return Tools()
    if not offered:
        raise ApiError(400, "tool_choice asks for a call, but tools is empty", param="tool_choice")
    told = {
        where.format(i): tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        for i, tool in enumerate(offered)
    }
    names = [tool["name"] for tool in told.values()]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    for place, tool in told.items():
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
        told = {place: tool for place, tool in told.items() if tool["name"] in wanted}
        choice = choice.allowed_tools.mode
    demanded: list[dict[str, Any]] = []
    if choice not in (None, "auto"):
        demanded = [tool for tool in told.values() if choice == "required" or tool["name"] in wanted]
    return Tools(tuple(told.values()), tuple(demanded), parallel is not False, tuple(told))


def messages(
    said: Sequence[Message], offered: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Messages as the processor takes them.

    Args:
        said: OpenAI's messages.
        offered: functions that the model is told of.
        sizes: sides of crops that the model knows, in pixels.
    """
    told = [_message(message, sizes) for message in said]
    if not offered:
        return told
    return calls.add_instructions(told, offered)


def count_media(prompt: Sequence[Any]) -> int:
    """Images, clips and documents of a conversation; other prompts have none."""
    contents = (message["content"] for message in prompt if isinstance(message, Mapping))
    return sum(part["type"] != "text" for content in contents if isinstance(content, list) for part in content)


def characters(prompt: str | Sequence[Any]) -> int:
    """Of a text, or of all texts of a conversation; token ids have none."""
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
    """What the model said before, with its calls as it writes them."""
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
    assert isinstance(part, FilePart), "the protocol lets no other part through"
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
