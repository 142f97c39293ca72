"""Fields of OpenAI's, vLLM's and llama.cpp's interfaces that are not implemented.

They are accepted if they have no effect, and refused by name, with the reason, if they would change the response. The
models in `protocol` and `responses_protocol` have the fields that are implemented.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aria.wording import similar_names


@dataclass(frozen=True)
class FieldRule:
    """How to treat a known field that is not implemented."""

    reason: str = ""
    """Why other values are refused, and what to use instead."""
    values: tuple[Any, ...] | None = None
    """Values that are accepted, since they have no effect; None: any."""

    def accepts(self, value: Any) -> bool:
        """Whether a value has no effect. True does not equal 1."""
        if self.values is None:
            return True
        return any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in self.values)

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of accepted values; None if only null is accepted."""
        if self.values is None:
            return {"description": "Accepted without effect."}
        if not self.values:
            return None
        return {"enum": [None, *self.values], "description": "Accepted with these values, which have no effect."}


FieldRules = dict[str, FieldRule]


def _ignored(*names: str) -> dict[str, FieldRule]:
    return dict.fromkeys(names, FieldRule())


def _only(*values: Any, reason: str) -> FieldRule:
    return FieldRule(reason, values)


def _refused(reason: str) -> FieldRule:
    return FieldRule(reason, ())


