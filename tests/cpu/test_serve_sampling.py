"""vLLM's sampling fields over HTTP: when answers end, what their text holds, token ids."""

from __future__ import annotations

import json

import pytest
from serving import engine, running, straight

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def ask(live, path: str = "/v1/chat/completions", **fields):
    """The first choice, greedy, and the whole answer."""
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    response = live.post(path, **{**prompt, "temperature": 0, "max_tokens": 24, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0], response.json()


def events(live, path: str, **fields) -> list[dict]:
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    body = {**prompt, "temperature": 0, "max_tokens": 24, "stream": True, **fields}
    with live.http.stream("POST", path, json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_min_tokens_and_stop_tokens_decide_when_an_answer_ends(live):
    free = straight(HELLO)
    assert free.finish_reason == "stop", "nano ends this answer itself"
    length = len(free.token_ids)
    choice, answer = ask(live, min_tokens=length + 5, max_tokens=length + 20)
    assert answer["usage"]["completion_tokens"] >= length + 5
    assert "<|" not in choice["message"]["content"]
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    cut, answer = ask(live, stop_token_ids=[stop], ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == first + 1 and cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == engine().engine.processor.tokenizer.decode(free.token_ids[:first])


def test_texts_hold_stop_texts_and_special_tokens_where_asked_for(live):
    text = straight(HELLO).text
    kept, _ = ask(live, stop=text[2:5], include_stop_str_in_output=True)
    assert kept["message"]["content"] == text[: text.index(text[2:5]) + 3]
    end = {"logit_bias": {"2": 100}, "skip_special_tokens": False, "include_stop_str_in_output": True}
    tokenizer = engine().engine.processor.tokenizer
    assert ask(live, **end)[0]["message"]["content"] == tokenizer.decode([2]) != ""
    assert ask(live, "/v1/completions", **end)[0]["text"] == tokenizer.decode([2])
    spelled, _ = ask(live, logprobs=True, **end)
    assert [one["token"] for one in spelled["logprobs"]["content"]] == [tokenizer.decode([2])]


def test_a_top_p_of_zero_is_greedy(live):
    assert ask(live, top_p=0, temperature=2)[0]["message"]["content"] == straight(HELLO, max_tokens=24).text
    assert ask(live, top_k=-1)[0]["message"]["content"] == straight(HELLO, max_tokens=24).text


def test_token_ids_come_with_answers_where_asked_for(live):
    free = straight(HELLO, max_tokens=24)
    expected = list(free.token_ids)
    processor = engine().engine.processor
    prompt = processor.prepare(HELLO).ids
    choice, answer = ask(live, return_token_ids=True)
    assert choice["token_ids"] == expected and answer["prompt_token_ids"] == prompt
    chunks = events(live, "/v1/chat/completions", return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == expected
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == free.text
    for wanted in (None, False):
        choice, answer = ask(live, return_token_ids=wanted)
        assert "token_ids" not in choice and "prompt_token_ids" not in answer

    both = {"prompt": ["hello", "good day"], "return_token_ids": True, "n": 2, "max_tokens": 5}
    choices = ask(live, "/v1/completions", **both)[1]["choices"]
    prompts = [processor.tokenizer.encode(text) for text in ("hello", "hello", "good day", "good day")]
    assert [choice["prompt_token_ids"] for choice in choices] == prompts
    streamed: list[dict] = [{"token_ids": [], "text": ""} for _ in choices]
    for chunk in events(live, "/v1/completions", **both):
        one = chunk["choices"][0]
        told = streamed[one["index"]]
        told.setdefault("prompt_token_ids", one["prompt_token_ids"])
        told["token_ids"] += one["token_ids"]
        told["text"] += one["text"]
    for choice, told in zip(choices, streamed, strict=True):
        assert told == {name: choice[name] for name in ("token_ids", "text", "prompt_token_ids")}
        assert len(told["token_ids"]) == 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; expected at most max_tokens, which is 8"),
        ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens is 1; expected 0"),
        ({"stop_token_ids": [99_999]}, "stop_token_ids names token 99999"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"skip_special_tokens": "yes"}, "skip_special_tokens"),
        ({"top_k": -2}, "top_k"),
    ],
)
def test_what_cannot_be_followed_is_refused(live, fields, says):
    response = live.post("/v1/chat/completions", messages=HELLO, **fields)
    assert response.status_code == 400 and says in response.json()["error"]["message"]
