"""Convert data sets of other formats to JSON Lines with messages, as documented in docs/data.md.

    python examples/convert.py old.json train.jsonl

Takes ShareGPT and LLaVA (``conversations``), Alpaca (``instruction``, ``input``, ``output``), pairs of columns such as
``prompt`` and ``completion``, messages with ``<image>`` and ``<video>`` in their texts (ms-swift, LLaMA-Factory), and
text; in .json, .jsonl, .csv, .tsv, .txt or .md files. Relative media paths are relative to the new file. A row of
another format stops the conversion, and nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROLES = {
    **dict.fromkeys(("human", "Human", "User"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "Assistant"), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response"), "tool"),
}
CALLS = ("function_call", "tool_call")
"""Roles of messages that contain a function call as JSON."""
PAIRS = (
    *(("instruction", "output"), ("instruction", "response"), ("query", "response"), ("prompt", "completion")),
    *(("prompt", "response"), ("question", "answer"), ("input", "output")),
)


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a file."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix in (".txt", ".md"):
        return [{"text": text}]
    if file.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ","))
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(whole, dict) and known(whole) is None:
        # Such as {"version": 1, "data": [...]}.
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else whole
    return whole if isinstance(whole, list) else [whole]


def known(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the fields that identify a row's format, or None for an unknown format."""
    formats = (("conversations",), ("messages",), *PAIRS, ("text",))
    return next((names for names in formats if all(row.get(name) is not None for name in names)), None)


def convert(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row to messages; a row of text is returned unchanged.

    Raises:
        ValueError: The format is unknown.
    """
    names = known(row)
    if names is None:
        raise ValueError(f"its fields are {', '.join(row) or 'none'}; this format is unknown")
    if names == ("text",):
        return dict(row)
    if len(names) == 1:
        messages = [message(one) for one in row[names[0]]]
    else:
        asked = "\n\n".join(text for text in dict.fromkeys((row[names[0]], row.get("input"))) if text)
        turns = [*(row.get("history") or ()), (asked, row[names[1]])]
        said = [one for question, answer in turns for one in (("user", question), ("assistant", answer))]
        messages = [{"role": role, "content": parts(text)} for role, text in said]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": parts(row["system"])})
    media = {"images": row.get("images") or row.get("image"), "videos": row.get("videos") or row.get("video")}
    listed = {name: given if isinstance(given, list) else [given] for name, given in media.items() if given}
    return {"messages": messages, **listed, **({"tools": tools(row["tools"])} if row.get("tools") else {})}


def message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a message to OpenAI's roles; other fields are kept."""
    role, content = (given["role"], given.get("content")) if "role" in given else (given["from"], given["value"])
    others = {name: value for name, value in given.items() if name not in ("role", "content", "from", "value")}
    if role in CALLS:
        calls = json.loads(content) if isinstance(content, str) else content
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", "content": "", "tool_calls": calls, **others}
    return {"role": ROLES.get(role, role), "content": parts(content), **others}


def tools(given: Any) -> list[Any]:
    """Convert tools to OpenAI's format from a list or its JSON, with or without the ``function`` wrapper."""
    listed = json.loads(given) if isinstance(given, str) else given
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]


def parts(content: Any) -> Any:
    """Turn ``<image>`` and ``<video>`` in a text into parts; the media are listed beside the messages."""
    if not isinstance(content, str) or not re.search("<image>|<video>", content):
        return content
    pieces = enumerate(re.split("<(image|video)>", content))
    found = [{"type": piece} if i % 2 else {"type": "text", "text": piece.strip("\n")} for i, piece in pieces]
    return [part for part in found if part.get("text") != ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="a .jsonl file")
    chosen = parser.parse_args()
    rows = []
    for number, row in enumerate(read(chosen.source), 1):
        try:
            rows.append(convert(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            parser.exit(1, f"error: row {number} of {chosen.source} cannot be converted: {error!s:.300}\n")
    chosen.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows written to {chosen.out}; check them with: aria data check {chosen.out}")


if __name__ == "__main__":
    main()
