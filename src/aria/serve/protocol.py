"""Request bodies of OpenAI's interface. `field_rules` lists the fields that are not implemented."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from aria.serve import field_rules
from aria.serve.output_formats import ResponseFormat, StructuredOutputs
from aria.serve.protocol_base import (
    MAX_PARTS,
    Arguments,
    Body,
    Description,
    Json,
    ListOf,
    Source,
    Text,
    at_most,
    discriminated_by,
    discriminated_by_field,
    field_error,
    json_type,
)

MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
MAX_MESSAGES = 16_384
"""Each message takes at least four tokens."""
MAX_BIASES = 1024
"""Every sequence of a batch has room for the largest number in the batch."""


class WithoutEffect(Body):
    """Fields that have no meaning here: nothing is stored, billed or cached by name."""

    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.REQUEST


# Content of messages

Detail = Literal["auto", "low", "high", "original"]
"""Crop size of images, frames and pages: low is the model's smallest, high and original its largest."""


class TextPart(Body):
    type: Literal["text"]
    text: Text
    known: ClassVar[field_rules.FieldRules] = field_rules.PART


Uuid = Annotated[str, Field(min_length=1, max_length=256)]
"""Extension of vLLM: a client's name of a medium, which later requests may send in place of the medium."""


class ImageUrl(Body):
    url: Source | None = None
    """http(s) URL, data: URI, or a path in an allowed folder."""
    detail: Detail = "auto"
    """auto: the largest size."""
    split: bool | None = None
    """Extension: split the image into tiles, for fine print. Default: the model's setting."""


def _check_source(field: str, url: str | None, uuid: str | None) -> None:
    if url is None and uuid is None:
        raise ValueError(f"{field}.url is missing; give it, or the uuid of a medium that was sent before")


class ImageUrlPart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl = ImageUrl()
    """Null or without a url if a uuid references an image that was sent before."""
    uuid: Uuid | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.PART

    @model_validator(mode="after")
    def _has_source(self) -> ImageUrlPart:
        _check_source("image_url", self.image_url.url, self.uuid)
        return self


class VideoOptions(Body):
    """How a video is sampled."""

    detail: Detail = "auto"
    """auto: the smallest size."""
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None
    timestamps: bool | None = None


class VideoUrl(VideoOptions):
    url: Source | None = None


class VideoUrlPart(Body):
    """Extension of vLLM."""

    type: Literal["video_url"]
    video_url: VideoUrl = VideoUrl()
    uuid: Uuid | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.PART

    @model_validator(mode="after")
    def _has_source(self) -> VideoUrlPart:
        _check_source("video_url", self.video_url.url, self.uuid)
        return self


class FileData(Body):
    known: ClassVar[field_rules.FieldRules] = field_rules.FILE
    file_data: Source | None = None
    """A PDF as a data: URI or in base64."""
    file_url: Source | None = None
    """Extension: its URL, in place of the data."""
    filename: str | None = None
    pages: str | None = None
    """Extension: such as ``1-3,7``."""
    detail: Detail = "auto"
    split: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> FileData:
        if (self.file_data is None) == (self.file_url is None):
            raise ValueError("give file_data or file_url, and not both")
        return self


class FilePart(Body):
    type: Literal["file"]
    file: FileData
    known: ClassVar[field_rules.FieldRules] = field_rules.PART


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: Text
    known: ClassVar[field_rules.FieldRules] = field_rules.PART


UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[VideoUrlPart, Tag("<video_url>")]
    | Annotated[FilePart, Tag("<file>")],
    discriminated_by_field("type"),
]
AssistantPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")], discriminated_by_field("type")
]
_parts = discriminated_by(json_type, "a string or a list of parts")
_some = Field(max_length=MAX_PARTS)
Texts = Annotated[Annotated[Text, Tag("<string>")] | Annotated[ListOf[TextPart], _some, Tag("<list>")], _parts]
UserContent = Annotated[Annotated[Text, Tag("<string>")] | Annotated[ListOf[UserPart], _some, Tag("<list>")], _parts]
AssistantContent = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[ListOf[AssistantPart], _some, Tag("<list>")], _parts
]


# Messages and tools


class FunctionCall(Body):
    name: str
    arguments: Arguments = "{}"
    """JSON, as a string; truncated or invalid JSON appears in the conversation as it is."""
    known: ClassVar[field_rules.FieldRules] = field_rules.CALLED_FUNCTION


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    known: ClassVar[field_rules.FieldRules] = field_rules.TOOL_CALL


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Texts
    known: ClassVar[field_rules.FieldRules] = field_rules.MESSAGE


