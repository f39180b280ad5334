"""Token bytes to text as they come: no half characters, and nothing that may still turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """`append` bytes of each token and send what it returns; `finish` returns what is left.

    All returned pieces together are the decoded text, cut before the first stop string, or after it with include_stop.
    min_tokens: no stop string counts that is complete with one of the first so many tokens, as vLLM has it.
    stopped_by: the stop string that was found, if any.
    """

    def __init__(self, stop: Sequence[str] = (), *, include_stop: bool = False, min_tokens: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._pending = ""
        self._n_missing = min_tokens
        self._n_early = 0  # characters of _pending in which no stop string may end
        self.stopped_by: str | None = None

    def append(self, token_bytes: bytes) -> str:
        self._n_missing -= 1
        return self._release(self._decoder.decode(token_bytes))

    def finish(self) -> str:
        released = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            released, self._pending = released + self._pending, ""
        return released

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        self._pending += text
        if self._n_missing >= 0:
            self._n_early = len(self._pending)
        begins = (
            (self._pending.find(string, max(0, self._n_early - len(string) + 1)), string) for string in self._stop
        )
        found = [(begin, string) for begin, string in begins if begin >= 0]
        if found:
            # The earliest one wins, and of several there the shortest: it was complete first.
            end, self.stopped_by = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            end += len(self.stopped_by) if self._include_stop else 0
        else:
            end = len(self._pending) - self._held_back()
        released, self._pending = self._pending[:end], self._pending[end:]
        self._n_early = max(0, self._n_early - end)
        return released

    def _held_back(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(string[:length]):
                    longest = length
                    break
        return longest
