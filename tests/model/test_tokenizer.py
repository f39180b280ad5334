from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from model import SentencePieceTokenizer, Tokenizer
from model.errors import TokenizationError
from model.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, WorldTokenizer, hugging_face_files, load_tokenizer
from tests.conftest import STORIES, byte_level_tokenizer

WORLD_WORDS = ["Hello", " world", "wor", "world", "日本", "日", " worlds"]
WORLD_VOCABULARY = "".join(
    f"{i} {token!r} {len(token.encode() if isinstance(token, str) else token)}\n"
    for i, token in enumerate([*map(chr, range(128)), *(bytes([byte]) for byte in range(128, 256)), *WORLD_WORDS], 1)
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return SentencePieceTokenizer.train(STORIES, vocab_size=380)


@given(text=st.text())
@example("")
@example("  two spaces, a tab\t and\r\n\n\nline ends ")
@example("\u2581 is not a space, \u2581\u2581 are not two")
@example("\0 \x1f \x85 \u2028 \ufeff \ufffd")
@example("日本語 😀 e\u0301 ﬁ Ⅷ")
@example("<|endoftext|> <unk> <s> </s> <0x0A>")
def test_every_string_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text_id not in ids
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()


BUNDLED = Path(__file__).parents[2] / "weights" / "aft-conv-stories"


@pytest.fixture(scope="module")
def bundled() -> tuple[SentencePieceTokenizer, Any]:
    """The bundled tokenizer, and the same by AutoTokenizer."""
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(BUNDLED)
    assert isinstance(ours, SentencePieceTokenizer)
    return ours, transformers.AutoTokenizer.from_pretrained(BUNDLED)


RUNS = st.lists(st.tuples(st.sampled_from(" .,-!aeo0\n\u2581\tTh"), st.integers(1, 9)).map(lambda run: run[0] * run[1]))
WORDS = st.lists(
    st.sampled_from(["Once", " upon", "the", "ing", "  ", "<unk>", "<0x0A>", "<|endoftext|>", "\u2581the"])
)


@given(text=st.one_of(st.text(), RUNS.map("".join), WORDS.map("".join)))
def test_hugging_faces_form_gives_the_same_ids(bundled: tuple[SentencePieceTokenizer, Any], text: str) -> None:
    ours, theirs = bundled
    ids = ours.encode_text(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.end_of_text_id, ours.end_of_text_id, 2048)


def test_hugging_faces_form_is_that_of_the_bundled_tokenizer() -> None:
    ours = load_tokenizer(BUNDLED)
    assert isinstance(ours, SentencePieceTokenizer)
    assert {name: (BUNDLED / name).read_bytes() for name in hugging_face_files(ours)} == hugging_face_files(ours)


def test_frequent_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(i) for i in tokenizer.encode("the fox")][-1] == " fox"


def test_training_is_deterministic(words: Tokenizer) -> None:
    assert SentencePieceTokenizer.train(STORIES, vocab_size=380).content == words.content


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.end_of_text_id]) == ""
    assert tokenizer.token_text(tokenizer.end_of_text_id) == END_OF_TEXT


def test_half_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 400])
def test_ids_out_of_range_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizationError, match=rf"Token id {token_id} is not in 0 .. 399"):
        tokenizer.decode([token_id])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizationError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_other_files_are_refused() -> None:
    with pytest.raises(TokenizationError, match="not a sentencepiece model"):
        SentencePieceTokenizer(b"no such thing")


@pytest.fixture(scope="module")
def byte_level() -> HuggingFaceTokenizer:
    words = byte_level_tokenizer(300)
    words.add_tokens(["   "])
    return HuggingFaceTokenizer(words.to_str().encode())


def test_the_end_of_text_is_no_word(byte_level: HuggingFaceTokenizer) -> None:
    """Also where the file has it as a word like others."""
    described = json.loads(byte_level.content)
    for added in described["added_tokens"]:
        added["special"] = False
    words = HuggingFaceTokenizer(json.dumps(described).encode())
    assert words.end_of_text_id not in words.encode("x<|endoftext|>")
    assert words.token_bytes[words.end_of_text_id] == b""


def test_a_vocabulary_without_some_bytes_is_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={END_OF_TEXT: 0, "a": 1}, merges=[]))
    words.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(TokenizationError, match="no token for 255 of the 256 bytes"):
        HuggingFaceTokenizer(words.to_str().encode())


@given(text=st.text())
@example("<|endoftext|>   é\u0301 日本語 \0")
def test_byte_level_tokenizers_round_trip(byte_level: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.end_of_text_id not in ids


@given(text=st.text())
@example("Hello worlds 日本語 <|endoftext|>")
def test_world_tokenizers_round_trip(text: str) -> None:
    world = WorldTokenizer(WORLD_VOCABULARY.encode())
    ids = world.encode(text)
    assert world.decode(ids) == text
    assert world.end_of_text_id not in ids


def test_the_longest_token_of_the_world_comes_first() -> None:
    world = WorldTokenizer(WORLD_VOCABULARY.encode())
    assert [world.token_text(i) for i in world.encode("Hello worldsworlds日本wor")] == [
        "Hello",
        " worlds",
        "world",
        "s",
        "日本",
        "wor",
    ]


def test_only_texts_of_models_trained_here_begin_with_the_end_of_another(
    tokenizer: Tokenizer, byte_level: HuggingFaceTokenizer
) -> None:
    assert tokenizer.encode_text("fox") == [tokenizer.end_of_text_id, *tokenizer.encode("fox")]
    assert byte_level.encode_text("fox") == byte_level.encode("fox")
    assert byte_level.encode_text("") == [byte_level.end_of_text_id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "not a World vocabulary: the line 'x' is not an id"),
        (WORLD_VOCABULARY.replace("257 'Hello' 5", "257 'Hello' 6"), "line \"257 'Hello' 6\""),
        (WORLD_VOCABULARY.replace("257 'Hello' 5", "257 open('x') 5"), "not a World vocabulary"),
        (WORLD_VOCABULARY.replace("1 '\\x00' 1\n", ""), "no token for the byte 0"),
        ("0 'a' 1", "ids from 1 on"),
    ],
)
def test_other_vocabularies_are_refused(content: str, message: str) -> None:
    with pytest.raises(TokenizationError, match=re.escape(message)):
        WorldTokenizer(content.encode())


def test_other_tokenizer_files_are_refused(byte_level: HuggingFaceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizationError, match="not a tokenizer of Hugging Face"):
        HuggingFaceTokenizer(b"{}")
    described = json.loads(byte_level.content)
    described["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    with pytest.raises(TokenizationError, match="the decoder must be ByteLevel"):
        HuggingFaceTokenizer(json.dumps(described).encode())
    with pytest.raises(TokenizationError, match=r"it has none"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "rwkv_vocab.txt"):
        (tmp_path / name).touch()
    with pytest.raises(TokenizationError, match=r"it has tokenizer.json, rwkv_vocab.txt"):
        load_tokenizer(tmp_path)


def test_beside_a_sentencepiece_model_the_same_for_others_is_left_alone(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(words.content)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_tokenizer(tmp_path).content == words.content


@pytest.mark.parametrize("vocab_size", [-3, 0, 1, 200, 100_000, 10**15])
def test_a_vocabulary_that_the_texts_do_not_give_is_a_sentence(vocab_size: int) -> None:
    with pytest.raises(TokenizationError, match=f"^vocab_size = {vocab_size} is none for these texts"):
        SentencePieceTokenizer.train(STORIES, vocab_size)
