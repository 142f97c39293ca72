"""``/tokenize`` and ``/detokenize`` as in vLLM, with the token count of each medium."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from PIL import Image

from aria.processor.image_inputs import Prepared
from aria.serve import generation_request
from aria.serve.errors import ApiError
from aria.serve.media_progress import TaskWithProgress
from aria.serve.protocol import DetokenizeRequest, TokenizeRequest
from aria.serve.request_context import RequestContext
from aria.serve.response_models import Detokenized, MediaCost, TokenizerInfo, Tokens
from aria.serve.service import Service
from aria.serve.streaming import DONE, EventStream, event

PREVIEW_SIDE = 320
"""Maximum length of a preview's longer side, in pixels."""


async def count(service: Service, body: TokenizeRequest, context: RequestContext) -> Tokens:
    """Tokenize a prompt, even one that leaves no room for a response.

    Raises:
        ApiError: 400, invalid messages or media.
    """
    processor, defaults = service.processor, service.defaults
    media: list[MediaCost] = []
    if body.messages is None:
        text = body.prompt or ""

        def encode() -> list[int]:
            service.check_length(text)
            ids: list[int] = processor.tokenizer.encode(text)
            return ids

        ids = await service.off_loop(encode, param="prompt")
    else:
        messages = body.messages

        def read() -> tuple[list[dict[str, Any]], dict[str, Any]]:
            offered = generation_request.read_tools(body.tools, None, None).offered
            return generation_request.messages(messages, offered, defaults.sizes), generation_request.template(
                body, defaults
            )

        converted, template = await service.read(read)

        def prepare() -> tuple[list[int], list[MediaCost]]:
            service.check_length(converted)
            prepared = processor.prepare(service.named(converted, context), **template)
            return prepared.ids, _costs(prepared, previews=bool(body.return_previews))

        service.check_media(shown := generation_request.count_media(converted), "messages")
        ids, media = await service.off_loop(prepare, media=shown > 0, param="messages")
    named = processor.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=defaults.max_model_len, tokens=ids, token_strs=named, media=media)


async def stream(service: Service, body: TokenizeRequest, context: RequestContext) -> EventStream:
    """The same as events: progress while media are read, then the result of :func:`count`.

    Raises:
        ApiError: As :func:`count`, for errors before any progress.
    """
    reading = TaskWithProgress(count(service, body, context))
    await reading.begin()

    async def events() -> AsyncGenerator[bytes, None]:
        async for progress in reading.progress():
            yield event({"progress": progress._asdict()})
        yield event((await reading.result()).model_dump(mode="json", exclude_none=True))
        yield DONE

    return EventStream(events(), reading.aclose)


def _costs(prepared: Prepared, *, previews: bool) -> list[MediaCost]:
    costs, images = [], iter(prepared.images)
    for one in prepared.media:
        own = [next(images) for _ in range(one.count)]
        costs.append(
            MediaCost(
                kind=one.kind,
                count=one.count,
                crops=one.crops,
                tokens=one.tokens,
                total=one.total,
                preview=_preview(own[0].data.pages[0]) if previews else None,
            )
        )
    return costs


def _preview(rgb: np.ndarray) -> str:
    image = Image.fromarray(rgb)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


async def text(service: Service, body: DetokenizeRequest) -> Detokenized:
    """Decode tokens to text.

    Raises:
        ApiError: 400, a token is outside of the vocabulary.
    """
    tokenizer = service.processor.tokenizer
    if outside := [token for token in body.tokens if token >= tokenizer.vocab_size]:
        raise ApiError(400, f"token {outside[0]} is not in the vocabulary of {tokenizer.vocab_size}", param="tokens")
    converted = await service.off_loop(lambda: tokenizer.decode(body.tokens), param="tokens")
    return Detokenized(prompt=converted)


def info(service: Service) -> TokenizerInfo:
    """The tokenizer's special tokens, and the chat template."""
    tokenizer = service.processor.tokenizer
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        bos_token=None,  # prompts do not begin with one
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=str(service.processor.chat_template),
        model_max_length=service.defaults.max_model_len,
    )
