"""``/tokenize`` and ``/detokenize``, as vLLM has them, and what each medium of a conversation costs."""

from __future__ import annotations

from aria.processor.pictures import Prepared
from aria.serve import bodies
from aria.serve.errors import ApiError
from aria.serve.exchange import Exchange
from aria.serve.protocol import DetokenizeRequest, TokenizeRequest
from aria.serve.replies import Detokenized, MediaCost, Tokens
from aria.serve.service import Service


async def count(service: Service, body: TokenizeRequest, exchange: Exchange) -> Tokens:
    """Tokens of a prompt, also of one that leaves no room for an answer.

    Raises:
        ApiError: 400, the messages or their media are not what was expected.
    """
    processor, defaults = service.processor, service.defaults
    media: list[MediaCost] = []
    if body.messages is None:
        text = body.prompt or ""

        def encode() -> list[int]:
            service.check_length(text)
            return processor.tokenizer.encode(text)

        ids = await service.off_loop(encode, param="prompt")
    else:
        offered = bodies.read_tools(body.tools, None, None).told
        said = bodies.messages(body.messages, offered, defaults.sizes)
        template = bodies.template(body, defaults)

        def prepare() -> Prepared:
            service.check_length(said)
            return processor.prepare(service.named(said, exchange), **template)

        prepared = await service.off_loop(prepare, media=bodies.has_media(said), param="messages")
        ids, media = prepared.ids, _costs(prepared)
    named = processor.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=defaults.max_model_len, tokens=ids, token_strs=named, media=media)


def _costs(prepared: Prepared) -> list[MediaCost]:
    return [MediaCost(kind=one.kind, count=one.pictures, crops=one.crops, tokens=one.tokens) for one in prepared.media]


async def text(service: Service, body: DetokenizeRequest) -> Detokenized:
    """The text of tokens.

    Raises:
        ApiError: 400, a token that the vocabulary does not have.
    """
    tokenizer = service.processor.tokenizer
    if outside := [token for token in body.tokens if token >= tokenizer.vocab_size]:
        raise ApiError(400, f"token {outside[0]} is not in the vocabulary of {tokenizer.vocab_size}", param="tokens")
    said = await service.off_loop(lambda: tokenizer.decode(body.tokens), param="tokens")
    return Detokenized(prompt=said)
