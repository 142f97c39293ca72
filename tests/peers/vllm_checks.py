"""Checks of vLLM's server tests, as our own requests: routes, chats, sampling, log-probabilities, stopping."""

from __future__ import annotations

from typing import Any

from tests.peers import vllm_content_checks
from tests.peers.checks import GREETING, HELLO, Check, chat, completion, passes, refused


def entries(reply: Any) -> list[Any]:
    """Return the log-probabilities of a chat's tokens."""
    return reply.choices[0]["logprobs"]["content"]


CHECKS: tuple[Check, ...] = (
    # Routes
    passes("server", "health", ("/health", None), right=lambda r: True),
    passes("server", "version", ("/version", None), right=lambda r: bool(r.json["version"])),
    passes("server", "metrics for Prometheus", ("/metrics", None), right=lambda r: "# TYPE" in r.text),
    passes(
        "server",
        "list of models, with root and max_model_len",
        ("/v1/models", None),
        right=lambda r: r.json["data"][0]["root"] == r.json["data"][0]["id"] and r.json["data"][0]["max_model_len"] > 0,
    ),
    passes("server", "unknown model", chat(model="other"), right=lambda r: "other" in r.error["message"], status=404),
    passes(
        "server", "empty body", ("/v1/chat/completions", {}), right=lambda r: r.error["param"] == "messages", status=400
    ),
    refused("server", "embeddings", ("/v1/embeddings", {"input": "a"}), reason="makes no embeddings", status=404),
    refused("server", "scores and ranks", ("/rerank", {"query": "a"}), reason="makes no scores", status=404),
    refused("server", "speech", ("/v1/audio/transcriptions", {}), reason="has no audio input or output", status=404),
    refused("server", "sleep mode", ("/sleep", {}), reason="weights stay in memory", status=404),
    refused(
        "server",
        "SageMaker's routes",
        ("/invocations", {}),
        reason="use /v1/chat/completions or /v1/completions",
        status=404,
    ),
    # Chats
    passes(
        "chat", "one answer, with usage", chat(), right=lambda r: r.answer == GREETING and r.usage["total_tokens"] > 20
    ),
    passes(
        "chat",
        "content as a list of texts",
        chat([{"type": "text", "text": "Hello"}]),
        right=lambda r: r.answer == GREETING,
    ),
    passes(
        "chat",
        "several choices",
        completion(n=3, temperature=2, seed=1),
        right=lambda r: [choice["index"] for choice in r.choices] == [0, 1, 2] and len(set(r.answers)) > 1,
    ),
    passes(
        "chat",
        "max_completion_tokens",
        chat(max_tokens=None, max_completion_tokens=3),
        right=lambda r: r.finish == "length",
    ),
    passes("chat", "n below 1", chat(n=0), right=lambda r: r.error["param"] == "n", status=400),
    passes(
        "chat",
        "temperature below 0",
        chat(temperature=-1),
        right=lambda r: r.error["param"] == "temperature",
        status=400,
    ),
    passes("chat", "top_p above 1", chat(top_p=1.5), right=lambda r: r.error["param"] == "top_p", status=400),
    passes("chat", "no messages", chat(messages=[]), right=lambda r: r.error["param"] == "messages", status=400),
    passes(
        "chat",
        "unknown role",
        chat(messages=[{"role": "robot", "content": "a"}]),
        right=lambda r: "robot" in r.error["message"],
        status=400,
    ),
    passes(
        "chat",
        "a prompt that is too long",
        chat("x" * 5000),
        right=lambda r: r.error["code"] == "context_length_exceeded",
        status=400,
    ),
    passes(
        "chat",
        "continue_final_message",
        chat(
            messages=[*HELLO, {"role": "assistant", "content": "Hello!"}],
            add_generation_prompt=False,
            continue_final_message=True,
        ),
        right=lambda r: r.answer == GREETING.removeprefix("Hello!"),
    ),
    passes(
        "chat",
        "continue_final_message with add_generation_prompt",
        chat(add_generation_prompt=True, continue_final_message=True),
        right=lambda r: "add_generation_prompt" in r.error["message"],
        status=400,
    ),
    passes(
        "chat",
        "chat_template_kwargs",
        chat(chat_template_kwargs={"enable_thinking": False}),
        right=lambda r: r.answer == GREETING,
    ),
    refused(
        "chat",
        "chat_template of the request",
        chat(chat_template="{{ messages }}"),
        reason="the model's own template is used",
    ),
    refused("chat", "echo", chat(echo=True), reason="prepend the text of the last message to the response"),
    refused("chat", "documents for retrieval", chat(documents=[{"text": "a"}]), reason="put documents into messages"),
    passes("chat", "request_id", chat(request_id="mine"), right=lambda r: r.json["id"] == "chatcmpl-mine"),
    passes("chat", "unknown field", chat(max_token=3), right=lambda r: "max_tokens" in r.error["message"], status=400),
    # Streams
    passes("stream", "deltas add up to the answer", chat(stream=True), right=lambda r: r.answer == GREETING),
    passes(
        "stream",
        "the first delta has the role, the last the reason",
        chat(stream=True),
        right=lambda r: (
            r.events[0]["choices"][0]["delta"]["role"] == "assistant"
            and r.events[-1]["choices"][0]["finish_reason"] == "stop"
        ),
    ),
    passes(
        "stream",
        "include_usage: a last chunk without choices",
        chat(stream=True, stream_options={"include_usage": True}),
        right=lambda r: r.events[-1]["choices"] == [] and r.events[-1]["usage"]["total_tokens"] > 20,
    ),
    passes(
        "stream",
        "continuous_usage_stats: counts in every chunk, which grow",
        chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
        right=lambda r: (
            (counts := [event["usage"]["completion_tokens"] for event in r.events]) == sorted(counts)
            and counts[-1] > 10
        ),
    ),
    passes(
        "stream",
        "stream_options without stream",
        chat(stream_options={"include_usage": True}),
        right=lambda r: "stream" in r.error["message"],
        status=400,
    ),
    passes(
        "stream", "completions", completion(), completion(stream=True), right=lambda whole, r: r.answer == whole.answer
    ),
    # Completions
    passes("completions", "text", completion(), right=lambda r: r.answer != "" and r.usage["completion_tokens"] == 8),
    passes("completions", "several prompts", completion(["Hello", "What"]), right=lambda r: len(r.choices) == 2),
    passes(
        "completions",
        "several prompts with n",
        completion(["Hello", "What"], n=2, temperature=1, seed=0),
        right=lambda r: [choice["index"] for choice in r.choices] == [0, 1, 2, 3],
    ),
    passes("completions", "token ids", completion([43, 72, 79]), right=lambda r: r.usage["prompt_tokens"] == 3),
    passes(
        "completions", "lists of token ids", completion([[43], [72, 79]]), right=lambda r: r.usage["prompt_tokens"] == 3
    ),
    passes(
        "completions",
        "ids beyond the vocabulary",
        completion([999_999]),
        right=lambda r: r.error["param"] == "prompt",
        status=400,
    ),
    passes("completions", "no prompt", completion([]), right=lambda r: r.error["param"] == "prompt", status=400),
    passes(
        "completions", "echo", completion(echo=True), right=lambda r: r.answer.startswith("Hello") and len(r.answer) > 5
    ),
    passes(
        "completions",
        "echo with logprobs and max_tokens 0: the prompt's own",
        completion(echo=True, logprobs=1, max_tokens=0),
        right=lambda r: (
            r.answer == "Hello"
            and (scores := r.choices[0]["logprobs"]["token_logprobs"])[0] is None
            and all(score < 0 for score in scores[1:])
        ),
    ),
    refused("completions", "best_of", completion(best_of=3), reason="use n"),
    refused("completions", "suffix", completion(suffix="end"), reason="the model cannot fill in the middle"),
    refused("completions", "prompt_embeds", completion(prompt_embeds="AAAA"), reason="send text or token ids"),
    refused(
        "completions", "beam search", completion(use_beam_search=True, n=2), reason="there is no beam search; use n"
    ),
    refused("completions", "truncate_prompt_tokens", completion(truncate_prompt_tokens=2), reason="shorten the prompt"),
    # Log-probabilities
    passes(
        "logprobs",
        "chats, with the most likely tokens",
        chat(logprobs=True, top_logprobs=3),
        right=lambda r: all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in entries(r)),
    ),
    passes(
        "logprobs",
        "top_logprobs 0",
        chat(logprobs=True, top_logprobs=0),
        right=lambda r: entries(r)[0]["top_logprobs"] == [],
    ),
    passes("logprobs", "not requested", chat(), right=lambda r: r.choices[0]["logprobs"] is None),
    passes(
        "logprobs",
        "too many",
        chat(logprobs=True, top_logprobs=99),
        right=lambda r: r.error["param"] == "top_logprobs",
        status=400,
    ),
    passes(
        "logprobs",
        "top_logprobs alone",
        chat(top_logprobs=2),
        right=lambda r: "logprobs" in r.error["message"],
        status=400,
    ),
    passes(
        "logprobs",
        "streamed log-probabilities equal the whole answer's",
        chat(logprobs=True),
        chat(logprobs=True, stream=True),
        right=lambda whole, parts: (
            [one["token"] for one in entries(whole)]
            == [
                one["token"]
                for event in parts.events
                for one in ((event["choices"][0].get("logprobs") or {}).get("content") or ())
            ]
        ),
    ),
    passes(
        "logprobs",
        "completions",
        completion(logprobs=2),
        right=lambda r: len(r.choices[0]["logprobs"]["tokens"]) == 8 == len(r.choices[0]["logprobs"]["text_offset"]),
    ),
    passes(
        "logprobs",
        "prompt_logprobs",
        completion(prompt_logprobs=1),
        right=lambda r: (
            (scores := r.choices[0]["prompt_logprobs"])[0] is None and len(scores) == r.usage["prompt_tokens"]
        ),
    ),
    passes(
        "logprobs",
        "prompt_logprobs in a stream",
        completion(prompt_logprobs=1, stream=True),
        right=lambda r: "prompt_logprobs" in r.error["message"],
        status=400,
    ),
    passes(
        "logprobs",
        "return_token_ids",
        chat(return_token_ids=True),
        right=lambda r: (
            len(r.choices[0]["token_ids"]) == r.usage["completion_tokens"]
            and len(r.json["prompt_token_ids"]) == r.usage["prompt_tokens"]
        ),
    ),
    refused(
        "logprobs",
        "return_tokens_as_token_ids",
        completion(return_tokens_as_token_ids=True),
        reason="use return_token_ids",
    ),
    # Sampling and stopping
    passes(
        "sampling",
        "the same seed gives the same answer",
        completion(seed=7, temperature=2),
        completion(seed=7, temperature=2),
        completion(seed=8, temperature=2),
        right=lambda one, same, other: one.answer == same.answer != other.answer,
    ),
    passes("sampling", "top_k 1 is greedy", chat(temperature=1, top_k=1), right=lambda r: r.answer == GREETING),
    passes("sampling", "min_p 1 is greedy", chat(temperature=1, min_p=1), right=lambda r: r.answer == GREETING),
    passes(
        "sampling",
        "repetition, presence and frequency penalties",
        completion("aaaa", repetition_penalty=2, presence_penalty=2, frequency_penalty=2),
        right=lambda r: len(set(r.answer)) == 8,
    ),
    passes(
        "sampling",
        "penalty out of range",
        chat(presence_penalty=3),
        right=lambda r: r.error["param"] == "presence_penalty",
        status=400,
    ),
    passes(
        "sampling",
        "logit_bias forces a token",
        completion(logit_bias={"43": 100}),
        right=lambda r: len(set(r.answer)) == 1,
    ),
    passes(
        "sampling",
        "logit_bias of an id beyond the vocabulary",
        chat(logit_bias={"999999": 1}),
        right=lambda r: r.error["param"] == "logit_bias",
        status=400,
    ),
    refused("sampling", "allowed_token_ids", chat(allowed_token_ids=[43]), reason="use logit_bias, or a schema"),
    refused("sampling", "bad_words", chat(bad_words=["a"]), reason="use logit_bias"),
    refused("sampling", "priority", chat(priority=1), reason="requests are scheduled in the order of their arrival"),
    passes(
        "stop",
        "stop text is cut off",
        chat(stop="Show"),
        right=lambda r: (r.answer, r.finish) == ("Hello! ", "stop"),
    ),
    passes("stop", "the first of several", chat(stop=["picture", "me"]), right=lambda r: r.answer == "Hello! Show "),
    passes(
        "stop",
        "include_stop_str_in_output",
        chat(stop="Show", include_stop_str_in_output=True),
        right=lambda r: r.answer == "Hello! Show",
    ),
    passes("stop", "in a stream", chat(stop="Show", stream=True), right=lambda r: r.answer == "Hello! "),
    passes("stop", "min_tokens", chat(min_tokens=31), right=lambda r: r.usage["completion_tokens"] >= 31),
    passes("stop", "ignore_eos", chat(ignore_eos=True), right=lambda r: r.usage["completion_tokens"] == 32),
    passes(
        "stop",
        "stop_token_ids",
        chat(return_token_ids=True),
        chat(stop_token_ids=[43], logit_bias={"43": 100}),
        right=lambda _, r: (r.finish, r.usage["completion_tokens"]) == ("stop", 1),
    ),
    passes(
        "stop",
        "stop_token_ids beyond the vocabulary",
        chat(stop_token_ids=[999_999]),
        right=lambda r: r.error["param"] == "stop_token_ids",
        status=400,
    ),
    passes(
        "stop",
        "min_tokens above max_tokens",
        chat(min_tokens=33),
        right=lambda r: r.error["param"] == "min_tokens",
        status=400,
    ),
    *vllm_content_checks.CHECKS,
)
