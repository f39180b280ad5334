from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model import Tokenizer
from model.errors import TokenizationError
from model.tokenizer import END_OF_TEXT
from tests.conftest import STORIES


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(STORIES, vocab_size=380)


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


def test_frequent_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(i) for i in tokenizer.encode("the fox")][-1] == " fox"


def test_training_is_deterministic(words: Tokenizer) -> None:
    assert Tokenizer.train(STORIES, vocab_size=380).model_proto == words.model_proto


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
        Tokenizer(b"no such thing")
