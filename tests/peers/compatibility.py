"""The tables of docs/compatibility.md as data.

``python -m tests.peers.compatibility`` writes them into the page; a test compares the page with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.peers import llamacpp_checks, vllm_checks
from tests.peers.checks import Check

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PINS = ROOT / "tests" / "clients"

CHECKS = ("chat", "stream", "image", "tools", "structured", "errors", "usage")


@dataclass(frozen=True)
class Client:
    """A client that tests/clients runs against the server."""

    name: str
    script: str
    """File in tests/clients/scripts."""
    packages: tuple[str, ...]
    """Packages whose pinned versions are tested."""
    note: str = ""
    """Notes for users of the client."""
    lacks: tuple[str, ...] = ()
    """Checks that the client does not support."""
    more: tuple[str, ...] = ()
    """Checks of this client alone."""

    @property
    def fast(self) -> bool:
        """Whether CI runs it."""
        return self.script.endswith(".mjs") or all(package in _pins("fast.txt") for package in self.packages)

    @property
    def checks(self) -> tuple[str, ...]:
        """Checks that its script reports."""
        return tuple(check for check in CHECKS if check not in self.lacks) + self.more


CLIENTS = (
    Client(
        "openai (Python)",
        "openai_python.py",
        ("openai",),
        "chat completions, completions and responses, with `parse` and the events of `stream`",
    ),
    Client("openai (Node.js)", "openai_node.mjs", ("openai",), "`parse`, `stream`, and Zod's schemas"),
    Client(
        "LangChain",
        "langchain_client.py",
        ("langchain-openai",),
        "`ChatOpenAI`, also with `use_responses_api`; a prompt that is too long raises `ContextOverflowError`",
    ),
    Client(
        "instructor",
        "instructor_client.py",
        ("instructor",),
        "the modes `TOOLS`, `TOOLS_STRICT` and `JSON_SCHEMA`. `JSON` asks for any JSON and describes the schema "
        "in the prompt: following it is up to the model, and nano is too small for it",
    ),
    Client(
        "llm",
        "llm_client.py",
        ("llm",),
        "in `extra-openai-models.yaml`, with `api_key_name`, `vision`, `supports_schema` and `supports_tools`",
    ),
    Client(
        "LiteLLM",
        "litellm_client.py",
        ("litellm",),
        "the providers `openai`, `hosted_vllm` and `litellm_proxy`, also `responses` and `text_completion`; a "
        "prompt that is too long raises `ContextWindowExceededError`",
    ),
    Client(
        "LiteLLM's proxy",
        "litellm_proxy.py",
        ("litellm", "anthropic"),
        "OpenAI's client, and Anthropic's through `/v1/messages`: by responses (`openai/`) and by chats "
        "(`hosted_vllm/`)",
    ),
    Client(
        "pydantic-ai",
        "pydantic_ai_client.py",
        ("pydantic-ai-slim",),
        "`OpenAIChatModel` and `OpenAIResponsesModel`, with `ToolOutput` and `NativeOutput`",
    ),
    Client(
        "LlamaIndex",
        "llamaindex_client.py",
        ("llama-index-llms-openai-like",),
        "`OpenAILike` with `is_chat_model=True` and, for tools, `is_function_calling_model=True`",
    ),
    Client(
        "openai-agents",
        "openai_agents.py",
        ("openai-agents",),
        "`OpenAIChatCompletionsModel` and `OpenAIResponsesModel`; conversations as lists, as the server stores none",
    ),
    Client(
        "lm-eval",
        "lm_eval_client.py",
        ("lm_eval",),
        "`local-completions`, with loglikelihood, its rolling form and `generate_until`, and `local-chat-completions`; "
        "it loads the server's tokenizer from `/tokenizer_info` (give it a key as `auth_token`)",
        lacks=("stream", "image", "tools", "structured", "usage"),
        more=("loglikelihood", "rolling", "generate_until"),
    ),
    Client(
        "Vercel's ai",
        "ai_sdk.mjs",
        ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai"),
        "`createOpenAICompatible` needs `supportsStructuredOutputs: true` and `includeUsage: true`; "
        "`createOpenAI` needs `providerOptions: {openai: {store: false}}` for conversations, as the server stores none",
    ),
)


def _pins(name: str) -> dict[str, str]:
    """Return versions by package of a requirements file and of those it includes."""
    pins = {}
    for line in (PINS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            pins |= _pins(line.removeprefix("-r "))
        elif found := re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==(\S+)", line):
            pins[found[1]] = found[2]
    return pins


def version(client: Client) -> str:
    """Return the tested version, such as ``2.54.0``."""
    npm = json.loads((PINS / "package.json").read_text(encoding="utf-8"))["dependencies"]
    pins = npm if client.script.endswith(".mjs") else _pins("all.txt")
    first, *others = client.packages
    return ", ".join([pins[first], *(f"{package} {pins[package]}" for package in others)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def clients_table() -> str:
    """Format a row per client."""
    rows = [
        [
            client.name,
            version(client),
            *("–" if check in client.lacks else "yes" for check in CHECKS),
            "yes" if client.fast else "",
            client.note,
        ]
        for client in CLIENTS
    ]
    return _table(["client", "version", *CHECKS, "in CI", "note"], rows)


def checks_table(checks: Sequence[Check]) -> str:
    """Format a row per area."""
    rows = []
    for area in dict.fromkeys(check.area for check in checks):
        mine = [check for check in checks if check.area == area]
        rows.append(
            [
                area,
                "; ".join(check.what for check in mine if not check.refused),
                "; ".join(f"{check.what} ({check.refused})" for check in mine if check.refused),
            ]
        )
    return _table(["area", "passes", "refused by design, and the error message"], rows)


TABLES = {
    "clients": clients_table,
    "vllm": lambda: checks_table(vllm_checks.CHECKS),
    "llama.cpp": lambda: checks_table(llamacpp_checks.CHECKS),
}


def rendered(page: str) -> str:
    """Return the page with its tables replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{PAGE} has no marks for {name}; expected {begin.strip()} ... {end}")
        page = f"{before}{begin}{table()}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
