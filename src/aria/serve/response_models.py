"""Response bodies: OpenAI's objects, and vLLM's for tokenization."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


T = TypeVar("T")
OmittedIfNone = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A field of vLLM's, left out unless requested."""


class Reply(BaseModel):
    """Base of response bodies."""

    model_config = ConfigDict(extra="forbid")


class PromptDetails(Reply):
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


class UsageObject(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprobObject(Reply):
    token: str
    logprob: float
    bytes: list[int]


class LogprobObject(TopLogprobObject):
    top_logprobs: list[TopLogprobObject]


class ChoiceLogprobs(Reply):
    content: list[LogprobObject] | None = None
    refusal: list[LogprobObject] | None = None


class CalledFunction(Reply):
    name: str
    arguments: str


class ToolCallReply(Reply):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(Reply):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason
    token_ids: OmittedIfNone[list[int]] = None
    """All generated tokens, including the end token."""


class PromptLogprob(Reply):
    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each prompt token but the first: the token and the most likely alternatives, by id."""


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_token_ids: OmittedIfNone[list[int]] = None
    prompt_logprobs: OmittedIfNone[PromptLogprobs] = None


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    token_ids: OmittedIfNone[list[int]] = None
    prompt_token_ids: OmittedIfNone[list[int]] = None
    prompt_logprobs: OmittedIfNone[PromptLogprobs] = None


class CompletionObject(Reply):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageObject


class ModelCard(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "aria"
    root: str
    """The base model."""
    parent: str | None = None
    """The base model of an adapter."""
    max_model_len: int
    """Maximum number of tokens of prompt and response."""


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class MediaCost(Reply):
    """The cost of one image, video or document in a prompt."""

    kind: str
    """image, video or document."""
    count: int
    """Number of frames of a video or pages of a document; 1 for an image."""
    crops: int
    tokens: int
    total: OmittedIfNone[int] = None
    """Pages of the whole document."""
    preview: OmittedIfNone[str] = None
    """Its first image, at most 320 pixels a side, as a data: URI."""


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    """With one id per image token."""
    token_strs: list[str] | None = None
    media: list[MediaCost]
    """In the order of the messages."""


class Detokenized(Reply):
    prompt: str


class StatusObject(Reply):
    status: str


class TokenizerInfo(Reply):
    """What programs need to tokenize and apply the template, named as in transformers' tokenizer_config.json."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str
    unk_token: str
    chat_template: str
    model_max_length: int


class Version(Reply):
    version: str


class ErrorDetails(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(Reply):
    error: ErrorDetails


class OutputDetails(Reply):
    reasoning_tokens: Literal[0] = 0


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputTextPart(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[LogprobObject]


class OutputMessage(Reply):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputTextPart]


class OutputCall(Reply):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed"]


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"]


class ResponseObject(Reply):
    """A response and the settings of its request. It is not stored."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    background: Literal[False] = False
    error: None = None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    reasoning: dict[str, str | None]
    metadata: dict[str, str]
    usage: ResponseUsage | None
