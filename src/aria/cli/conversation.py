"""Conversations at the terminal: messages, their media, and slash commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from aria.cli.options import err, out

if TYPE_CHECKING:
    from aria.engine import Engine, SamplingParams
    from aria.processor import AriaProcessor

HELP = """\
/image FILE      show an image with the next question (also an http(s) URL)
/video FILE      show a video
/document FILE   show a PDF
/system [TEXT]   show or change the system prompt; - removes it
/set [NAME VALUE]  show or change sampling options, such as: /set temperature 0.7
/regenerate      replace the last answer by a new one
/save FILE       write the conversation: .json with all messages, otherwise Markdown
/reset           start a new conversation
/help            this list
/quit            exit (also Ctrl-D)

Multiple lines: enclose them in \"\"\", or press Alt-Enter. Ctrl-C stops an answer."""

KINDS = ("image", "video", "document")
_COMMANDS = frozenset(re.findall(r"^/(\w+)", HELP, re.MULTILINE))
_ADDRESS = re.compile(r"[a-z]+://|data:", re.IGNORECASE)
_FENCE = '"""'
_REGENERATE_TEMPERATURE = 0.7
"""Temperature of /regenerate after a greedy answer, which would otherwise repeat itself."""


class ChatSession:
    """The messages of a conversation, and the media of the next question.

    Args:
        system: System prompt, if any.
        settings: Options of media by kind, such as ``{"video": {"num_frames": 8}}``.
        params: Sampling parameters.
        adapter: Name of the adapter to use, if any.
    """

    def __init__(
        self,
        system: str | None,
        settings: dict[str, dict[str, Any]],
        params: SamplingParams,
        adapter: str | None = None,
    ):
        self.system, self.params = system, params
        self._settings, self._adapter = settings, adapter
        self._saved: set[Path] = set()
        self.reset()

    def reset(self) -> None:
        """Clear the messages; the system prompt and the sampling options stay."""
        self.messages: list[dict[str, Any]] = []
        self._media: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def show(self, kind: str, source: str, processor: AriaProcessor) -> str:
        """Add a medium to the next question. It is read now, to refuse an invalid one at once.

        Images are kept as they are now; video and document files are read again for each question.

        Returns:
            Its cost, such as ``8 frames, 512 tokens``.

        Raises:
            FileNotFoundError, ValueError: It cannot be read as this kind.
        """
        from aria.media.open import open_media
        from aria.processor import load_image

        media = processor.media
        medium = load_image(source, media) if kind == "image" else open_media(source, kind, media).data
        part = {"type": kind, kind: medium, **self._settings.get(kind, {})}
        [cost] = processor.prepare([{"role": "user", "content": [part]}]).media
        self._media.append(part)
        self._names[id(part)] = source
        count = {"video": _plural(cost.count, "frame"), "document": _plural(cost.count, "page")}.get(kind)
        return ", ".join(text for text in (count, _plural(cost.tokens, "token")) if text)

    def ask(self, engine: Engine, question: str) -> Iterable[str]:
        """Stream the answer. If that fails or is interrupted, the messages stay as they were.

        The media of a failed question are dropped, since they would make the next one fail as well.
        """
        asked = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        self._media = []
        yield from self._answer(engine, asked, self.params)

    def again(self, engine: Engine) -> Iterable[str]:
        """Stream another answer to the last question, to replace the first.

        Raises:
            ValueError: There is no question.
        """
        if not self.messages:
            raise ValueError("there is no question yet")
        asked = self.messages[-2]
        # Greedy and seeded answers would repeat themselves.
        warm = replace(self.params, temperature=self.params.temperature or _REGENERATE_TEMPERATURE, seed=None)
        before, self.messages = self.messages, self.messages[:-2]
        try:
            yield from self._answer(engine, asked, warm)
        finally:
            if not self.messages or self.messages[-2] is not asked:
                self.messages = before

    def _answer(self, engine: Engine, asked: dict[str, Any], params: SamplingParams) -> Iterable[str]:
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = ""
        for piece in engine.stream([*start, *self.messages, asked], params, adapter=self._adapter):
            answer += piece
            yield piece
        self.messages += [asked, {"role": "assistant", "content": answer}]

    def set(self, name: str, value: str) -> None:
        """Change a sampling option.

        Raises:
            ValueError: Unknown option or invalid value.
        """
        known = [field.name for field in fields(self.params) if field.name not in ("n", "json_schema", "logit_bias")]
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(f"unknown sampling option {name}; known are {', '.join(known)}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = {"none": None, "true": True, "false": False}.get(value.lower(), value)
        self.params = replace(self.params, **{name: parsed})

    def options(self) -> str:
        """The sampling options that differ from their defaults, or ``defaults``."""
        changed = [
            f"{field.name} {getattr(self.params, field.name)}"
            for field in fields(self.params)
            if field.name not in ("n", "json_schema") and getattr(self.params, field.name) != field.default
        ]
        return ", ".join(changed) or "defaults"

    def save(self, file: Path) -> None:
        """Write the conversation to a file, with the names of its media.

        Raises:
            ValueError: The file exists and was not written by this conversation.
            OSError: It cannot be written.
        """
        from aria.hub import write_file

        file = file.expanduser()
        if file.exists() and file.resolve() not in self._saved:
            raise ValueError(f"{file} exists; name a new file")
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [self._named(message) for message in [*start, *self.messages]]
        if file.suffix.lower() == ".json":
            text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(_markdown(message) for message in messages)
        write_file(file, text)
        self._saved.add(file.resolve())

    def _named(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message["content"], str):
            return message
        parts = [
            part if part["type"] == "text" else {**part, part["type"]: self._names[id(part)]}
            for part in message["content"]
        ]
        return {**message, "content": parts}


def talk(engine: Engine, conversation: ChatSession) -> None:
    """Read questions and commands from the terminal, until /quit or end of input."""
    read = _reader()
    while True:
        try:
            line = _lines(read).strip()
        except KeyboardInterrupt:
            err.print("[dim](/quit or Ctrl-D to exit)[/dim]")
            continue
        except EOFError:
            err.print()
            return
        if not line:
            continue
        try:
            if _is_command(line):
                if not _command(engine, conversation, line):
                    return
            else:
                say(conversation.ask(engine, line))
        except KeyboardInterrupt:
            err.print("\n[dim]stopped[/dim]")
        except (ValueError, OSError) as error:
            err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)