_NO_BEAMS = "there is no beam search; use n"
_MEDIA = "set detail, split, num_frames or pages on the content part"
_TOOL_CALLS = "functions are deprecated; use tools, tool_choice and tool_calls"
_NO_AUDIO = "the model has no audio input or output"
_STATELESS = "nothing is stored between requests; send the whole conversation"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Levels of reasoning effort. The model does not reason before it responds, so they have no effect."""

_FOUR = "use temperature, top_p, top_k or min_p"
_SLOTS = "there are no slots; requests share the prefix cache"
LLAMA_CPP: FieldRules = {
    **_ignored("min_keep", "n_cache_reuse", "parse_tool_calls", "reasoning_format", "thinking_forced_open"),
    "n_predict": _refused("use max_tokens"),
    "t_max_predict_ms": _only(0, -1, reason="use max_tokens"),
    "n_indent": _only(0, reason="use a grammar"),
    **dict.fromkeys(("n_keep", "n_discard"), _only(0, reason="prompts are never truncated")),
    "cache_prompt": _only(True, reason="prompts are always cached"),
    "id_slot": _only(-1, reason=_SLOTS),
    "samplers": _refused("temperature, top_k, top_p and min_p apply in this order"),
    **dict.fromkeys(("typical_p", "typ_p", "dynatemp_exponent", "tfs_z"), _only(1, reason=_FOUR)),
    **dict.fromkeys(("dynatemp_range", "xtc_probability", "mirostat"), _only(0, reason=_FOUR)),
    **_ignored("mirostat_tau", "mirostat_eta", "xtc_threshold"),
    "top_n_sigma": _only(-1, reason=_FOUR),
    "repeat_penalty": _only(1, reason="use repetition_penalty"),
    "dry_multiplier": _only(0, reason="use repetition_penalty"),
    **_ignored("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    "repeat_last_n": _only(-1, reason="penalties have no window"),
    "n_probs": _only(0, reason="use logprobs"),
    "post_sampling_probs": _only(False, reason="use logprobs"),
    "return_tokens": _only(False, reason="use return_token_ids"),
    "response_fields": _only([], reason="responses are complete"),
    **dict.fromkeys(("timings_per_token", "return_progress"), _only(False, reason="/metrics has timings")),
    "lora": _only([], reason="name an adapter in the field model"),
    "grammar": _refused('use structured_outputs: {"grammar": ...}'),
    "json_schema": _refused("use response_format"),
}
REQUEST: FieldRules = {
    **LLAMA_CPP,
    **_ignored("prompt_cache_retention", "prompt_cache_options", "session_id", "thinking_token_budget"),
    **_ignored("include_reasoning", "spaces_between_special_tokens", "truncation_side", "stream_interval"),
    **_ignored("return_mm_kwargs", "routed_experts_prompt_start", "add_special_tokens"),
    "priority": _only(0, reason="requests are scheduled in the order of their arrival"),
    "cache_salt": _refused("the prefix cache is shared by all requests of an adapter"),
    "kv_transfer_params": _only({}, reason="prefill and decode run in one process"),
    "ec_transfer_params": _only({}, reason="encoder and decoder run in one process"),
    "vllm_xargs": _only({}, reason="there are no such extensions"),
    "logits_processors": _only([], reason="use logit_bias"),
    "mm_processor_kwargs": _only({}, reason=_MEDIA),
    "media_io_kwargs": _only({}, reason=_MEDIA),
    "use_beam_search": _only(False, reason=_NO_BEAMS),
    "length_penalty": _only(1, reason=_NO_BEAMS),
    "truncate_prompt_tokens": _refused('shorten the prompt, or use truncation: "auto" of /v1/responses'),
    "allowed_token_ids": _refused("use logit_bias, or a schema"),
    "bad_words": _only([], reason="use logit_bias"),
    "logprob_token_ids": _refused("use top_logprobs"),
    "watermarking": _only(False, reason="responses are not watermarked"),
    "return_tokens_as_token_ids": _only(False, reason="use return_token_ids"),
    "return_prompt_text": _only(False, reason="/tokenize and /detokenize give the prompt's text"),
    "return_token_offsets": _only(False, reason="/tokenize gives the prompt's tokens"),
    "repetition_detection": _refused("use repetition_penalty or stop"),
    "moderation": _refused("responses are not moderated"),
    **{
        f"guided_{name}": _refused(f'use structured_outputs: {{"{name}": ...}}')
        for name in ("json", "regex", "choice", "grammar")
    },
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), _refused("use structured_outputs")),
    "structural_tag": _refused('use structured_outputs: {"structural_tag": ...}'),
}
STRUCTURED: FieldRules = {
    **_ignored("disable_fallback", "disable_any_whitespace", "disable_additional_properties"),
    "whitespace_pattern": _refused("there is no whitespace outside of strings"),
}
CHAT: FieldRules = REQUEST | {
    **_ignored("prediction"),
    "reasoning_effort": _only(*EFFORTS, reason=f"expected one of {', '.join(EFFORTS)}"),
    "verbosity": _only("medium", reason="ask in a message for the length that you want"),
    "audio": _refused(_NO_AUDIO),
    "modalities": _only(["text"], reason="responses are text"),
    "functions": _only([], reason=_TOOL_CALLS),
    "function_call": _only("none", "auto", reason=_TOOL_CALLS),
    "web_search_options": _refused("the server does not search the web"),
    "documents": _only([], reason="put documents into messages"),
    "prompt": _refused("use messages, or send texts to /v1/completions"),
    "input": _refused("use messages, or send items to /v1/responses"),
    "max_output_tokens": _refused("use max_completion_tokens"),
    "chat_template": _refused("the model's own template is used"),
    "echo": _only(False, reason="prepend the text of the last message to the response"),
}
COMPLETION: FieldRules = REQUEST | {
    "messages": _refused("send conversations to /v1/chat/completions"),
    "max_completion_tokens": _refused("use max_tokens"),
    "suffix": _only("", reason="the model cannot fill in the middle"),
    "best_of": _only(1, reason="use n"),
    "prompt_embeds": _refused("send text or token ids"),
}
RESPONSES: FieldRules = REQUEST | {
    **_ignored("max_tool_calls"),
    "messages": _refused("use input"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _refused("use max_output_tokens")),
    "response_format": _refused("use text.format"),
    "background": _only(False, reason=_STATELESS),
    "background_options": _only({}, reason=_STATELESS),
    "conversation": _refused(_STATELESS),
    "previous_response_id": _refused(_STATELESS),
    "previous_response": _refused(_STATELESS),
    "previous_input_messages": _only([], reason=_STATELESS),
    "prompt": _refused("no prompts are stored here; use instructions and input"),
    "context_management": _only([], reason='use truncation: "auto"'),
    "enable_response_messages": _only(False, reason="/tokenize gives the prompt's tokens"),
    "access_programs": _only([], reason="there are no access programs"),
    "image": _refused("the model generates no images"),
}
TOKENIZE: FieldRules = {
    "content": _refused("use prompt"),
    "with_pieces": _only(False, reason="use return_token_strs"),
    **_ignored("add_special_tokens"),
    "chat_template": CHAT["chat_template"],
    "mm_processor_kwargs": REQUEST["mm_processor_kwargs"],
    "media_io_kwargs": REQUEST["media_io_kwargs"],
}
TEMPLATE: FieldRules = {
    **_ignored("enable_thinking", "thinking", "thinking_budget", "preserve_thinking", "clear_thinking"),
    **_ignored("reasoning_effort"),
    "documents": CHAT["documents"],
    "tools": _refused("use tools of the request"),
}
PART: FieldRules = _ignored("cache_control", "prompt_cache_breakpoint")
FILE: FieldRules = PART | {"file_id": _refused("no files are stored here; send the data or a URL")}
MESSAGE: FieldRules = _ignored("name", "cache_control")
ASSISTANT: FieldRules = MESSAGE | {
    **_ignored("parsed", "reasoning", "reasoning_content", "reasoning_details", "thinking_blocks", "annotations"),
    **_ignored("provider_specific_fields", "phase"),
    "audio": _refused(_NO_AUDIO),
    "function_call": _refused(_TOOL_CALLS),
}
TOOL_CALL: FieldRules = _ignored("index", "cache_control", "provider_specific_fields", "extra_content")
"""A call's index in its stream, and fields that other providers expect back."""
CALLED_FUNCTION: FieldRules = _ignored("parsed_arguments", "provider_specific_fields")
TOOL: FieldRules = {**_ignored("cache_control"), "defer_loading": _only(False, reason="all tools are in the prompt")}
FLAT_TOOL: FieldRules = TOOL | {
    **_ignored("allowed_callers", "output_schema"),
    "async": _only(False, reason="a response ends with its calls"),
}
ITEM: FieldRules = {
    **_ignored("phase", "caller", "name", "async", "created_by", "parsed_arguments"),
    "namespace": _refused("tools have no namespaces"),
}
OUTPUT_TEXT: FieldRules = PART | _ignored("parsed")
REASONING: FieldRules = _ignored("context", "mode", "generate_summary")
TEXT: FieldRules = {"verbosity": CHAT["verbosity"]}
STREAM: FieldRules = {"include_obfuscation": _only(False, reason="events are not padded")}
LOAD_ADAPTER: FieldRules = {
    **_ignored("base_model_name"),
    "is_3d_lora_weight": _only(False, reason="adapters are in PEFT's format"),
}
UNLOAD_ADAPTER: FieldRules = _ignored("lora_int_id")

_REMOTE = "the server runs no tools; offer functions and run them yourself"
KINDS: dict[str, str] = {
    "item_reference": _STATELESS + " (clients do so with store: false)",
    **dict.fromkeys(("input_audio", "audio_url"), _NO_AUDIO),
    **dict.fromkeys(("image_embeds", "audio_embeds", "prompt_embeds"), "send media as URLs or data: URIs"),
    "custom": "use tools of the type function",
    **dict.fromkeys(("web_search", "web_search_preview", "file_search", "code_interpreter"), _REMOTE),
    **dict.fromkeys(
        ("image_generation", "computer_use_preview", "mcp", "local_shell", "shell", "apply_patch"), _REMOTE
    ),
}
"""Refused types of content, items and tools of OpenAI's and vLLM's interfaces, and why."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to an unknown one, if any is."""
    return next(iter(similar_names(name, known, cutoff=0.6)), None)
