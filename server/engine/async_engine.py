"""The engine for asyncio: a thread runs the steps, and each request reads its outputs from a queue of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable

from model.sampling import SamplingParams
from server.engine.llm_engine import LLMEngine
from server.engine.request import Request, RequestOutput
from server.engine.structured_output import GrammarCompiler
from server.errors import GenerationError, OverloadedError, ServerError, ShuttingDownError

logger = logging.getLogger(__name__)

LONG_PROMPT = 4096  # characters from which a prompt is tokenised in a thread, so that streams go on meanwhile


class RequestStream:
    """Outputs of a request as they come. Iterating raises the ServerError that ends it; `close` aborts it."""

    def __init__(self, request: Request, close: Callable[[], None]) -> None:
        self.request = request
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._n_unfinished = request.params.n_generated
        self._close: Callable[[], None] | None = close

    def put(self, output: RequestOutput) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody will read
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    def close(self) -> None:
        """Let go of the request; the engine drops it within a step unless it has ended. May be called again."""
        if self._close:
            self._close()
        self._close = None

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while self._n_unfinished:
            output = await self._outputs.get()
            if output.error is not None:
                raise output.error
            self._n_unfinished -= output.finish_reason is not None
            yield output


class AsyncEngine:
    """Owns the engine's thread between `start` and `stop`. Everything else is called from one event loop."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._grammars = GrammarCompiler(engine.tokenizer)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # touched by the engine's thread only
        self._n_requests = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = False

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    @property
    def num_requests(self) -> int:
        """Requests accepted and not yet let go."""
        return self._n_requests

    async def drain(self, timeout: float) -> None:
        """Take no more requests; return when all have ended, or after `timeout` seconds."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._n_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after the current step. Requests still there end with ShuttingDownError."""
        self._draining = True
        self._commands.put(None)
        self._thread.join()

    async def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        truncate: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> RequestStream:
        """Queue a request; a text is preceded by the end-of-text token, as every text the model learned from was.

        truncate: keep the last tokens of a text only; timeout in seconds. Raises OverloadedError before any work is
        done if the queue is full, ShuttingDownError, InvalidRequestError, and ModelError for bad text or parameters.
        The stream must be closed, whatever happens.
        """
        self._check_ready()
        config = self.engine.config
        if self._n_requests >= self.engine.pool.n_slots + config.max_queue_length:
            raise OverloadedError(f"The queue is full: {config.max_queue_length} requests are waiting already.")
        self._n_requests += 1
        try:
            prompt_ids = await self._encode(prompt, truncate) if isinstance(prompt, str) else prompt
            request = Request(
                request_id=uuid.uuid4().hex,
                prompt_ids=prompt_ids,
                params=params,
                priority=priority,
                deadline=time.monotonic() + timeout if timeout is not None else float("inf"),
                cache_salt=cache_salt,
                matcher=await asyncio.to_thread(self._grammars.compile, params.grammar) if params.grammar else None,
            )
            self.engine.check_request(request)
            self._check_ready()  # again: the engine may have stopped while the prompt was tokenised
        except BaseException:
            self._n_requests -= 1
            raise
        stream = RequestStream(request, lambda: self._let_go(request.request_id))
        self._commands.put(lambda: self._add(request, stream))
        return stream

    async def _encode(self, text: str, truncate: int | None) -> list[int]:
        encode = self.engine.tokenizer.encode_text
        start, *ids = await asyncio.to_thread(encode, text) if len(text) > LONG_PROMPT else encode(text)
        return [start, *(ids if truncate is None else ids[-truncate:])]

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise _shutting_down()

    def _let_go(self, request_id: str) -> None:
        self._n_requests -= 1
        self._commands.put(lambda: self._abort(request_id))

    # The engine's thread

    def _run(self) -> None:
        while True:
            while not self.engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return self._end_all(_shutting_down)
                command()
            try:
                outputs = self.engine.step()
            except Exception:
                logger.exception("A step failed; every request ends with it.")
                self._end_all(lambda: GenerationError("Generation failed in the server."))
                continue
            for output in outputs:
                self._streams[output.request_id].put(output)

    def _add(self, request: Request, stream: RequestStream) -> None:
        self._streams[request.request_id] = stream
        self.engine.add_request(request)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None):
            self.engine.abort_request(request_id)

    def _end_all(self, make_error: Callable[[], ServerError]) -> None:
        # An error of its own for each stream: raising one keeps its traceback in it.
        for request_id, stream in self._streams.items():
            self.engine.abort_request(request_id)
            stream.put(RequestOutput(request_id, error=make_error()))


def _shutting_down() -> ServerError:
    return ShuttingDownError("The server is shutting down.")
