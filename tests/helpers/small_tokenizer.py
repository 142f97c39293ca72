"""A small, quickly trained SentencePiece vocabulary whose first ids are Aria's (the real one is not shipped)."""

import functools
import io
import random

import sentencepiece

SPECIAL = [
    *("<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|img|>"),
    *(f"<|reserved{i:03}|>" for i in range(8, -1, -1)),
]
ADDED = [
    *SPECIAL,
    *"0123456789",
    *"０１２３４５６７８９",
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
    *(f"<mark{i}>" for i in range(43, 105)),
    "<mark4",  # a prefix of others: the longest has to win
    *("```", "\b", "\r", "\n"),
]
"""Ids 0 to 109, as in Aria (43 to 105 under other names)."""

_WORDS = (
    "the quick brown fox jumps over a lazy dog what is shown in this image answer questions please describe it . ? ! "
    "system user assistant im start end < | > _ : hello world picture says red circle and blue square naïve 世界 Привет"
)


@functools.cache
def model(
    *,
    model_type: str = "bpe",
    controls: bool = False,
    byte_fallback: bool = True,
    dummy_prefix: bool = False,
    normalization: str = "identity",
) -> bytes:
    """Train a ``tokenizer.model``; with ``controls``, ids 3 to 18 are control pieces, not user-defined ones."""
    rng = random.Random(0)
    words = _WORDS.split()
    lines = (
        " ".join(rng.choices(words, k=10)) + rng.choice(["", "?", ".<|im_end|>", "<|im_start|>"]) for _ in range(2000)
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=out,
        model_type=model_type,
        vocab_size=560 if model_type == "bpe" else 150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=byte_fallback and model_type == "bpe",
        normalization_rule_name=normalization,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=dummy_prefix,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        control_symbols=SPECIAL[3:] if controls else [],
        user_defined_symbols=ADDED[len(SPECIAL) :] if controls else ADDED[3:],
        minloglevel=2,
    )
    return out.getvalue()


def config(**changes: object) -> dict[str, object]:
    """Return a ``tokenizer_config.json`` like rhymes-ai/Aria's: every added token is listed."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {str(i): {"content": token, **flags, "special": token in SPECIAL} for i, token in enumerate(ADDED)}
    return {"added_tokens_decoder": listed, "bos_token": None, "eos_token": None, "unk_token": "<unk>",
            "pad_token": "<|endoftext|>", "image_token": "<|img|>", **changes}  # fmt: skip


ONLY_UNK = {"added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}, "pad_token": None}
"""As in the other published repositories: only ``<unk>`` is listed, and there is no padding token."""
