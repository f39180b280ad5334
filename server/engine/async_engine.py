"""The engine for asyncio: a thread runs the steps, and each request reads its tokens from a queue of its own."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

from server.engine.llm_engine import LLMEngine
from server.engine.request import Request, TokenOutput
from server.errors import GenerationError, ServerError, ShuttingDownError

logger = logging.getLogger(__name__)

Item = TokenOutput | ServerError


class AsyncEngine:
    """Owns the engine's thread between `start` and `stop`."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Callable[[Item], None]] = {}  # touched by the engine's thread only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; requests still running end with ShuttingDownError."""
        self._stopping = True
        self._commands.put(None)
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Tokens of a request as they come. Raises ServerError; closing the iterator aborts the request."""
        if not self.is_running:
            raise ShuttingDownError("The server is shutting down.")
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()

        def put(item: Item) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        self._commands.put(lambda: self._add(request, put))
        try:
            while True:
                item = await items.get()
                if isinstance(item, ServerError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._commands.put(lambda: self._abort(request.request_id))

    def _run(self) -> None:
        while True:
            while not self.engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return self._end_all(ShuttingDownError("The server is shutting down."))
                command()
            try:
                outputs = self.engine.step()
            except Exception:
                logger.exception("A step failed; every running request ends with it.")
                self._end_all(GenerationError("Generation failed in the server."))
                continue
            for request_id, output in outputs:
                put = self._streams[request_id]
                if isinstance(output, GenerationError) or output.finish_reason is not None:
                    del self._streams[request_id]
                put(output)

    def _add(self, request: Request, put: Callable[[Item], None]) -> None:
        try:
            self.engine.add_request(request)
        except ServerError as error:
            put(error)
        else:
            self._streams[request.request_id] = put

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None):
            self.engine.abort_request(request_id)

    def _end_all(self, error: ServerError) -> None:
        for request_id, put in self._streams.items():
            self.engine.abort_request(request_id)
            put(error)
        self._streams.clear()