class UserMessage(Body):
    role: Literal["user"]
    content: UserContent
    known: ClassVar[field_rules.FieldRules] = field_rules.MESSAGE


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    tool_calls: ListOf[ToolCall] | None = None
    refusal: Text | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.ASSISTANT


class ToolMessage(Body):
    role: Literal["tool"]
    content: UserContent
    tool_call_id: str
    name: str | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.MESSAGE


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    discriminated_by_field("role"),
]


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Description | None = None
    parameters: Json | None = None
    strict: bool | None = None
    """Without effect: if a call is required, its arguments always follow the schema."""
    known: ClassVar[field_rules.FieldRules] = field_rules.TOOL


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function
    known: ClassVar[field_rules.FieldRules] = field_rules.TOOL


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[ListOf[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(Body):
    """The tools that the model may or must call."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ChosenTools = Annotated[
    Annotated[NamedTool, Tag("<function>")] | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")],
    discriminated_by_field("type", default="function"),
]
ToolMode = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    Annotated[ToolMode, Tag("<string>")] | Annotated[ChosenTools, Tag("<object>")],
    discriminated_by(json_type, "a string or an object"),
]


# Requests


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Extension of vLLM: with include_usage, every chunk has the token counts so far."""
    include_progress: bool | None = None
    """Extension: chunks without choices report how far the media have been read."""
    known: ClassVar[field_rules.FieldRules] = field_rules.STREAM


_StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[_StopText, Tag("<string>")] | Annotated[ListOf[_StopText], Field(max_length=MAX_STOPS), Tag("<list>")],
    discriminated_by(json_type, "a string or a list of strings"),
]


RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
"""Extension of vLLM: the id of the response, after its prefix."""


class Sampling(WithoutEffect):
    """Sampling and stopping, in all interfaces."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0 is greedy."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            at_most(MAX_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    # Extensions of vLLM.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[ListOf[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: RequestId | None = None


class ChoicesRequest(Sampling):
    """Fields of the two interfaces that respond with choices."""

    n: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Extension of vLLM: whether to return the token ids of choices and the prompt."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _streams(self) -> ChoicesRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "requires stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise field_error("prompt_logprobs", "requires stream: false; /v1/completions streams them with echo")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_progress(self) -> bool:
        """Whether a stream reports how far the media have been read."""
        return bool(self.stream_options and self.stream_options.include_progress)

    @property
    def wants_usage_of_chunks(self) -> bool:
        """Whether each chunk has the token counts so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class Templated(Body):
    """Options of the chat template, extensions of vLLM."""

    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the start of the assistant's turn. Default: true, unless the last message is
    continued."""
    continue_final_message: bool | None = None
    """Whether the response continues the last message."""
    chat_template_kwargs: Json | None = None
    """Variables of the chat template, or the two fields above, over which they take precedence."""


class ChatRequest(ChoicesRequest, Templated):
    """Body of ``POST /v1/chat/completions``."""

    model: str | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: ListOf[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    known: ClassVar[field_rules.FieldRules] = field_rules.CHAT

    @model_validator(mode="after")
    def _merge(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "requires logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise field_error("max_tokens", "and max_completion_tokens mean the same but differ; give one of them")
        return self


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return "<string>" if isinstance(value, str) else None
    first = value[0] if value else None
    if isinstance(first, str):
        return "<strings>"
    return "<lists of ids>" if isinstance(first, list) else "<ids>"


TokenIds = Annotated[ListOf[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[ListOf[Text], Tag("<strings>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[ListOf[TokenIds], Tag("<lists of ids>")],
    discriminated_by(_prompt_kind, "a string, a list of token ids, or a list of either"),
]


class CompletionRequest(ChoicesRequest):
    """Body of ``POST /v1/completions``."""

    model: str | None = None
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 generates nothing, for log-probabilities of prompts."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    """Whether the response begins with the prompt's text and log-probabilities."""
    response_format: ResponseFormat | None = None
    """Extension of vLLM."""
    known: ClassVar[field_rules.FieldRules] = field_rules.COMPLETION


class TokenizeRequest(Templated):
    """Body of ``POST /tokenize``: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: ListOf[Tool] | None = None
    return_token_strs: bool | None = None
    # Extensions of this server.
    return_previews: bool | None = None
    """Whether to return a small image of each medium."""
    stream: bool | None = None
    """Whether to stream progress of reading media, then the response."""
    known: ClassVar[field_rules.FieldRules] = field_rules.TOKENIZE

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: ListOf[Annotated[int, Field(ge=0)]]
