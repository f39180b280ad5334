"""Answers that take a while: server-sent events, and what becomes of them when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.config import APIConfig
from server.api.turns import TextStream, close
from server.engine import Completion, RequestOutput
from server.errors import ServerError, SlowReaderError

CLIENT_CLOSED_REQUEST = 499  # nobody reads this answer; it is for the log
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM = "text/event-stream"
LARGE_ANSWER = 4096  # tokens and alternatives to them, from which an answer is written in a thread

T = TypeVar("T")


async def read_all(streams: Sequence[TextStream]) -> AsyncIterator[tuple[int, list[RequestOutput]]]:
    """(index of the stream, what came from it), as it comes, until all have ended."""
    if len(streams) == 1:
        while outputs := await streams[0].read():
            yield 0, outputs
        return
    reading = {asyncio.create_task(stream.read()): i for i, stream in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                outputs = task.result()
                i = reading.pop(task)
                if outputs:
                    reading[asyncio.create_task(streams[i].read())] = i
                    yield i, outputs
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def collect(streams: Sequence[TextStream]) -> list[list[Completion]]:
    """The texts of each stream, whole."""
    completions = [[Completion(i) for i in range(stream.request.params.n_generated)] for stream in streams]
    async for i, outputs in read_all(streams):
        for output in outputs:
            completions[i][output.index].add(output)
    return completions


async def whole_answer(
    http_request: Request, streams: Sequence[TextStream], respond: Callable[[list[list[Completion]]], Response]
) -> Response:
    """The response made from the texts once they are complete. If the client leaves before, generation stops."""
    try:
        completions = await unless_left(http_request, collect(streams))
    finally:
        close(streams)
    if completions is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if sum(_size(stream) for stream in streams) < LARGE_ANSWER:
        return respond(completions)
    return await asyncio.to_thread(respond, completions)


def _size(stream: TextStream) -> int:
    """Tokens and log-probabilities that may be told of it."""
    request, params = stream.request, stream.request.params
    return request.num_prompt_tokens * (params.prompt_logprobs or 0) + stream.num_generated_tokens * (
        1 + (params.logprobs or 0)
    )


async def event_answer(
    http_request: Request,
    streams: Sequence[TextStream],
    events: AsyncIterator[bytes],
    error_event: Callable[[Exception], bytes],
) -> Response:
    """Server-sent events. An error before the first one gets its real status; a later one becomes an event."""
    try:
        first = await unless_left(http_request, _first(events))
    except BaseException:
        close(streams)
        raise
    if first is None:
        close(streams)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    config: APIConfig = http_request.app.state.context.config
    return EventStream(_guarded(first, events, error_event), streams, config.write_timeout)


class EventStream(StreamingResponse):
    """Lets go of its requests however it ends, even if the client has left before the first event.

    write_timeout: seconds in which a client must have read enough for the next event to be sent.
    """

    def __init__(self, events: AsyncIterator[bytes], streams: Sequence[TextStream], write_timeout: float) -> None:
        super().__init__(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)
        self.streams, self.write_timeout = streams, write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises SlowReaderError if the client does not read in time."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.write_timeout):
                    await send(message)
            except TimeoutError as error:
                raise SlowReaderError(f"The client read nothing for {self.write_timeout:g} seconds.") from error

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            close(self.streams)


def sse(content: object, prefix: str = "data: ") -> bytes:
    """ASCII JSON: clients that split on every Unicode line end would cut at U+2028."""
    return f"{prefix}{json.dumps(content, ensure_ascii=True)}\n\n".encode()


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


async def _guarded(
    first: bytes, events: AsyncIterator[bytes], error_event: Callable[[Exception], bytes]
) -> AsyncIterator[bytes]:
    yield first
    try:
        async for event in events:
            yield event
    except ServerError as error:
        yield error_event(error)


async def unless_left(http_request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, and `work` cancelled, if the client leaves before it is done."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(http_request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _wait_for_disconnect(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
