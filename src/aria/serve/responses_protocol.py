"""Request bodies of ``/v1/responses``, and their conversion to `GenerationRequest`. Nothing is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from aria.serve import field_rules, generation_request
from aria.serve.generation_request import Defaults, GenerationRequest
from aria.serve.output_formats import JsonObjectFormat, JsonSchemaFormat, TextFormat
from aria.serve.protocol import (
    MAX_MESSAGES,
    AllowedTools,
    AllowedToolsChoice,
    AssistantMessage,
    Detail,
    FileData,
    FilePart,
    Function,
    FunctionCall,
    ImageUrl,
    ImageUrlPart,
    Message,
    NamedFunction,
    NamedTool,
    Sampling,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    ToolMode,
    UserMessage,
    VideoOptions,
    VideoUrl,
    VideoUrlPart,
)
from aria.serve.protocol_base import (
    MAX_PARTS,
    Arguments,
    Body,
    Description,
    Json,
    ListOf,
    Source,
    Text,
    discriminated_by,
    discriminated_by_field,
    json_type,
)


class InputText(Body):
    type: Literal["input_text"]
    text: Text
    known: ClassVar[field_rules.FieldRules] = field_rules.PART


class PriorOutputText(Body):
    """Text of an earlier response, as it was received."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.OUTPUT_TEXT


class OutputRefusal(Body):
    type: Literal["refusal"]
    refusal: Text


class InputImage(Body):
    type: Literal["input_image"]
    image_url: Source
    detail: Detail = "auto"
    split: bool | None = None
    """Extension: split the image into tiles."""
    known: ClassVar[field_rules.FieldRules] = field_rules.FILE


class InputVideo(VideoOptions):
    """Extension: a video."""

    known: ClassVar[field_rules.FieldRules] = field_rules.PART

    type: Literal["input_video"]
    video_url: Source


class InputFile(FileData):
    type: Literal["input_file"]


InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[InputVideo, Tag("<input_video>")]
    | Annotated[InputFile, Tag("<input_file>")]
    | Annotated[PriorOutputText, Tag("<output_text>")]
    | Annotated[OutputRefusal, Tag("<refusal>")],
    discriminated_by_field("type"),
]
Content = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[ListOf[InputPart], Field(max_length=MAX_PARTS), Tag("<list>")],
    discriminated_by(json_type, "a string or a list of parts"),
]


_KINDS = {
    "user": ("input_text", "input_image", "input_video", "input_file"),
    "assistant": ("output_text", "refusal", "input_text"),
}
"""Content types by role; other roles have text only."""


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: str | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.ITEM

    @model_validator(mode="after")
    def _fits(self) -> InputMessage:
        kinds = _KINDS.get(self.role, ("input_text",))
        for i, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if part.type not in kinds:
                raise ValueError(
                    f"content[{i}] of the role {self.role} is of the type {part.type!r}; it may be {' or '.join(kinds)}"
                )
        return self


class InputCall(Body):
    """An earlier call by the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    id: str | None = None
    status: str | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.ITEM


class InputResult(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: str | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.ITEM


class InputReasoning(Body):
    """Reasoning of another model; left out of the prompt."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: Source | None = None
    status: str | None = None


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputResult, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    discriminated_by_field("type", default="message"),
]
Items = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[ListOf[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag("<list>")],
    discriminated_by(json_type, "a string or a list of items"),
]


class FlatSchema(Body):
    type: Literal["json_schema"]
    name: str
    json_schema: Annotated[Json, Field(alias="schema")]
    description: Description | None = None
    strict: bool | None = None
    """Without effect: responses always follow the schema."""


class TextSettings(Body):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[FlatSchema, Tag("<json_schema>")],
            discriminated_by_field("type"),
        ]
        | None
    ) = None
    known: ClassVar[field_rules.FieldRules] = field_rules.TEXT


class FlatTool(Function):
    type: Literal["function"] = "function"
    known: ClassVar[field_rules.FieldRules] = field_rules.FLAT_TOOL


class Reasoning(Body):
    """Settings of reasoning models, without effect: Aria does not reason before it responds."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.REASONING


class FlatChoice(Body):
    type: Literal["function"] = "function"
    name: str


class FlatAllowedTools(Body):
    """The tools that the model may or must call."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[ListOf[FlatChoice], Field(min_length=1)]


