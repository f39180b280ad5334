"""The vocabulary of the RWKV "World" models: the longest token that fits comes next."""

from __future__ import annotations

import ast

from model.errors import TokenizationError
from model.tokenizer.base import Tokenizer, as_utf8

END_OF_TEXT_ID = 0


class WorldTokenizer(Tokenizer):
    """Each line of the file is an id, a Python literal of text or bytes, and the number of its bytes."""

    file_name = "rwkv_vocab.txt"
    starts_texts = False
    keeps_text = True

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.end_of_text_id = END_OF_TEXT_ID
        try:
            tokens = dict(_parsed(line) for line in content.decode().rstrip("\n").split("\n"))
        except (ValueError, SyntaxError) as error:
            raise TokenizationError(f"This is not a World vocabulary: {error}") from error
        if min(tokens) <= END_OF_TEXT_ID:
            raise TokenizationError("The vocabulary must have ids from 1 on.")
        self.token_bytes = [tokens.get(i, b"") for i in range(max(tokens) + 1)]
        self._ids = {token: token_id for token_id, token in tokens.items()}
        # Whether a longer token begins with these bytes: most searches end after two or three.
        self._prefixes = {token[:n] for token in self._ids for n in range(1, len(token))}
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise TokenizationError(f"The vocabulary has no token for the byte {missing[0]}.")

    def encode(self, text: str) -> list[int]:
        data, ids, start = as_utf8(text), [], 0
        while start < len(data):
            best = end = start + 1
            while end < len(data) and data[start:end] in self._prefixes:
                end += 1
                if data[start:end] in self._ids:
                    best = end
            ids.append(self._ids[data[start:best]])
            start = best
        return ids


def _parsed(line: str) -> tuple[int, bytes]:
    """Raises ValueError, naming the line, or SyntaxError."""
    try:
        number, rest = line.split(" ", 1)
        literal, size = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if isinstance(token, bytes) and len(token) == int(size) > 0:
            return int(number), token
    except ValueError:
        pass
    raise ValueError(f"the line {line!r} is not an id, a literal, and the number of its bytes.")
