"""A byte-level BPE tokenizer in the file format of Hugging Face's tokenizers, as GPT-NeoX and the Pile models have."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from model.errors import TokenizationError
from model.tokenizer.base import END_OF_TEXT, Tokenizer, as_utf8


class HuggingFaceTokenizer(Tokenizer):
    """Text is normalised as the file says, so that not every string comes back as it was (NFC, for GPT-NeoX)."""

    file_name = "tokenizer.json"
    starts_texts = False
    keeps_text = False

    def __init__(self, content: bytes) -> None:
        try:
            described: dict[str, Any] = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise TokenizationError(f"This is not a tokenizer of Hugging Face's library: {error}") from error
        if not _is_byte_level(described.get("decoder")):
            raise TokenizationError(
                "Only byte-level tokenizers can be used: the decoder must be ByteLevel. "
                "Sentencepiece models are read from tokenizer.model."
            )
        self._tokenizer.encode_special_tokens = True  # what a user writes is text, whatever it spells
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content = content
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise TokenizationError(f"The tokenizer has no token {END_OF_TEXT}.")
        self.end_of_text_id: int = end
        self._tokenizer.add_special_tokens([END_OF_TEXT])  # some files have it as a word like others
        vocabulary = self._tokenizer.get_vocab()
        if missing := _BYTE_OF_CHARACTER.keys() - vocabulary.keys():
            raise TokenizationError(f"The tokenizer has no token for {len(missing)} of the 256 bytes.")
        added = self._tokenizer.get_added_tokens_decoder()
        by_id = {token_id: token for token, token_id in vocabulary.items()}
        self.token_bytes = [b""] * (max(by_id) + 1)
        for token_id, token in by_id.items():
            if token_id not in added:
                self.token_bytes[token_id] = _bytes_of(token)
            elif not added[token_id].special:
                self.token_bytes[token_id] = token.encode()

    def encode(self, text: str) -> list[int]:
        as_utf8(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", [])))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own characters, the others those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError as error:
        raise TokenizationError(f"The token {token!r} is not of the byte-level alphabet.") from error