FlatChosen = Annotated[
    Annotated[FlatChoice, Tag("<function>")] | Annotated[FlatAllowedTools, Tag("<allowed_tools>")],
    discriminated_by_field("type", default="function"),
]
FlatToolChoice = Annotated[
    Annotated[ToolMode, Tag("<string>")] | Annotated[FlatChosen, Tag("<object>")],
    discriminated_by(json_type, "a string or an object"),
]


LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    # Responses never contain these.
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseStreamOptions(Body):
    known: ClassVar[field_rules.FieldRules] = field_rules.STREAM


class ResponsesRequest(Sampling):
    """Body of ``POST /v1/responses``."""

    model: str | None = None
    input: Items
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextSettings | None = None
    tools: ListOf[FlatTool] | None = None
    tool_choice: FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: ListOf[Include] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: the oldest messages of a conversation that does not fit are dropped."""
    stream_options: ResponseStreamOptions | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.RESPONSES

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def read(body: ResponsesRequest, defaults: Defaults) -> GenerationRequest:
    """Convert a body to a generation request.

    Raises:
        ApiError: 400, its fields contradict each other.
    """
    given = [Tool(function=Function(**tool.model_dump(exclude={"type"}))) for tool in body.tools or ()]
    wanted = body.text.format if body.text else None
    asked_for: Any = wanted
    if isinstance(wanted, FlatSchema):
        asked_for = JsonSchemaFormat.model_validate({"type": "json_schema", "schema": wanted.json_schema})
    form = generation_request.output_constraint(asked_for, body.structured_outputs)
    form = replace(form, param=form.param.replace("response_format", "text.format"))
    return generation_request.conversation(
        body,
        messages(body),
        generation_request.read_tools(
            given, _choice(body.tool_choice), body.parallel_tool_calls, "tools[{}].parameters"
        ),
        form,
        defaults,
        max_tokens=body.max_output_tokens or defaults.max_model_len,
        logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
    )


def _choice(given: str | FlatChoice | FlatAllowedTools | None) -> Any:
    """``tool_choice`` in the format of chat completions."""
    if isinstance(given, FlatAllowedTools):
        named = [_choice(tool) for tool in given.tools]
        return AllowedToolsChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=given.mode, tools=named))
    return NamedTool(function=NamedFunction(name=given.name)) if isinstance(given, FlatChoice) else given


def messages(body: ResponsesRequest) -> list[Message]:
    """Convert input items to messages; consecutive calls form one turn."""
    found: list[Message] = []
    if body.instructions:
        found.append(SystemMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*found, UserMessage(role="user", content=body.input)]
    for item in body.input:
        if isinstance(item, InputCall):
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            last = found[-1] if found else None
            if isinstance(last, AssistantMessage):
                found[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
            else:
                found.append(AssistantMessage(role="assistant", tool_calls=[call]))
        elif isinstance(item, InputReasoning):
            continue
        elif isinstance(item, InputResult):
            found.append(ToolMessage(role="tool", tool_call_id=item.call_id, content=_content(item.output)))
        elif item.role == "user":
            found.append(UserMessage(role="user", content=_content(item.content)))
        elif item.role == "assistant":
            found.append(AssistantMessage(role="assistant", content=_text(item.content)))
        else:
            found.append(SystemMessage(role=item.role, content=_text(item.content)))
    return found


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, OutputRefusal) else part.text for part in content)


def _content(content: str | list[Any]) -> str | list[Any]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _renamed(video: InputVideo) -> dict[str, Any]:
    fields = video.model_dump(exclude={"type", "video_url"}, exclude_none=True)
    return {"url": video.video_url, **fields}


def _part(part: Any) -> TextPart | ImageUrlPart | VideoUrlPart | FilePart:
    if isinstance(part, InputImage):
        image = ImageUrl(url=part.image_url, detail=part.detail, split=part.split)
        return ImageUrlPart(type="image_url", image_url=image)
    if isinstance(part, InputVideo):
        return VideoUrlPart(type="video_url", video_url=VideoUrl(**_renamed(part)))
    if isinstance(part, InputFile):
        fields = part.model_dump(include={"file_data", "file_url", "filename", "pages", "split"})
        return FilePart(type="file", file=FileData(**fields, detail=part.detail))
    return TextPart(type="text", text=part.refusal if isinstance(part, OutputRefusal) else part.text)
