"""Text to token ids and back: a sentencepiece BPE model with byte fallback.

Every string of Unicode scalar values round-trips: no normalisation, no added or dropped spaces, and any character
outside the vocabulary becomes its UTF-8 bytes. Decoding goes through the bytes of each token, so a stream can be
decoded token by token with an incremental UTF-8 decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Self

import sentencepiece

from model.errors import TokenizationError

END_OF_TEXT = "<|endoftext|>"
_SPACE = "\u2581"  # sentencepiece's stand-in for a space; a literal one must not come back as a space


class Tokenizer:
    """token_bytes: the bytes that each id stands for; empty for `end_of_text_id`, which also starts every text."""

    def __init__(self, model_proto: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_proto)
        except RuntimeError as error:
            raise TokenizationError(f"This is not a sentencepiece model: {error}") from error
        self.model_proto = model_proto
        self.end_of_text_id: int = self._processor.eos_id()
        self.token_bytes: list[bytes] = [self._bytes_of(i) for i in range(self._processor.vocab_size())]
        byte_ids = {self._processor.IdToPiece(i): i for i in range(self.vocab_size) if self._processor.IsByte(i)}
        if self.end_of_text_id < 0 or len(byte_ids) != 256:
            raise TokenizationError("The sentencepiece model needs an end-of-sentence piece and byte fallback.")
        self._space_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in _SPACE.encode()]

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(path.read_bytes())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a BPE vocabulary of `vocab_size` pieces, the 256 bytes and 2 special pieces included."""
        model = BytesIO()
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
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the end-of-text id. Raises TokenizationError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizationError(f"Text holds a lone surrogate at character {error.start}.") from error
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += (self._space_ids if i else []) + self._processor.EncodeAsIds(part)
        return ids

    def encode_text(self, text: str) -> list[int]:
        """The same after the end-of-text id, which starts every text that a model learns from."""
        return [self.end_of_text_id, *self.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(token_ids).decode(errors="replace")

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise TokenizationError(f"Token id {token_id} is not in 0 .. {self.vocab_size - 1}.")
        return b"".join(self.token_bytes[token_id] for token_id in token_ids)

    def token_text(self, token_id: int) -> str:
        """The token on its own, for display: U+FFFD for part of a character, its name for a special token."""
        if token_id == self.end_of_text_id:
            return END_OF_TEXT
        return self.token_bytes[token_id].decode(errors="replace")

    def _bytes_of(self, token_id: int) -> bytes:
        processor = self._processor
        if processor.IsByte(token_id):
            return bytes([int(processor.IdToPiece(token_id)[3:-1], 16)])
        if processor.IsControl(token_id) or processor.IsUnknown(token_id):
            return b""
        piece: str = processor.IdToPiece(token_id)
        return piece.replace(_SPACE, " ").encode()
