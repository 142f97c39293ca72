"""The tokenizer: added tokens, exact round trips, the published files, and streaming."""

import os
import random
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from aria.processor import AriaTokenizer, Prompt, TextStream
from tests.helpers import small_tokenizer

KINDS: list[dict[str, Any]] = [
    {},
    {"controls": True},
    {"dummy_prefix": True},
    {"model_type": "char"},
    {"model_type": "char", "controls": True},
]
CONFIGS: dict[str, Any] = {
    "all listed": small_tokenizer.config(),
    "only unk": small_tokenizer.ONLY_UNK,
    "no file": None,
}
PROMPT = "<|im_start|>user\n<fim_prefix><|img|><fim_suffix>what  is 42 shown?<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer() -> AriaTokenizer:
    return AriaTokenizer(small_tokenizer.model(), small_tokenizer.config())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_same_ids_whatever_the_files_leave_out(kind: dict[str, Any]) -> None:
    all_ids = []
    for config in CONFIGS.values():
        tokenizer = AriaTokenizer(small_tokenizer.model(**kind), config)
        assert tokenizer.all_special_ids == list(range(19))
        assert tokenizer.image_token_id == 9 and tokenizer.eos_token_id == 2
        assert tokenizer.pad_token_id == (2 if config is CONFIGS["all listed"] else 0)
        assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
        all_ids.append(tokenizer.encode(PROMPT))
    assert all_ids[0] == all_ids[1] == all_ids[2]


def test_no_start_token_no_prefix_and_no_space_after_added_tokens(tokenizer: AriaTokenizer) -> None:
    pieces = tokenizer.tokenize(PROMPT)
    assert pieces[0] == "<|" and pieces[4:8] == ["|>", "user", "\n", "<fim_prefix>"]
    assert pieces[8:10] == ["<|img|>", "<fim_suffix>"] and not pieces[10].startswith("\u2581")
    assert tokenizer.encode("a\nb") == [*tokenizer.encode("a"), 109, *tokenizer.encode("b")]
    assert tokenizer.encode("") == []


def test_the_longest_added_token_wins(tokenizer: AriaTokenizer) -> None:
    assert tokenizer.encode("<<SYS>><</SYS>>[INST][/INST]") == [7, 8, 5, 6]
    assert tokenizer.encode("<fim_prefix><fim_pad>2024\r\n") == [39, 42, 21, 19, 21, 23, 108, 109]
    assert tokenizer.encode("<mark43><mark4<mark104>") == [43, 105, 104]
    assert 9 not in tokenizer.encode("<|img |> <|img")


def test_plain_text_is_what_sentencepiece_gives(tokenizer: AriaTokenizer) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=small_tokenizer.model())
    rng = random.Random(3)
    for _ in range(50):
        text = "".join(rng.choices("the quick fox <|im_end|>? naïve 世", k=60))
        assert tokenizer.encode(text) == oracle.encode(text)


@pytest.mark.parametrize("kind", [{}, {"dummy_prefix": True}], ids=str)
def test_exact_round_trips(kind: dict[str, Any]) -> None:
    tokenizer = AriaTokenizer(small_tokenizer.model(**kind), small_tokenizer.config())
    texts = [
        " ",
        "  two  spaces  ",
        "\n\n \n",
        "\ttab\x00nul\r\n\b",
        "▁▂▃ low ▁line▁",
        "𝔘👍🏽é\u0301\u2028\u200d",
        "0１2",
        "<unk>",
    ]
    rng = random.Random(0)
    alphabet = [chr(c) for c in rng.choices([*range(0xD800), *range(0xE000, 0x110000)], k=400)] + list(
        " \n▁<|img>0a" * 20
    )
    texts += ["".join(rng.choices(alphabet, k=80)) for _ in range(100)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(Prompt(text))) == text


