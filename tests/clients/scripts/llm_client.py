"""The command `llm`, with the server as one of its OpenAI-compatible models."""

import json
import os
import tempfile
from pathlib import Path

import click.testing
from check import BASE_URL, CIRCLE, GREETING, KEY, MODEL, READ, SHAPES, THANKS, TOO_LONG, WELCOME, WORD, equal, report

MODELS = f"""
- model_id: nano
  model_name: {MODEL}
  api_base: {BASE_URL}
  api_key_name: nano
  vision: true
  supports_schema: true
  supports_tools: true
"""


def llm(*arguments):
    from llm.cli import cli  # reads the paths of its files at import

    return click.testing.CliRunner().invoke(cli, [str(one) for one in arguments])


def ask(*arguments):
    done = llm("-m", "nano", "--key", KEY, *arguments)
    equal((done.exit_code, done.stderr), (0, ""))
    return done.stdout.strip()


def chat():
    equal(ask("Hello", "--no-stream"), GREETING)
    equal(ask("-c", THANKS, "--no-stream"), WELCOME)


def stream():
    equal(ask("Hello"), GREETING)


def image():
    equal(ask(READ, "-a", WORD), "Welcome")


def tools():
    # The model decides whether to call; tools and answer have to be passed on.
    equal(ask(THANKS, "-T", "llm_version", "-T", "llm_time"), WELCOME)


def structured():
    schema = {"properties": {"colour": {"type": "string", "enum": ["red", "blue"]}}, "required": ["colour"]}
    answer = ask(CIRCLE, "-a", SHAPES, "--schema", json.dumps(schema | {"type": "object"}))
    equal(json.loads(answer), {"colour": "red"})


def errors():
    done = llm("-m", "nano", "--key", KEY, TOO_LONG)
    assert done.exit_code == 1 and "context length" in done.stderr, done
    done = llm("-m", "nano", "--key", "wrong", "Hello")
    assert done.exit_code == 1 and "401" in done.stderr, done


def usage():
    ask("Hello", "--no-stream")
    [entry] = json.loads(llm("logs", "-n", "1", "--json").stdout)
    assert entry["input_tokens"] > 5 and entry["output_tokens"] > 5, entry


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    (Path(folder) / "extra-openai-models.yaml").write_text(MODELS, encoding="utf-8")
    report(chat, stream, image, tools, structured, errors, usage)
