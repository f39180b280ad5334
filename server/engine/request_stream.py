"""What a request gives, as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.request import FinishReason, Request, RequestOutput
from server.errors import ServerError, SlowReaderError

MAX_UNREAD = 4096  # outputs that a client may leave unread before its request is dropped
MAX_UNREAD_IN_ALL = 2**18  # tokens and alternatives to them that are kept for all readers, of texts that ended as well


class Unread:
    """How much is kept for which reader. Past MAX_UNREAD_IN_ALL, who has left most unread loses it."""

    def __init__(self) -> None:
        self._sizes: dict[RequestStream, int] = {}
        self.total = 0

    def add(self, stream: RequestStream, size: int) -> None:
        self._sizes[stream] = self._sizes.get(stream, 0) + size
        self.total += size
        if self.total > MAX_UNREAD_IN_ALL:
            max(self._sizes, key=self._sizes.__getitem__).lose()

    def remove(self, stream: RequestStream) -> None:
        self.total -= self._sizes.pop(stream, 0)


class RequestStream:
    """Outputs of a request as they come, read by one reader. `close` aborts what is not done; it must be called.

    Times are of time.monotonic(). num_unfinished: texts that have not ended.
    """

    def __init__(self, request: Request, close: Callable[[RequestStream], None], kept: Unread | None = None) -> None:
        self.request = request
        self.first_token_at: float | None = None
        self.last_token_at: dict[int, float] = {}  # by index of the text
        self.finish_reasons: list[FinishReason] = []
        self.num_generated_tokens = 0
        self.error: ServerError | None = None
        self.is_counted = True  # among the engine's requests
        self._unread: list[RequestOutput] = []
        self._kept = kept or Unread()
        self._has_unread = asyncio.Event()
        self._n_to_read = request.params.n_generated
        self._let_go: Callable[[RequestStream], None] | None = close
        self._has_reader = True

    @property
    def num_unfinished(self) -> int:
        return self.request.params.n_generated - len(self.finish_reasons)

    def put(self, output: RequestOutput, now: float) -> float | None:
        """Take an output; returns the seconds since the same text's last token, None for its first."""
        if self.error is not None:
            return None
        self.error = output.error
        if output.finish_reason is not None:
            self.finish_reasons.append(output.finish_reason)
        interval = None
        if output.token is not None:
            self.num_generated_tokens += 1
            interval = now - last if (last := self.last_token_at.get(output.index)) is not None else None
            self.last_token_at[output.index] = now
            self.first_token_at = self.first_token_at or now
        self._has_unread.set()
        if output.error is None and self._has_reader:
            self._unread.append(output)
            self._kept.add(self, 1 + len(output.token.top_logprobs or () if output.token else ()))
        if len(self._unread) > MAX_UNREAD and self.error is None:
            self.error = SlowReaderError(f"The client left {MAX_UNREAD} tokens of its stream unread.")
            self._drop()
        return interval

    def lose(self) -> None:
        """What is unread is thrown away, and its reader told so."""
        self._forget()
        self.error = SlowReaderError("The client left its stream unread, and there was no room to keep it.")
        self._has_unread.set()
        self._drop()

    def close(self) -> None:
        """Let go of the request; the engine drops it within a step unless it has ended. May be called again."""
        self._has_reader = False
        self._has_unread.set()
        self._forget()
        self._drop()

    def _forget(self) -> None:
        self._unread = []
        self._kept.remove(self)

    def _drop(self) -> None:
        if self._let_go:
            let_go, self._let_go = self._let_go, None
            let_go(self)

    async def read(self) -> list[RequestOutput]:
        """The outputs that came since the last call, at least one; [] after the last, or once the stream is closed.

        Raises what ended the request.
        """
        if not self._n_to_read:
            return []
        await self._has_unread.wait()
        if not self._has_reader:
            return []
        outputs = self._unread
        self._forget()
        if not outputs:
            assert self.error is not None
            raise self.error
        if self.error is None:
            self._has_unread.clear()
        self._n_to_read -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while outputs := await self.read():
            for output in outputs:
                yield output
