"""Turns of sessions, as answers are made from them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from server.engine import Request, RequestOutput, RequestStream
from server.sessions import Turn

logger = logging.getLogger(__name__)


class TurnStream:
    """The stream of a session's turn, to be used as RequestStream.

    The turn is committed before the end of its text is told, and the session is free again when the stream is closed.
    """

    def __init__(self, stream: RequestStream, turn: Turn) -> None:
        self._stream, self._turn = stream, turn
        self._commit: asyncio.Task[None] | None = None

    @property
    def request(self) -> Request:
        return self._stream.request

    @property
    def num_generated_tokens(self) -> int:
        return self._stream.num_generated_tokens

    async def read(self) -> list[RequestOutput]:
        """As RequestStream's. Raises BusySessionError if another server has stored a turn meanwhile."""
        outputs = await self._stream.read()
        for output in outputs:
            if output.conversation is not None:
                self._commit = asyncio.create_task(self._turn.commit(output.conversation))
                await asyncio.shield(self._commit)  # what the store has begun goes on if the client leaves
        return outputs

    def close(self) -> None:
        self._stream.close()
        if self._commit and not self._commit.done():
            self._commit.add_done_callback(self._release)
        else:
            self._turn.release()

    def _release(self, commit: asyncio.Task[None]) -> None:
        if not commit.cancelled() and (error := commit.exception()):
            logger.warning("A turn was not committed, and its client had left: %s", error)
        self._turn.release()


TextStream = RequestStream | TurnStream


def close(streams: Sequence[TextStream]) -> None:
    for stream in streams:
        stream.close()
