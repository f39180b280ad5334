"""Turns of sessions, as answers are made from them."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine import Request, RequestOutput, RequestStream
from server.sessions import Turn


class TurnStream:
    """The stream of a session's turn, to be used as RequestStream.

    The turn is committed before the end of its text is told, and the session is free again when the stream is closed.
    """

    def __init__(self, stream: RequestStream, turn: Turn) -> None:
        self._stream, self._turn = stream, turn

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
                await self._turn.commit(output.conversation)
        return outputs

    def close(self) -> None:
        self._stream.close()
        self._turn.release()


TextStream = RequestStream | TurnStream


def close(streams: Sequence[TextStream]) -> None:
    for stream in streams:
        stream.close()
