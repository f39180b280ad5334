"""Text files of documents, and the batches a training step reads from them.

A batch is a function of (seed, step) alone, so a resumed run reads exactly what an uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from model.errors import ConfigError
from model.tokenizer import END_OF_TEXT, Tokenizer

TokenArray = npt.NDArray[np.int32]

MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Source:
    """A text file, and how often one pass over the data reads it: 2.5 is twice, and half of it a third time."""

    path: Path
    repeats: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From PATH or PATH:REPEATS."""
        path, colon, repeats = text.rpartition(":")
        if not colon:
            return cls(Path(text))
        try:
            value = float(repeats)
        except ValueError:
            value = 0.0
        if not 0 < value <= MOST_REPEATS:
            raise ConfigError(
                f"data must be PATH or PATH:REPEATS with a positive number, not {text!r}, and at most {MOST_REPEATS}."
            )
        return cls(Path(path), value)


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 file that separates them by a line `<|endoftext|>`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be text in UTF-8: {error}.") from error
    parts = re.split(rf"^{re.escape(END_OF_TEXT)}$", text, flags=re.MULTILINE)
    return [part.strip("\n") for part in parts if part.strip()]


def encode_documents(documents: Sequence[str], tokenizer: Tokenizer) -> TokenArray:
    """All documents as one stream of ids, each one preceded and the last one followed by the end-of-text id."""
    ids = [tokenizer.end_of_text_id]
    for document in documents:
        ids += tokenizer.encode(document)
        ids.append(tokenizer.end_of_text_id)
    return np.array(ids, dtype=np.int32)


class PackedBatches:
    """Windows of `context` + 1 tokens, cut from token streams without regard to document borders.

    One pass cuts every stream into windows from a random phase, as often as its repeats say, and shuffles them all.
    """

    def __init__(
        self, streams: Sequence[tuple[TokenArray, float]], *, batch_size: int, context: int, seed: int
    ) -> None:
        self.streams, self.batch_size, self.context, self.seed = streams, batch_size, context, seed
        self._pass_index, self._starts = -1, np.empty((0, 2), dtype=np.int64)
        self.windows_per_pass = len(self._shuffled_starts(0))
        if self.windows_per_pass == 0:
            raise ConfigError(f"The data holds no window of context + 1 = {context + 1} tokens; lower the context.")

    @property
    def digest(self) -> str:
        """Tells token streams apart, whatever the files are called."""
        streams = hashlib.blake2b(digest_size=16)
        for tokens, _ in self.streams:
            streams.update(tokens.tobytes())
        return streams.hexdigest()

    def batch(self, step: int) -> TokenArray:
        """Tokens [batch_size, context + 1] of training step `step` (from 0)."""
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.stack([self._window(row) for row in rows])

    def _window(self, row: int) -> TokenArray:
        pass_index, i = divmod(row, self.windows_per_pass)
        if pass_index != self._pass_index:
            self._pass_index, self._starts = pass_index, self._shuffled_starts(pass_index)
        stream, start = self._starts[i]
        window: TokenArray = self.streams[stream][0][start : start + self.context + 1]
        return window

    def _shuffled_starts(self, pass_index: int) -> npt.NDArray[np.int64]:
        """(stream, first token) of every window of a pass; every pass has the same number of windows."""
        random = np.random.default_rng([self.seed, pass_index])
        starts: list[tuple[int, int]] = []
        for i, (tokens, repeats) in enumerate(self.streams):
            n_windows = (len(tokens) - self.context - 1) // self.context  # leaves room for any phase
            wanted = round(max(n_windows, 0) * repeats)
            while wanted > 0:
                phase = int(random.integers(self.context))
                chosen = random.permutation(n_windows)[:wanted]
                starts += [(i, phase + int(window) * self.context) for window in chosen]
                wanted -= n_windows
        return random.permutation(np.array(starts, dtype=np.int64).reshape(-1, 2))
