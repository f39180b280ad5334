"""What every tokenizer is to the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from model.errors import TokenizationError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Decoding goes through the bytes of each token, so a stream can be decoded token by token, incrementally.

    content         what the file of the tokenizer holds
    token_bytes     the bytes that each id stands for; empty for special tokens
    end_of_text_id  the token that ends a text
    """

    file_name: ClassVar[str]
    starts_texts: ClassVar[bool]  # whether models learn texts that begin with the end-of-text token
    keeps_text: ClassVar[bool]  # whether the tokens of a text are its bytes, whatever it is

    content: bytes
    token_bytes: list[bytes]
    end_of_text_id: int

    @abstractmethod
    def __init__(self, content: bytes) -> None:
        """Raises TokenizationError for other content."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never a special one. Raises TokenizationError for lone surrogates."""

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def fewest_tokens(self, text: str) -> int:
        """Tokens that `text` has at least, without a look at it."""
        return -(-len(text) // self._longest) if self.keeps_text else 0

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.token_bytes))

    def fit(self, vocab_size: int) -> None:
        """Have an id for each row of a model's embedding; those beyond the vocabulary mean nothing.

        Raises TokenizationError if the model cannot be this tokenizer's.
        """
        if self.vocab_size > vocab_size:
            raise TokenizationError(f"The tokenizer has {self.vocab_size} tokens, but vocab_size is {vocab_size}.")
        self.token_bytes += [b""] * (vocab_size - self.vocab_size)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a whole text, as a model learns it; at least one."""
        return self.with_start(self.encode(text))

    def with_start(self, token_ids: list[int]) -> list[int]:
        """Token ids after what begins a text; a text without a token begins where another ended."""
        return [self.end_of_text_id, *token_ids] if self.starts_texts or not token_ids else token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(token_ids).decode(errors="replace")

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        self.check(token_ids)
        return b"".join(self.token_bytes[token_id] for token_id in token_ids)

    def check(self, token_ids: Sequence[int]) -> None:
        """Raises TokenizationError for an id that stands for nothing."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise TokenizationError(f"Token id {token_id} is not in 0 .. {self.vocab_size - 1}.")

    def piece(self, token_id: int) -> str:
        """The token as the file of the tokenizer writes it, if that is text."""
        return self.token_text(token_id)

    def token_text(self, token_id: int) -> str:
        """The token on its own, for display: U+FFFD for part of a character, its name for the end of a text."""
        if token_id == self.end_of_text_id:
            return END_OF_TEXT
        return self.token_bytes[token_id].decode(errors="replace")


def as_utf8(text: str) -> bytes:
    """Raises TokenizationError for a lone surrogate, which no bytes stand for."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizationError(f"Text holds a lone surrogate at character {error.start}.") from error