def test_literal_image_tokens_are_text_in_a_prompt(tokenizer: AriaTokenizer) -> None:
    text = "see <|img|><|img|> <<|img|>> end"
    assert tokenizer.encode(text).count(9) == 3
    for kind in KINDS:
        other = AriaTokenizer(small_tokenizer.model(**kind), small_tokenizer.config())
        ids = other.encode(Prompt(text))
        assert 9 not in ids and other.decode(ids) == text
    second = text.index("<|img|>") + len("<|img|>")
    mixed = Prompt(text, slots=[second])
    assert tokenizer.encode(mixed).count(9) == 1
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_segments(mixed)] == ["see <|img|>", " <<|img|>> end"]


def test_skipping_special_tokens_keeps_the_chat_markers(tokenizer: AriaTokenizer) -> None:
    ids = [1, 9, 9, *tokenizer.encode("<fim_prefix>a<fim_suffix><|im_end|>"), 2, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<fim_prefix>a<fim_suffix><|im_end|>"
    assert tokenizer.decode(ids).startswith("<|startoftext|><|img|><|img|><fim_prefix>")
    rows = torch.tensor([[2, 20], [21, 22]])
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["1", "23"]
    assert tokenizer.decode(torch.tensor(20)) == tokenizer.decode(20) == tokenizer.decode(np.array([20])) == "1"


def test_invalid_ids(tokenizer: AriaTokenizer) -> None:
    for wrong in ([-100], [tokenizer.vocab_size], 100_352):
        with pytest.raises(ValueError, match="not in the vocabulary of 560"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="batch_decode"):
        tokenizer.decode(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="a lone surrogate"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(ValueError, match="should be a string"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_pieces_and_ids(tokenizer: AriaTokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 560
    assert tokenizer.convert_ids_to_tokens([9, 109, 39]) == ["<|img|>", "\n", "<fim_prefix>"]
    assert tokenizer.convert_tokens_to_ids(["<|img|>", "no such piece"]) == [9, 0]
    assert tokenizer.convert_ids_to_tokens(41) == "<fim_suffix>"


def test_calling_pads_on_the_left_and_truncates_on_the_right(tokenizer: AriaTokenizer) -> None:
    single = tokenizer("1\n2")
    assert single == {"input_ids": [20, 109, 21], "attention_mask": [1, 1, 1]}
    batch = tokenizer(["1\n2", "3"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[20, 109, 21], [2, 2, 22]] and batch.input_ids.dtype == torch.long
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    right = AriaTokenizer(small_tokenizer.model(), small_tokenizer.config())
    right.padding_side = "right"
    assert right(["12", "3"], padding=True) == {"input_ids": [[20, 21], [22, 2]], "attention_mask": [[1, 1], [1, 0]]}
    assert (right.pad_token, right.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer(["12", "3"])["input_ids"] == [[20, 21], [22]]
    assert tokenizer("12", padding="max_length", max_length=4)["input_ids"] == [2, 2, 20, 21]
    assert tokenizer(["123"], truncation=True, max_length=2, return_tensors="np")["input_ids"].tolist() == [[20, 21]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "pt"}, "pass padding=True"),
        ({"return_tensors": "tf"}, "'tf' is not known"),
        ({"padding": "left"}, "padding='left' is not known"),
        ({"truncation": True}, "need max_length"),
        ({"padding": "max_length"}, "need max_length"),
        ({"padding": "max_length", "max_length": 1}, "exceeds max_length=1"),
        ({"padding": True, "max_length": 0}, "at least 1"),
    ],
)
def test_invalid_settings(tokenizer: AriaTokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(["12", "3"], **options)


def test_streaming_gives_whole_characters_and_the_same_text(tokenizer: AriaTokenizer) -> None:
    text = "héllo 👍🏽 世界!"
    ids = [9, *tokenizer.encode(text), 2]
    for skip in (True, False):
        stream = TextStream(tokenizer, skip_special_tokens=skip)
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "" in pieces[1:-1]  # something had to be held back
    cut = ids[: ids.index(tokenizer.convert_tokens_to_ids("<0x9F>")) + 1]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in cut) + stream.flush() == tokenizer.decode(cut) == "<|img|>héllo \ufffd"
    assert stream.push(20) == "1"


def test_saving_and_loading(tokenizer: AriaTokenizer, tmp_path) -> None:
    for name, config in CONFIGS.items():
        folder = tmp_path / name
        AriaTokenizer(small_tokenizer.model(), config).save_pretrained(folder)
        loaded = AriaTokenizer.from_pretrained(folder)
        assert loaded.encode(PROMPT) == tokenizer.encode(PROMPT)
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert loaded.pad_token_id == (2 if name == "all listed" else 0)
        assert (folder / "tokenizer.model").read_bytes() == small_tokenizer.model()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.model"):
        AriaTokenizer.from_pretrained(tmp_path)


def test_transformers_gives_the_same_ids_from_what_is_saved(tokenizer: AriaTokenizer, tmp_path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.image_token_id, theirs.pad_token_id, theirs.padding_side) == (9, 2, "left")
    for text in (PROMPT, "hello world", " hello  2 worlds\n next", "naïve 世界 👍", "a\n\nb<fim_suffix>what"):
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.chat_template == tokenizer.chat_template


def test_ids_beyond_the_embedding_are_never_used() -> None:
    config = {**small_tokenizer.ONLY_UNK, "bos_token": "<s>", "eos_token": "</s>"}
    size = len(AriaTokenizer(small_tokenizer.model()))
    beyond = {"0": {"content": "<unk>", "special": True}, str(size): {"content": "<s>", "special": True},
              str(size + 1): {"content": "</s>", "special": True}}  # fmt: skip
    tokenizer = AriaTokenizer(small_tokenizer.model(), {**config, "added_tokens_decoder": beyond})
    assert max(tokenizer.encode("<s>hello</s>")) < tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("<s>hello</s>")) == "<s>hello</s>"
    assert tokenizer.eos_token_id == 2


def test_files_that_do_not_match() -> None:
    def load(index: int, content: str) -> None:
        config = {"added_tokens_decoder": {str(index): {"content": content, "special": True}}}
        AriaTokenizer(small_tokenizer.model(), config)

    with pytest.raises(ValueError, match=r"id 9 is '<image>', but tokenizer\.model has '<\|img\|>'"):
        load(9, "<image>")
    with pytest.raises(ValueError, match=r"id 9999 is '<box>', but .* no such id"):
        load(9999, "<box>")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        AriaTokenizer(b"hello")
    with pytest.raises(ValueError, match="image_token is '<image>'"):
        AriaTokenizer(small_tokenizer.model(), {"image_token": "<image>"})


def test_chat_template_of_the_tokenizer(tokenizer: AriaTokenizer, tmp_path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello <|img|>"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n<fim_prefix><|img|><fim_suffix>hello <|img|><|im_end|>\n"
    inputs = tokenizer.apply_chat_template([messages, messages], add_generation_prompt=True, return_tensors="pt")
    assert inputs.input_ids.shape[0] == 2 and int((inputs.input_ids == 9).sum()) == 2
    assert tokenizer.apply_chat_template(messages, return_dict=False) == tokenizer.encode(text)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].role }}: <|img|>{{ messages[0].content[1].text }}")
    own = AriaTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert own == "user: <|img|>hello <|img|>" and own.slots == (6,)
    several = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    named = AriaTokenizer(small_tokenizer.model(), small_tokenizer.config(chat_template=several))
    assert named.apply_chat_template(messages[:0], tokenize=False) == "b"
    with pytest.raises(ValueError, match="chat_template should be a Jinja template, but is 7"):
        AriaTokenizer(small_tokenizer.model(), small_tokenizer.config(chat_template=7))