def say(pieces: Iterable[str]) -> None:
    """Print an answer as it arrives."""
    for piece in pieces:
        out.file.write(piece)
        out.file.flush()
    out.file.write("\n")


def _is_command(line: str) -> bool:
    """Whether a line is a command, known or mistyped, rather than a question that begins with a path."""
    if not line.startswith("/") or "\n" in line:
        return False
    word = line.split()[0]
    # Known commands first: on macOS /system is also the folder /System.
    return word[1:].lower() in _COMMANDS or word == "/" or not _is_file(word)


def _command(engine: Engine, conversation: ChatSession, line: str) -> bool:
    """Run a slash command; returns whether the conversation continues."""
    name, rest = [*line[1:].split(None, 1), "", ""][:2]
    name = name.lower()
    if name in ("quit", "exit", "bye", "q"):
        return False
    if name in ("help", "?", "h"):
        err.print(f"[dim]{escape(HELP)}[/dim]")
    elif name in ("reset", "new", "clear"):
        conversation.reset()
        err.print("[dim]new conversation[/dim]")
    elif name in KINDS:
        if not rest:
            raise ValueError(f"which {name}? /{name} FILE")
        for source in split_paths(rest):
            cost = conversation.show(name, source, engine.processor)
            err.print(f"[dim]{escape(source)} comes with the next question ({cost})[/dim]", soft_wrap=True)
    elif name == "system":
        if rest:
            conversation.system = None if rest == "-" else rest
        err.print(f"[dim]system prompt: {escape(conversation.system or 'none')}[/dim]")
    elif name == "set":
        if rest:
            conversation.set(*_two(rest))
        err.print(f"[dim]sampling: {escape(conversation.options())}[/dim]")
    elif name in ("regenerate", "retry"):
        say(conversation.again(engine))
    elif name == "save":
        if not rest:
            raise ValueError("which file? /save FILE")
        [file] = split_paths(rest)[:1]
        conversation.save(Path(file))
        err.print(f"[dim]saved to {escape(file)}[/dim]", soft_wrap=True)
    else:
        err.print(escape(f"unknown command /{name}; /help lists them"))
    return True


def _two(rest: str) -> tuple[str, str]:
    name, _, value = rest.partition(" ")
    if not value.strip():
        raise ValueError(f"{name} needs a value, such as: /set temperature 0.7")
    return name, value.strip()


def split_paths(text: str) -> list[str]:
    """Split paths and URLs that were typed, pasted or dropped.

    If the whole text is the name of an existing file, that is the only path. Otherwise it is split as in a shell, with
    quotes and backslashes. ``file://`` URLs become paths.
    """
    if _is_file(text):
        return [text]
    try:
        # On Windows backslashes separate folders.
        parts = shlex.split(text, posix=True) if sys.platform != "win32" else [text.strip("\"'")]
    except ValueError:  # an unmatched quote, such as an apostrophe in a name
        return [text]
    parts = [_from_address(part) for part in parts]
    if not any(_is_file(part) or _ADDRESS.match(part) for part in parts) and (len(parts) > 1 or "\\" in text):
        return [text.strip("\"'")]  # no existing file, and maybe a Windows path: errors should show it as typed
    return parts


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _from_address(text: str) -> str:
    if not text.lower().startswith("file:/"):
        return text
    return urllib.request.url2pathname(urllib.parse.urlsplit(text).path)


def _lines(read: Callable[[str], str]) -> str:
    """Read one entry: a line, or all lines between triple quotes."""
    line = read("> ")
    if not line.lstrip().startswith(_FENCE):
        return line
    text = line.lstrip()[len(_FENCE) :]
    while _FENCE not in text:
        text += "\n" + read(". ")
    return text.partition(_FENCE)[0].strip("\n")


def _reader() -> Callable[[str], str]:
    """A function that reads a line: with editing and history at a terminal, plain otherwise."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=_history(), key_bindings=keys)
    return session.prompt


def _history() -> Any:
    """History of earlier sessions, readable by the user only; in memory if it cannot be stored."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = Path(typer.get_app_dir("aria")) / "chat-history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def _markdown(message: dict[str, Any]) -> str:
    content: str | Sequence[dict[str, Any]] = message["content"]
    if not isinstance(content, str):
        content = "\n\n".join(
            part["text"] if part["type"] == "text" else f"![{part['type']}]({part[part['type']]})" for part in content
        )
    return f"## {message['role'].capitalize()}\n\n{content}\n"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
