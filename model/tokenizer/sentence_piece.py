"""A sentencepiece BPE model with byte fallback, which the models that are trained here have.

Every string of Unicode scalar values round-trips: no normalisation, no added or dropped spaces, and any character
outside the vocabulary becomes its UTF-8 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO
from typing import Self

import sentencepiece

from model.errors import TokenizationError
from model.tokenizer.base import END_OF_TEXT, Tokenizer, as_utf8

SPACE = "\u2581"  # sentencepiece's stand-in for a space; a literal one must not come back as a space


class SentencePieceTokenizer(Tokenizer):
    """content: a serialised sentencepiece model."""

    file_name = "tokenizer.model"
    starts_texts = True
    keeps_text = True

    def __init__(self, content: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise TokenizationError(f"This is not a sentencepiece model: {error}") from error
        self.content = content
        self.end_of_text_id: int = self._processor.eos_id()
        self.token_bytes = [self._bytes_of(i) for i in range(self._processor.vocab_size())]
        byte_ids = {self._processor.IdToPiece(i): i for i in range(self.vocab_size) if self._processor.IsByte(i)}
        if self.end_of_text_id < 0 or len(byte_ids) != 256:
            raise TokenizationError("The sentencepiece model needs an end-of-sentence piece and byte fallback.")
        self._space_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in SPACE.encode()]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a BPE vocabulary of `vocab_size` pieces, the 256 bytes and 2 special pieces included.

        Raises TokenizationError where the texts do not give that many, or need more.
        """
        model = BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=(line for text in texts for line in text.split("\n") if line),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                max_sentence_length=1 << 20,
                unk_id=0,
                eos_id=1,
                eos_piece=END_OF_TEXT,
                bos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise TokenizationError(
                f"vocab_size = {vocab_size} is none for these texts: {_reason(str(error))}"
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        as_utf8(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += (self._space_ids if i else []) + self._processor.EncodeAsIds(part)
        return ids

    def piece(self, token_id: int) -> str:
        piece: str = self._processor.IdToPiece(token_id)
        return piece

    def fit(self, vocab_size: int) -> None:
        """Here models have no rows to spare."""
        if self.vocab_size != vocab_size:
            raise TokenizationError(f"The tokenizer has {self.vocab_size} tokens, but vocab_size is {vocab_size}.")

    @property
    def unknown_id(self) -> int:
        """Of the piece that no text has, since every character has bytes."""
        return int(self._processor.unk_id())

    def is_normal(self, token_id: int) -> bool:
        """Whether the token is text, neither special nor a byte of its own."""
        processor = self._processor
        return not (processor.IsByte(token_id) or processor.IsControl(token_id) or processor.IsUnknown(token_id))

    def score(self, token_id: int) -> float:
        """Of several tokens that two others make, the one of the highest score is made first."""
        return float(self._processor.GetScore(token_id))

    def _bytes_of(self, token_id: int) -> bytes:
        processor = self._processor
        if processor.IsByte(token_id):
            return bytes([int(processor.IdToPiece(token_id)[3:-1], 16)])
        if processor.IsControl(token_id) or processor.IsUnknown(token_id):
            return b""
        piece: str = processor.IdToPiece(token_id)
        return piece.replace(SPACE, " ").encode()


def _reason(error: str) -> str:
    """What sentencepiece says of a vocabulary that it cannot make, in short where that is known."""
    if most := re.search(r"value <= (\d+)", error):
        return f"at most {most[1]}."
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"at least {least[1]}."
    return error