def test_the_packaged_vocabulary_follows_the_same_rules() -> None:
    nano = AriaTokenizer.from_pretrained()
    assert (nano.image_token_id, nano.pad_token_id, nano.eos_token_id) == (9, 2, 2)
    assert nano.all_special_ids == list(range(19))
    assert nano.tokenize("<fim_prefix><|img|><fim_suffix>\nHi") == [
        "<fim_prefix>",
        "<|img|>",
        "<fim_suffix>",
        "\n",
        "H",
        "i",
    ]
    for text in (PROMPT, " two  spaces\n", "naïve 世界 👍 ▁"):
        assert nano.decode(nano.encode(text)) == text
    ids = nano.encode(Prompt("a <|img|> b"))
    assert 9 not in ids and nano.decode(ids) == "a <|img|> b"


@pytest.mark.skipif(
    "ARIA_TOKENIZER" not in os.environ, reason="ARIA_TOKENIZER names no folder with a real tokenizer.model"
)
class TestRealVocabulary:
    """Vectors from transformers' tests for rhymes-ai/Aria."""

    @pytest.fixture(scope="class")
    def real(self) -> AriaTokenizer:
        return AriaTokenizer.from_pretrained(os.environ["ARIA_TOKENIZER"])

    def test_size_and_known_ids(self, real: AriaTokenizer) -> None:
        assert real.vocab_size == 100_352 and real.all_special_ids == list(range(19))
        assert real.encode("<|im_end|>") == [93532, 93653, 944, 93421, 1019, 93653, 93519]
        assert real.encode("<fim_prefix><|img|><fim_suffix>\n") == [39, 9, 41, 109]

    def test_markers_in_text_are_cut_inside_a_piece(self, real: AriaTokenizer) -> None:
        ids = real.encode(Prompt("a.<|im_end|><|im_start|>"))
        assert real.decode(ids) == "a.<|im_end|><|im_start|>" and {"end", "start"}.isdisjoint(map(real.decode, ids))

    def test_pieces_of_a_conversation(self, real: AriaTokenizer) -> None:
        text = (
            "<|startoftext|><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<|img|>\n"
            "What is shown in this image?<|im_end|>"
        )
        end = ["|", "im", "_", "end", "|"]
        start = ["|", "im", "_", "start", "|", ">"]
        assert real.tokenize(text) == [
            *("<|startoftext|>", "<", *start, "system", "\n", "Answer", "▁the", "▁questions", ".<", *end, "><", *start),
            *("user", "\n", "<|img|>", "\n", "What", "▁is", "▁shown", "▁in", "▁this", "▁image", "?", "<", *end, ">"),
        ]
        assert real.decode(real.encode(text)) == text

    def test_ids_of_a_question(self, real: AriaTokenizer) -> None:
        text = "<|img|>\nUSER: What are the things I should be cautious about when I visit this place?\nASSISTANT:"
        vector = [
            *(9, 109, 3905, 2000),
            *(93415, 4551, 1162, 901, 3894, 970, 2478, 1017, 19312, 2388, 1596, 1809, 970, 5449, 1235, 3333, 93483),
            *(109, 61081, 11984, 14800, 93415),
        ]
        ids = real.encode(text)
        # The vector was taken with transformers' fast tokenizer, which puts a space before USER and ASSISTANT; all that
        # does not follow an added token directly is the same.
        colon, question = vector.index(93415), vector.index(93483)
        assert ids[:2] == vector[:2] and ids[-1] == vector[-1]
        assert ids[ids.index(93415) : ids.index(93483) + 2] == vector[colon : question + 2]
        assert real.decode(ids) == text


@pytest.mark.parametrize(
    "listed", [["<|img|>"], {"9": "<|img|>"}, {"nine": {"content": "<|img|>"}}, {"9": {"content": 9}}]
)
def test_added_tokens_of_the_wrong_form_are_refused(listed: Any) -> None:
    with pytest.raises(ValueError, match="added_tokens_decoder should map ids to objects with content"):
        AriaTokenizer(small_tokenizer.model(), small_tokenizer.config(added_tokens_decoder=listed))


@pytest.mark.parametrize("key", ["pad_token", "eos_token"])
def test_tokens_in_the_config_are_text_or_objects(key: str) -> None:
    named = AriaTokenizer(small_tokenizer.model(), small_tokenizer.config(**{key: {"content": "<|img|>"}}))
    assert getattr(named, f"{key}_id") == 9
    for wrong in (5, ["<|img|>"], {"text": "<|img|>"}):
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key} should be a token's text or null"):
            AriaTokenizer(small_tokenizer.model(), small_tokenizer.config(**{key: wrong}))
