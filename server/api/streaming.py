"""Answers that take a while, or are long: server-sent events, JSON in pieces, and clients that leave meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.turns import TextStream, close
from server.engine import Completion, RequestOutput
from server.errors import ServerError

CLIENT_CLOSED_REQUEST = 499  # nobody reads this answer; it is for the log
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM, JSON = "text/event-stream", "application/json"
LARGE_ANSWER = 4096  # tokens from which an answer is put together in a thread, so that other streams go on meanwhile
PIECE, BATCH = 2**15, 64  # characters of a piece of an answer, and items of a list that are written at a time

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
    http_request: Request,
    streams: Sequence[TextStream],
    content: Callable[[list[list[Completion]]], object],
) -> Response:
    """JSON made from the texts once they are complete. If the client leaves before, generation stops."""
    try:
        completions = await unless_left(http_request, collect(streams))
    finally:
        close(streams)
    if completions is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    n_tokens = sum(stream.request.num_prompt_tokens + stream.num_generated_tokens for stream in streams)
    return await aside(n_tokens, lambda: json_answer(content(completions)))


async def aside(n_tokens: int, work: Callable[[], T]) -> T:
    """Work that takes long if there are many tokens, without holding up the event loop then."""
    return await asyncio.to_thread(work) if n_tokens > LARGE_ANSWER else work()


def json_answer(content: object) -> Response:
    """Iterators are lists, made as they are written."""
    return pieces_answer(json_pieces(content))


def pieces_answer(pieces: Iterator[str]) -> Response:
    """JSON from its pieces. What is long is written while it is sent, in threads."""
    larger = _gathered(pieces)
    first, second = next(larger), next(larger, None)
    if second is None:
        return Response(first, media_type=JSON)
    return StreamingResponse(chain((first, second), larger), media_type=JSON)


def json_pieces(content: object) -> Iterator[str]:
    """The pieces are short where long lists are iterators, which are written a few items at a time."""
    if isinstance(content, dict):
        separator = "{"
        for name, value in content.items():
            yield f"{separator}{_json(name)}:"
            yield from json_pieces(value)
            separator = ","
        yield "}" if content else "{}"
    elif isinstance(content, list):
        separator = "["
        for value in content:
            yield separator
            yield from json_pieces(value)
            separator = ","
        yield "]" if content else "[]"
    elif isinstance(content, Iterator):
        separator = "["
        while batch := list(islice(content, BATCH)):
            yield separator + _json(batch)[1:-1]
            separator = ","
        yield "]" if separator == "," else "[]"
    else:
        yield _json(content)


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _gathered(pieces: Iterator[str]) -> Iterator[bytes]:
    waiting, n_characters = [], 0
    for piece in pieces:
        waiting.append(piece)
        n_characters += len(piece)
        if n_characters >= PIECE:
            yield "".join(waiting).encode()
            waiting, n_characters = [], 0
    if waiting:
        yield "".join(waiting).encode()


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
    return EventStream(_guarded(first, events, error_event), streams)


class EventStream(StreamingResponse):
    """Lets go of its requests however it ends, even if the client has left before the first event."""

    def __init__(self, events: AsyncIterator[bytes], streams: Sequence[TextStream]) -> None:
        super().__init__(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            close(self.streams)


def sse(content: object, prefix: str = "data: ") -> bytes:
    """ASCII JSON: clients that split on every Unicode line end would cut at U+2028."""
    return f"{prefix}{json.dumps(content, ensure_ascii=True, default=list)}\n\n".encode()


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
