"""Write nano's tokenizer and processor files: letters as tokens, Aria's special tokens at Aria's first ids.

Run as ``python -m recipes.nano.text.tokenizer [FOLDER]``; the folder defaults to the packaged ``src/aria/nano``.
"""

import argparse
import io
import json
from functools import cache
from pathlib import Path

import sentencepiece as spm

from aria.processor import CHAT_TEMPLATE, AriaImageProcessor, AriaProcessor, AriaTokenizer

NANO_FOLDER = Path(__file__).resolve().parents[3] / "src" / "aria" / "nano"

IMAGE_TOKEN = "<|img|>"
SPECIAL_TOKENS = (
    ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>", "[INST]", "[/INST]", "<<SYS>>"]
    + ["<</SYS>>", IMAGE_TOKEN]
    + [f"<|reserved{n:03}|>" for n in range(8, -1, -1)]
)
# Not special (decoding keeps them), as in Aria. There the turn markers are ordinary text of several pieces; here each
# is one piece, which saves a letter-level model a third of its tokens. The text of a chat is the same.
ADDED_TOKENS = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "\n", "<|im_start|>", "<|im_end|>"]
# Printable ASCII, typographic characters and letters of European names; everything else falls back to bytes. All 424
# pieces are a multiple of 8, so the embedding has no unused rows.
LETTERS = " " + "".join(map(chr, range(33, 127))) + "‘’“”–—…•·×÷°€£¥§äöüßàâçéèêëîïôùûñáíóúåæøÄÖÜÉÅØ¿¡"
IMAGE_TOKEN_ID = SPECIAL_TOKENS.index(IMAGE_TOKEN)
PAD_TOKEN_ID = SPECIAL_TOKENS.index("<|endoftext|>")

# The sizes and queries of the config: 224 px = 256 patches -> 64 queries, 448 px = 1024 patches -> 128 queries.
QUERIES = {224: 64, 448: 128}


@cache
def model_bytes() -> bytes:
    """Return the serialized SentencePiece model of type char: specials, added tokens, 256 bytes, then ``LETTERS``.

    No dummy prefix, no normalisation, white space kept: encoding and decoding returns the same text.
    """
    out = io.BytesIO()
    # The trainer sorts letters by frequency, so descending counts fix their order.
    corpus = [letter * (len(LETTERS) - n + 1) for n, letter in enumerate(LETTERS)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="char",
        vocab_size=len(SPECIAL_TOKENS) + len(ADDED_TOKENS) + 256 + len(LETTERS),
        character_coverage=1.0,
        user_defined_symbols=SPECIAL_TOKENS[3:] + ADDED_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece=SPECIAL_TOKENS[0],
        bos_piece=SPECIAL_TOKENS[1],
        eos_piece=SPECIAL_TOKENS[2],
        minloglevel=2,
    )
    return out.getvalue()


@cache
def processor() -> spm.SentencePieceProcessor:
    """Return the tokenizer, for training data (never for text typed by a user)."""
    return spm.SentencePieceProcessor(model_proto=model_bytes())


def encode(text: str) -> list[int]:
    """Encode ``text``; special tokens written in it become their ids."""
    return processor().encode(text)


def vocab_size() -> int:
    """Return the number of pieces."""
    return processor().vocab_size()


def tokenizer_config() -> dict:
    """Return the content of ``tokenizer_config.json``, with Aria's fields."""
    added = {
        str(processor().piece_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + ADDED_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": None,
        "image_token": IMAGE_TOKEN,
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "processor_class": "AriaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def processor_of_nano() -> AriaProcessor:
    """Return the packaged processor.

    The shorter side may be as small as 56 px (4 patches), so that a strip of text keeps its proportions up to 4:1; with
    Aria's own ratio it would be distorted beyond 2.9:1.
    """
    images = AriaImageProcessor(max_image_size=max(QUERIES), min_image_size=56, sizes=tuple(QUERIES))
    return AriaProcessor(images, AriaTokenizer(model_bytes(), tokenizer_config()), size_conversion=QUERIES)


def write_files(folder: Path = NANO_FOLDER) -> None:
    """Write the files of the processor and of ``generate``."""
    processor_of_nano().save_pretrained(folder)
    settings = {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_TOKEN_ID}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=NANO_FOLDER, help="folder to write to")
    write_files(parser.parse_args().folder)
