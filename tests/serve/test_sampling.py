"""vLLM's sampling fields over HTTP: stopping, text, token ids."""

from __future__ import annotations

import json

import pytest
import torch

from aria import AriaForConditionalGeneration, SamplingParams
from aria.engine.generation import default_temperature
from aria.serve.service import Service
from aria.serve.settings import ServerSettings
from tests.helpers.serving import engine, running, straight

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


def ask(live, path: str = "/v1/chat/completions", **fields):
    """The first choice, greedy, and the whole response."""
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


def test_stop_texts_and_special_tokens_are_kept_on_request(live):
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


def test_token_ids_are_returned_on_request(live):
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
        reported = streamed[one["index"]]
        reported.setdefault("prompt_token_ids", one["prompt_token_ids"])
        reported["token_ids"] += one["token_ids"]
        reported["text"] += one["text"]
    for choice, reported in zip(choices, streamed, strict=True):
        assert reported == {name: choice[name] for name in ("token_ids", "text", "prompt_token_ids")}
        assert len(reported["token_ids"]) == 5


def plain(ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, by one plain forward pass, of shape ``(P, V)``."""
    with torch.no_grad():
        return AriaForConditionalGeneration(engine().engine.model)(torch.tensor([ids])).logits[0].log_softmax(-1)


PROMPTS = ["the red circle", "the red circle is to the left of the blue square", "hello"]


@pytest.mark.parametrize("as_ids", [True, False], ids=["ids", "texts"])
def test_requests_of_lm_eval_are_answered(live, as_ids):
    tokenizer = engine().engine.processor.tokenizer
    rows = [tokenizer.encode(text) for text in PROMPTS]
    fields = {"prompt": rows if as_ids else PROMPTS, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = ask(live, "/v1/completions", **fields)[1]["choices"]
    for text, ids, choice in zip(PROMPTS, rows, choices, strict=True):
        reported, expected = choice["logprobs"], plain(ids)
        assert choice["text"].startswith(text)
        # The prompt and exactly one more token.
        assert (
            len(reported["tokens"]) == len(reported["token_logprobs"]) == len(reported["top_logprobs"]) == len(ids) + 1
        )
        assert reported["token_logprobs"][0] is reported["top_logprobs"][0] is None
        assert reported["tokens"][:-1] == [tokenizer.decode([token]) for token in ids]
        assert reported["text_offset"] == [sum(map(len, reported["tokens"][:i])) for i in range(len(ids) + 1)]
        for place, token in enumerate(ids[1:]):
            value = reported["token_logprobs"][place + 1]
            assert value == pytest.approx(float(expected[place, token]), abs=1e-4)
            assert (value == max(reported["top_logprobs"][place + 1].values())) == (
                int(expected[place].argmax()) == token
            )
    # An empty response has the end token.
    ended = ask(live, "/v1/completions", **fields, logit_bias={"2": 100})[1]["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in ended] == [len(ids) + 1 for ids in rows]
    assert [choice["text"] for choice in ended] == PROMPTS


def test_the_prompt_alone_can_be_scored(live):
    tokenizer = engine().engine.processor.tokenizer
    ids = tokenizer.encode(PROMPTS[1])
    fields = {"prompt": PROMPTS[1], "max_tokens": 0, "logprobs": 2, "echo": True, "return_token_ids": True}
    choice, answer = ask(live, "/v1/completions", **fields)
    assert choice["text"] == PROMPTS[1] and choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == ids and choice["token_ids"] == []
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} <= {2, 3}
    choice, _ = ask(live, "/v1/completions", prompt=PROMPTS[1], max_tokens=0)
    assert choice["text"] == "" and choice["logprobs"] is None
    choice, _ = ask(live, "/v1/completions", prompt=ids, max_tokens=3, echo=True)
    assert choice["text"].startswith(PROMPTS[1]) and choice["logprobs"] is None


def test_echo_is_streamed(live):
    fields = {"prompt": PROMPTS[:2], "max_tokens": 4, "logprobs": 1, "echo": True, "n": 2}
    choices = ask(live, "/v1/completions", **fields)[1]["choices"]
    streamed = [{"text": "", "logprobs": {name: [] for name in choices[0]["logprobs"]}} for _ in choices]
    for chunk in events(live, "/v1/completions", **fields):
        one = chunk["choices"][0]
        streamed[one["index"]]["text"] += one["text"]
        for name, values in one["logprobs"].items():
            streamed[one["index"]]["logprobs"][name] += values
    for choice, reported in zip(choices, streamed, strict=True):
        assert reported["text"] == choice["text"]
        for name in ("tokens", "text_offset"):
            assert reported["logprobs"][name] == choice["logprobs"][name]
        pairs = zip(reported["logprobs"]["token_logprobs"], choice["logprobs"]["token_logprobs"], strict=True)
        assert all(a is b is None or a == pytest.approx(b, abs=1e-4) for a, b in pairs)


def test_prompt_logprobs_are_in_vllms_format(live):
    tokenizer = engine().engine.processor.tokenizer
    chat = engine().engine.processor.prepare(HELLO).ids
    choice, answer = ask(live, max_tokens=2, prompt_logprobs=1)
    text, _ = ask(live, "/v1/completions", prompt=PROMPTS[0], max_tokens=2, prompt_logprobs=0)
    assert text["logprobs"] is None and "prompt_logprobs" not in choice
    for ids, reported, k in (
        (chat, answer["prompt_logprobs"], 1),
        (tokenizer.encode(PROMPTS[0]), text["prompt_logprobs"], 0),
    ):
        expected = plain(ids)
        assert reported[0] is None and len(reported) == len(ids)
        for place, (token, entry) in enumerate(zip(ids[1:], reported[1:], strict=True)):
            own = entry[str(token)]
            assert own["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-4)
            assert own["rank"] == int((expected[place] > expected[place, token]).sum()) + 1
            assert own["decoded_token"] == tokenizer.decode([token])
            likeliest = {str(int(i)) for i in expected[place].topk(k).indices}
            assert entry.keys() == {str(token)} | likeliest
    assert "prompt_logprobs" not in ask(live, max_tokens=2, prompt_logprobs=None)[1]


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
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs requires stream: false"),
    ],
)
def test_impossible_sampling_options_are_refused(live, fields, says):
    response = live.post("/v1/chat/completions", messages=HELLO, **fields)
    assert response.status_code == 400 and says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "file", "temperature"),
    [
        (None, {"do_sample": False}, 0.0),
        (None, {"do_sample": False, "temperature": 0.7}, 0.0),
        (None, {"temperature": 0.7}, 0.7),
        (None, {}, 1.0),
        (0.3, {"do_sample": False}, 0.3),
        (0.0, {"temperature": 0.7}, 0.0),
    ],
)
def test_the_default_temperature_is_the_models(given, file, temperature, monkeypatch):
    monkeypatch.setattr(engine().engine, "generation_config", file)
    service = Service(engine(), ServerSettings(temperature=given))
    assert service.defaults.temperature == temperature
    service.close()


def test_nano_is_greedy_by_default():
    assert default_temperature(engine().engine.generation_config) == SamplingParams().temperature == 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_handle_characters_of_several_tokens(live, stream):
    """Each token's offset is the start of its character in the text, including the echoed prompt."""
    prompt = "x\u0436\u4e00y"
    tokenizer = engine().engine.processor.tokenizer
    reported: list[int] = []
    text = ""
    fields = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    if stream:
        for chunk in live.openai.completions.create(model="aria-nano", stream=True, **fields):
            text += chunk.choices[0].text
            reported += chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else []
    else:
        choice = ask(live, "/v1/completions", **fields)[1]["choices"][0]
        text, reported = choice["text"], choice["logprobs"]["text_offset"]
    data = [tokenizer.token_bytes(token) for token in tokenizer.encode(prompt)]
    expected = [len(b"".join(data[:i]).decode(errors="ignore")) for i in range(len(data))]
    assert max(map(len, data)) == 1 and len(data) == 7
    assert (text, reported) == (prompt, expected)
