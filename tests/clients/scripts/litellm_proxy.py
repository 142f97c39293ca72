"""LiteLLM's proxy before the server: OpenAI's client, and Anthropic's through ``/v1/messages``."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import anthropic
import httpx
import openai
from check import (
    BASE_URL,
    CIRCLE,
    GREETING,
    KEY,
    MODEL,
    READ,
    SHAPES,
    THANKS,
    TOO_LONG,
    WELCOME,
    WORD,
    base64_of,
    equal,
    raises,
    report,
)

HELLO = [{"role": "user", "content": "Hello"}]
# Anthropic's requests become responses for OpenAI, and chat completions for others.
PROVIDERS = {MODEL: "openai", "by-chats": "hosted_vllm"}
PROXY_KEY = "sk-proxy"
STARTING_SECONDS = 300
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"]}
PAINT = {"name": "paint", "description": "Report a colour.", "input_schema": SCHEMA}


@contextmanager
def running():
    """Run the proxy until the block ends; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"{provider}/{MODEL}", "api_base": BASE_URL, "api_key": KEY},
            }
            for name, provider in PROVIDERS.items()
        ],
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": PROXY_KEY},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-c", "import litellm; litellm.run_server()", "--config", str(path)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        proxy = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/health/liveliness", proxy)
            yield address
        finally:
            proxy.terminate()
            proxy.wait()


def wait_for(url, process):
    end = time.monotonic() + STARTING_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the proxy did not start")


def about(picture, question):
    source = {"type": "base64", "media_type": "image/png", "data": base64_of(picture)}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": question}]}]


def ask(messages=HELLO, model=MODEL, **fields):
    return claude.messages.create(model=model, messages=messages, max_tokens=64, **fields)


def chat():
    equal(client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content, GREETING)
    for model in PROVIDERS:
        answer = ask(model=model)
        equal((answer.content[0].text, answer.stop_reason), (GREETING, "end_turn"))
        again = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": THANKS}]
        equal(ask(again, model=model, system="You are kind.").content[0].text, WELCOME)


def stream():
    chunks = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), GREETING)
    for model in PROVIDERS:
        with claude.messages.stream(model=model, messages=HELLO, max_tokens=64) as events:
            equal("".join(events.text_stream), GREETING)


def image():
    for model in PROVIDERS:
        equal(ask(about(WORD, READ), model=model).content[0].text, "Welcome")


def tools():
    for model in PROVIDERS:
        answer = ask(about(SHAPES, CIRCLE), model=model, tools=[PAINT], tool_choice={"type": "any"})
        [call] = [block for block in answer.content if block.type == "tool_use"]
        equal((call.name, call.input, answer.stop_reason), ("paint", {"colour": "red"}, "tool_use"))
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Noted."}
        again = [*about(SHAPES, CIRCLE), {"role": "assistant", "content": answer.content}]
        again += [{"role": "user", "content": [result, {"type": "text", "text": THANKS}]}]
        equal(ask(again, model=model, tools=[PAINT]).content[0].text, WELCOME)


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA}}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=form)
    assert json.loads(answer.choices[0].message.content)["colour"] in SCHEMA["properties"]["colour"]["enum"]


def errors():
    long = [{"role": "user", "content": TOO_LONG}]
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=long))
    assert "maximum context length" in str(error), error
    error = raises(anthropic.BadRequestError, lambda: ask(long))
    assert "maximum context length" in str(error), error


def usage():
    counted = ask().usage
    assert counted.input_tokens > 5 and counted.output_tokens > 5, counted
    *_, last = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    # Anthropic counts cached tokens separately.
    read = counted.input_tokens + (counted.cache_read_input_tokens or 0)
    equal(last.usage.total_tokens, read + counted.output_tokens)


with running() as address:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=PROXY_KEY, max_retries=0)
    claude = anthropic.Anthropic(base_url=address, api_key=PROXY_KEY, max_retries=0)
    report(chat, stream, image, tools, structured, errors, usage)
