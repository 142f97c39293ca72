"""`AriaTokenizer`: SentencePiece as used by the authors: added tokens first, no BOS token, no added spaces."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from aria.hub import read_bytes, read_json, read_text, resolve, write_file, write_json
from aria.processor.batch import BatchFeature, check_tensor_kind, to_tensors
from aria.processor.chat import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    MARKERS,
    SPECIAL_TOKENS,
    Conversation,
    Prompt,
    is_batch,
)
from aria.processor.files import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG, TOKENIZER_MODEL
from aria.processor.spelling import MarkerSpeller
from aria.processor.template import render_template
from aria.workers import Workers

# Listed in some published files with ids beyond the embedding, and unused: they are never encoded.
_PLACEHOLDERS = frozenset({"<s>", "</s>", "<pad>"})
_MAX_MODEL_BYTES, _MAX_TEMPLATE_BYTES = 64 << 20, 1 << 20
_SPACE = "\u2581"  # the space symbol of SentencePiece
# Appended to a SentencePiece model, this protobuf fragment is merged into its normalizer_spec (field 3):
# add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) become false, so that decoding restores the text.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class AriaTokenizer:
    """Converts text to ids and back, with the interface of a transformers tokenizer.

    Added tokens (``<|img|>``, ``<fim_prefix>``, newline, digits, ...) are split off first, longest match first, and
    SentencePiece encodes the text in between. Nothing is prepended or appended, white space is kept, and
    ``decode(encode(text)) == text`` if the vocabulary has byte pieces or contains every character.
    """

    padding_side = "left"  # for generation; set to "right" for training
    image_token = IMAGE_TOKEN

    def __init__(self, model: bytes, config: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            model: The bytes of ``tokenizer.model``.
            config: The object in ``tokenizer_config.json``; None: defaults for Aria's vocabulary.

        Raises:
            ValueError: The two do not match, or the vocabulary has no ``<|img|>``.
        """
        self._model = bytes(model)
        self._config = dict(config or {})
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model + _KEEP_SPACES)
        except RuntimeError as error:
            raise ValueError(f"{TOKENIZER_MODEL} is not a SentencePiece model: {error}") from None
        self.vocab_size = len(self._pieces)
        self._read_added_tokens()
        self._pattern = _compile(self._added)
        for key in ("pad_token", "eos_token"):
            _content(self._config, key)
        if self._config.get("image_token", IMAGE_TOKEN) not in (None, IMAGE_TOKEN):
            raise ValueError(f"image_token is {self._config['image_token']!r}, but Aria's is {IMAGE_TOKEN!r}")
        if IMAGE_TOKEN not in self._added:
            raise ValueError(
                f"the vocabulary has no {IMAGE_TOKEN}, which stands for an image; this is not Aria's tokenizer"
            )
        self.image_token_id = self._added[IMAGE_TOKEN]
        self.chat_template = _default_template(self._config.get("chat_template"))

    def _read_added_tokens(self) -> None:
        listed = self._config.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict) or not all(
            isinstance(token, dict) and isinstance(token.get("content"), str) and key.isdigit()
            for key, token in listed.items()
        ):
            raise ValueError(
                f"{TOKENIZER_CONFIG}: added_tokens_decoder should map ids to objects with content; it is {listed!r:.80}"
            )
        added: dict[str, int] = {}
        special: set[str] = set()
        for key, token in listed.items():
            content, index = token["content"], int(key)
            if index >= self.vocab_size and content in _PLACEHOLDERS:
                continue
            if index >= self.vocab_size or self._pieces.id_to_piece(index) != content:
                has = repr(self._pieces.id_to_piece(index)) if index < self.vocab_size else "no such id"
                raise ValueError(
                    f"{TOKENIZER_CONFIG} says that id {index} is {content!r}, but {TOKENIZER_MODEL} has {has}; "
                    "the two files do not match"
                )
            added[content] = index
            if token.get("special"):
                special.add(content)
        controls = [self._pieces.id_to_piece(i) for i in range(self.vocab_size) if self._pieces.is_control(i)]
        for content in (*SPECIAL_TOKENS, *controls):
            index = self._pieces.piece_to_id(content)
            if content not in added and self._pieces.id_to_piece(index) == content:
                added[content] = index
                special.add(content)
        self._added = added
        self._special = frozenset(added[content] for content in special)

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | os.PathLike[str] | None = None, *, revision: str | None = None
    ) -> AriaTokenizer:
        """Read ``tokenizer.model`` and ``tokenizer_config.json`` of a folder, a Hub repository, or (None) of nano.

        Raises:
            FileNotFoundError: No such folder or repository, or it has no ``tokenizer.model``.
            ValueError: The files are damaged or do not match.
        """
        patterns = [TOKENIZER_MODEL, TOKENIZER_CONFIG, CHAT_TEMPLATE_FILE]
        folder = resolve(path_or_repo_id, revision=revision, allow_patterns=patterns)
        if not (folder / TOKENIZER_MODEL).is_file():
            raise FileNotFoundError(f"{folder} has no {TOKENIZER_MODEL}; copy it from the base model")
        config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        if (folder / CHAT_TEMPLATE_FILE).is_file():
            config["chat_template"] = read_text(folder / CHAT_TEMPLATE_FILE, _MAX_TEMPLATE_BYTES)
        return cls(read_bytes(folder / TOKENIZER_MODEL, _MAX_MODEL_BYTES), config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.model``, ``tokenizer_config.json`` and the chat template.

        transformers' LlamaTokenizer can read them and gives the same ids, because ``add_prefix_space`` is written as
        false. With true, as in the published files, it inserts a space before the text and after every added token.
        """
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        tokens = sorted(self._added.items(), key=lambda item: item[1])
        config = {
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 10**30,
            "spaces_between_special_tokens": False,
            **self._config,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": content, **flags, "special": i in self._special} for content, i in tokens
            },
            "bos_token": None,
            "eos_token": None,
            "unk_token": self._pieces.id_to_piece(self._pieces.unk_id()),
            "pad_token": self.pad_token,
            "image_token": IMAGE_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
            "chat_template": self.chat_template,
            "tokenizer_class": "LlamaTokenizer",
            "processor_class": "AriaProcessor",
        }
        write_json(Path(folder) / TOKENIZER_CONFIG, config)
        write_file(Path(folder) / TOKENIZER_MODEL, self._model)
        # transformers 5 looks for the template of a processor only in this file.
        write_file(Path(folder) / CHAT_TEMPLATE_FILE, str(self.chat_template))

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        """Ids omitted by ``skip_special_tokens``; 0 to 18 in Aria."""
        return sorted(self._special)

    @property
    def unk_token_id(self) -> int:
        return self._pieces.unk_id()

    @cached_property
    def pad_token_id(self) -> int:
        """The id of ``pad_token`` of the config; ``<unk>`` if it is null, as in the authors' code."""
        token = _content(self._config, "pad_token")
        return self.unk_token_id if token is None else self._known_or(token, self.unk_token_id)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The id of ``eos_token`` of the config, otherwise of ``<|endoftext|>``; None if the vocabulary has neither."""
        fallback = self._known_or("<|endoftext|>", None)
        token = _content(self._config, "eos_token")
        index: int | None = fallback if token is None else self._known_or(token, fallback)
        return index

    @property
    def unk_token(self) -> str:
        return self._pieces.id_to_piece(self.unk_token_id)

    @property
    def pad_token(self) -> str:
        return self._pieces.id_to_piece(self.pad_token_id)

    @property
    def eos_token(self) -> str | None:
        return None if self.eos_token_id is None else self._pieces.id_to_piece(self.eos_token_id)

    def _known_or(self, token: str, default: Any) -> Any:
        index = self._pieces.piece_to_id(token)
        return index if self._pieces.id_to_piece(index) == token else default

    def encode(self, text: str, *, add_special_tokens: bool | None = None, return_tensors: str | None = None) -> Any:
        """Encode a text as a list of ids, or as (1, S).

        For a plain string the ids are those of transformers: every marker is a control token. In a
        :class:`~aria.processor.chat.Prompt`, only markers written by the template are; a marker in other text is
        encoded as different pieces that decode to the same text.

        Args:
            text: The text.
            add_special_tokens: No effect: Aria's tokenizer adds none.
            return_tensors: None, "pt" or "np".

        Raises:
            ValueError: Text that cannot be encoded, or (only in a vocabulary of single characters without byte pieces)
                a marker as text.
        """
        first, *rest = self.encode_segments(text)
        for segment in rest:
            first += [self.image_token_id, *segment]
        return first if return_tensors is None else to_tensors([first], return_tensors)

    def encode_segments(self, text: str) -> list[list[int]]:
        """Encode the text around the image slots: one list more than there are slots, without image ids."""
        if not isinstance(text, str):
            raise ValueError(f"text should be a string, but is a {type(text).__name__}")
        return [self._speller.encode(segment) for segment in Prompt.of(text).segments()]

    @cached_property
    def _speller(self) -> MarkerSpeller:
        special = (content for content, index in self._added.items() if index in self._special)
        markers = sorted({*MARKERS, *special}, key=lambda marker: (-len(marker), marker))
        return MarkerSpeller(
            self._encode_part, self.token_bytes, self._bytes, self._pieces.normalize, markers, self._special
        )

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()])
            ids.append(self._added[match[0]])
            start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text contains {text[error.start]!r}, a lone surrogate, which is not a character"
            ) from None
        if _SPACE not in text or self._space_bytes is None:
            ids: list[int] = self._pieces.encode(text)
            return ids
        # SentencePiece would decode this character as a space.
        first: list[int]
        first, *rest = (self._pieces.encode(part) for part in text.split(_SPACE))
        for part in rest:
            first += [*self._space_bytes, *part]
        return first

    @cached_property
    def _space_bytes(self) -> list[int] | None:
        return self._bytes(_SPACE.encode())

    def _bytes(self, data: bytes) -> list[int] | None:
        """Ids of byte pieces, or None if the vocabulary has none."""
        ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in data]
        return ids if all(self._pieces.is_byte(i) for i in ids) else None

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        """The UTF-8 bytes that each id contributes to decoded text."""
        added = set(self._added.values())
        table = []
        for i, piece in enumerate(self._pieces.id_to_piece(list(range(self.vocab_size)))):
            if i in added:
                table.append(piece.encode())
            elif piece.startswith("<0x") and self._pieces.is_byte(i):
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace(_SPACE, " ").encode())
        return table

    def token_bytes(self, index: int, *, skip_special_tokens: bool = False) -> bytes:
        """The UTF-8 bytes that an id contributes to decoded text, possibly only a part of a character."""
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"id {index} is not in the vocabulary of {self.vocab_size}")
        return b"" if skip_special_tokens and index in self._special else self._vocabulary[index]

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Decode ids (a one-dimensional list, array or tensor, or one id). Invalid UTF-8 becomes U+FFFD.

        ``clean_up_tokenization_spaces=True`` would change the text and is rejected; it is off in Aria's configuration.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True is not supported: it would change the text; omit it")
        data = b"".join(self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in _flat(ids))
        return data.decode("utf-8", errors="replace")

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Decode several sequences, such as the rows of a (B, S) tensor."""
        return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in sequences]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Convert an id to its piece, or several ids to a list of pieces."""
        if isinstance(ids, int):
            self.token_bytes(ids)  # rejects ids that are not in the vocabulary
            return self._pieces.id_to_piece(ids)
        return [self.convert_ids_to_tokens(i) for i in _flat(ids)]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Convert a piece to its id (that of ``<unk>`` if unknown), or several pieces to a list of ids."""
        if isinstance(tokens, str):
            return self._pieces.piece_to_id(tokens)
        return [self._pieces.piece_to_id(token) for token in tokens]

    def tokenize(self, text: str) -> list[str]:
        """Split a text into pieces."""
        return list(self.convert_ids_to_tokens(self.encode(text)))

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Make ``input_ids`` and ``attention_mask`` of one text or several.

        Args:
            text: A text or a list. A single text with ``return_tensors=None`` gives flat lists, otherwise ``(B, S)``.
            padding: True or "longest", "max_length", or False.
            padding_side: "left" or "right"; None: the tokenizer's.
            truncation: Truncate on the right to ``max_length``.
            max_length: For truncation and ``padding="max_length"``.
            add_special_tokens: No effect, see :meth:`encode`.
            return_tensors: "pt", "np" or None.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(one) for one in texts]
        check_length(padding, truncation, max_length)
        if truncation:
            rows = [row[:max_length] for row in rows]
        batch = self.pad(
            rows, padding=padding, padding_side=padding_side, max_length=max_length, return_tensors=return_tensors
        )
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({name: value[0] for name, value in batch.items()})
        return batch

    def pad(
        self,
        rows: Sequence[Sequence[int]],
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pad rows of ids to ``input_ids`` and ``attention_mask`` (0 for padding), (B, S).

        ``padding_side`` None means that of the tokenizer.
        """
        side = self.padding_side if padding_side is None else padding_side
        check_tensor_kind(return_tensors)
        check_length(padding, False, max_length)
        longest = max(map(len, rows), default=0)
        width = 0 if padding is False else longest
        if padding == "max_length":
            assert max_length is not None, "checked by check_length"
            if longest > max_length:
                raise ValueError(
                    f"a prompt of {longest} tokens exceeds max_length={max_length}; truncate it or raise max_length"
                )
            width = max_length
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}; use 'left' or 'right'")
        ids, mask = [], []
        for row in rows:
            gap = max(width - len(row), 0)
            before, after = (gap, 0) if side == "left" else (0, gap)
            ids.append([self.pad_token_id] * before + list(row) + [self.pad_token_id] * after)
            mask.append([0] * before + [1] * len(row) + [0] * after)
        return BatchFeature(
            {"input_ids": to_tensors(ids, return_tensors), "attention_mask": to_tensors(mask, return_tensors)}
        )

    def render(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        workers: Workers | None = None,
    ) -> Any:
        """Render a conversation (or a list of them) to a :class:`~aria.processor.chat.Prompt` (or a list of them).

        Args:
            conversation: See :func:`aria.processor.chat.render`.
            chat_template: A Jinja template; None: the tokenizer's.

        The other arguments are those of :func:`aria.processor.template.render_template`.

        Raises:
            ValueError: An invalid message, or a template that cannot be rendered.
        """
        template = self.chat_template if chat_template is None else chat_template
        names = ("unk_token", "eos_token", "pad_token", "image_token")
        constants = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        settings: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "variables": variables,
            "constants": constants,
            "workers": workers,
        }
        if is_batch(conversation):
            return [render_template(template, messages, **settings) for messages in conversation]
        return render_template(template, conversation, **settings)

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        sanitize_control_tokens: bool | None = None,
        tokenize: bool = True,
        padding: bool | str = False,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Render messages to text (``tokenize=False``), inputs, or ids (``return_dict=False``). An image is one id.

        The arguments are those of :meth:`render` and of calling the tokenizer. Markers in messages are always text, so
        ``sanitize_control_tokens`` can only be True. For the behaviour of transformers without it, use ``str(prompt)``.
        """
        check_sanitized(sanitize_control_tokens)
        prompt = self.render(
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        if not tokenize:
            return prompt
        inputs = self(
            prompt,
            padding=padding,
            padding_side=padding_side,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        return inputs if return_dict else inputs["input_ids"]


class TextStream:
    """Incremental decoder: never returns part of a character, and in total gives the same text as ``decode``."""

    def __init__(self, tokenizer: AriaTokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """Decode the next id; returns the text that it completes, empty within a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(index), skip_special_tokens=self._skip))

    def flush(self) -> str:
        """Return the rest at the end (U+FFFD for an incomplete character) and reset the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def check_length(padding: bool | str, truncation: bool, max_length: int | None) -> None:
    """Reject settings of padding and truncation that contradict each other or have no effect."""
    if padding not in (True, False, "longest", "max_length"):
        raise ValueError(f"padding={padding!r} is not known; use True, False, 'longest' or 'max_length'")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length should be at least 1, but is {max_length}")
    if max_length is None and (truncation or padding == "max_length"):
        raise ValueError("truncation and padding='max_length' need max_length; the tokenizer has no default")


def check_sanitized(sanitize_control_tokens: bool | None) -> None:
    """Reject ``sanitize_control_tokens=False``."""
    if sanitize_control_tokens is False:
        raise ValueError(
            "sanitize_control_tokens=False is not supported: markers in messages are always text; use str(prompt) to "
            "encode them as control tokens"
        )


def _compile(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the leftmost, then longest token. Grouping by first character makes it several times faster."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[0], []).append(token[1:])
    branches = []
    for first, tails in groups.items():
        longest_first = "|".join(re.escape(tail) for tail in sorted(tails, key=len, reverse=True))
        branches.append(f"{re.escape(first)}(?:{longest_first})")
    return re.compile("|".join(branches))


def _content(config: Mapping[str, Any], key: str) -> str | None:
    """Read a token of the config: null, a string, or an object with ``content``."""
    token = config.get(key)
    content = token.get("content") if isinstance(token, Mapping) else token
    if token is not None and not isinstance(content, str):
        raise ValueError(f"{TOKENIZER_CONFIG}: {key} should be a token's text or null, but is {token!r:.80}")
    return content


def _default_template(given: Any) -> str:
    """The chat template of the config; if there are several, the one named "default"."""
    if isinstance(given, list) and all(isinstance(one, Mapping) for one in given):
        given = {one.get("name"): one.get("template") for one in given}.get("default")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{TOKENIZER_CONFIG}: chat_template should be a Jinja template, but is {given!r:.80}")
    return given or CHAT_TEMPLATE


def _flat(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    values = [values] if isinstance(values, int) else list(values)
    if any(not hasattr(i, "__index__") for i in values):
        raise ValueError("ids should be a one-dimensional list of integers; for several sequences use batch_decode")
    return [int(i) for i in values]
