"""What a request gives, as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.request import FinishReason, Request, RequestOutput
from server.errors import ServerError, SlowReaderError

MAX_UNREAD = 4096  # outputs that a client may leave unread before its request is dropped


class RequestStream:
    """Outputs of a request as they come, read by one reader. `close` aborts what is not done; it must be called.

    Times are of time.monotonic(). num_unfinished: texts that have not ended.
    """

    def __init__(self, request: Request, close: Callable[[RequestStream], None]) -> None:
        self.request = request
        self.first_token_at: float | None = None
        self.last_token_at: dict[int, float] = {}  # by index of the text
        self.finish_reasons: list[FinishReason] = []
        self.num_generated_tokens = 0
        self.error: ServerError | None = None
        self.is_counted = True  # among the engine's requests
        self._unread: list[RequestOutput] = []
        self._has_unread = asyncio.Event()
        self._n_to_read = request.params.n_generated
        self._close: Callable[[RequestStream], None] | None = close

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
        if output.error is None:
            self._unread.append(output)
        self._has_unread.set()
        if len(self._unread) > MAX_UNREAD and self.error is None:
            self.error = SlowReaderError(f"The client left {MAX_UNREAD} tokens of its stream unread.")
            self.close()
        return interval

    def close(self) -> None:
        """Let go of the request; the engine drops it within a step unless it has ended. May be called again."""
        if self._close:
            close, self._close = self._close, None
            close(self)

    async def read(self) -> list[RequestOutput]:
        """The outputs that came since the last call, at least one; [] after the last. Raises what ended the request."""
        if not self._n_to_read:
            return []
        await self._has_unread.wait()
        outputs, self._unread = self._unread, []
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
