"""What the server answers with: OpenAI's objects, and vLLM's of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


T = TypeVar("T")
OmittedIfNone = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A field of vLLM's beside OpenAI's, left out where it was not asked for."""


class Reply(BaseModel):
    """What a client gets."""

    model_config = ConfigDict(extra="forbid")


class PromptDetails(Reply):
    cached_tokens: int = 0
    """Tokens of the prompt that were there from earlier requests."""


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
    """All tokens that were generated, the end included."""


class PromptLogprob(Reply):
    logprob: float
    rank: int
    """1 where no token was likelier."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Of each token of a prompt but the first: by id, the token and the likeliest in its place."""


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
    """The model whose weights answer."""
    parent: str | None = None
    """Of an adapter: the model that it goes beside."""
    max_model_len: int
    """Tokens of the longest prompt and its answer together."""


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class MediaCost(Reply):
    """What one picture, clip or document of a prompt takes."""

    kind: str
    """image, video or document."""
    count: int
    """Frames taken of a clip, pages of a document, 1 for a picture."""
    crops: int
    tokens: int
    total: OmittedIfNone[int] = None
    """Pages of the whole document."""
    preview: OmittedIfNone[str] = None
    """Its first picture, 320 pixels wide or high at most, as a data: URI."""


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    """With one id for each token of a picture."""
    token_strs: list[str] | None = None
    media: list[MediaCost]
    """In the order of the messages."""


class Detokenized(Reply):
    prompt: str


class StatusObject(Reply):
    status: str


class TokenizerInfo(Reply):
    """What programs need that count and template on their own, named as in transformers' tokenizer_config.json."""

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
    """What a request was answered with, and the settings it was made by. It is not kept."""

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
