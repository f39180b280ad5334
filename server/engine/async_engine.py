"""The engine for asyncio: a thread runs the steps, and each request reads its outputs from a buffer of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from model.sampling import Grammar, SamplingParams
from server.engine.admission import Admission
from server.engine.conversation import Conversation
from server.engine.info import EngineInfo
from server.engine.llm_engine import LLMEngine
from server.engine.prefix_cache import Prefix
from server.engine.prefix_store import StoredPrefixes
from server.engine.request import Request, RequestOutput
from server.engine.request_stream import RequestStream
from server.engine.structured_output import GrammarCompiler, Matcher
from server.errors import (
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    ShuttingDownError,
)
from server.grammars.process import MAX_PROCESSES

logger = logging.getLogger(__name__)

LONG_PROMPT = 4096  # characters from which a prompt is tokenised in a thread, so that streams go on meanwhile


class Observer(Protocol):
    """Told of what happens to requests, on the event loop."""

    def on_token(self, stream: RequestStream, interval: float | None) -> None:
        """A token came, `interval` seconds after the last one of its text, None for the first."""

    def on_close(self, stream: RequestStream) -> None:
        """A request was let go, done or not."""

    def on_look_up(self, n_wanted: int, n_found: int) -> None:
        """A prompt of `n_wanted` tokens was looked for in the store of prefixes, which had `n_found` of them."""


class AsyncEngine:
    """Owns the engine's thread between `start` and `stop`. Everything else is called from one event loop.

    info: what there is to know of the engine, which nobody else touches.
    """

    def __init__(
        self, engine: LLMEngine, observer: Observer | None = None, stored: StoredPrefixes | None = None
    ) -> None:
        self._engine, self._observer, self._stored = engine, observer, stored
        self.info = EngineInfo.of(engine)
        self._grammars = GrammarCompiler(engine.tokenizer, engine.config.grammar_timeout)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # touched by the engine's thread only
        self._n_requests = self._n_open = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Their own: they wait for grammars, and must not be threads of sessions, templates and prompts.
        self._grammar_threads = ThreadPoolExecutor(MAX_PROCESSES, thread_name_prefix="grammar")
        self._grammar_turn = asyncio.Semaphore(MAX_PROCESSES)
        self._draining = self._has_died = False

    def start(self) -> None:
        """To be called on the event loop that will read the outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether there is a thread to generate."""
        return self._thread.is_alive() and not self._has_died

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and not self._draining

    @property
    def num_requests(self) -> int:
        """Requests accepted and not yet let go by their readers."""
        return self._n_open

    async def drain(self, timeout: float) -> None:
        """Take no more requests; return when all have ended, or after `timeout` seconds."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._n_open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after the current step. Requests still there end with ShuttingDownError."""
        self._draining = True
        self._grammars.close()
        self._commands.put(None)
        self._thread.join()

    def admit(self, n_requests: int = 1) -> Admission:
        """Take places for requests, all or none, before anything is done for them: `with engine.admit() as admission`.

        Raises OverloadedError if the queue has not as many, InvalidRequestError if it never has, ShuttingDownError,
        and EngineDeadError if there is no thread to generate.
        """
        arrived_at = time.monotonic()
        self._check_ready()
        if n_requests > self.info.capacity:
            raise InvalidRequestError(f"There must be at most {self.info.capacity} prompts, not {n_requests}.")
        if self._n_requests + n_requests > self.info.capacity:
            raise OverloadedError(f"The queue is full: {self._n_requests} requests run or wait already.")
        self._n_requests += n_requests
        return Admission(n_requests, arrived_at, self._give_back)

    async def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        admission: Admission | None = None,
        add_special_tokens: bool = True,
        truncate: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        start: Conversation | None = None,
        keep_conversation: bool = False,
    ) -> RequestStream:
        """Queue a request.

        admission: whose next place it takes, and from which its times count; without one it asks for a place itself,
        before any work is done, and raises as `admit`; add_special_tokens: whether a text is preceded by the
        end-of-text token, as every text the model learned from was; truncate: keep the last tokens of the prompt
        only; timeout in seconds from arrival; start, keep_conversation: as of Request, whose prompt is the unread
        tokens of start and then `prompt`. Raises InvalidRequestError, ModelError for bad text or parameters,
        ShuttingDownError and EngineDeadError. The stream must be closed, whatever happens.
        """
        with contextlib.nullcontext(admission) if admission else self.admit() as place:
            prompt_ids = await self.encode(prompt, add_special_tokens=add_special_tokens, truncate=truncate)
            request = Request(
                request_id=uuid.uuid4().hex,
                prompt_ids=[*start.unread_ids, *prompt_ids] if start else prompt_ids,
                params=params,
                priority=priority,
                deadline=math.inf if timeout is None else place.arrived_at + timeout,
                cache_salt=cache_salt,
                start=start,
                keep_conversation=keep_conversation,
                matcher=await self._compile(params.grammar) if params.grammar else None,
                arrived_at=place.arrived_at,
            )
            self._engine.check_request(request)
            prefix = await self._look_up(request)
            self._check_ready()  # again: the engine may have stopped while the prompt was tokenised
            place.take()
        self._n_open += 1
        stream = RequestStream(request, self._let_go)
        self._commands.put(lambda: self._add(request, stream, prefix))
        return stream

    async def encode(
        self, prompt: str | list[int], *, add_special_tokens: bool = True, truncate: int | None = None
    ) -> list[int]:
        """Token ids of a prompt, as `submit` reads it."""
        tokenizer = self.info.tokenizer
        if not isinstance(prompt, str):
            return prompt if truncate is None else prompt[-truncate:]
        long = len(prompt) > LONG_PROMPT
        ids = await asyncio.to_thread(tokenizer.encode, prompt) if long else tokenizer.encode(prompt)
        kept = ids if truncate is None else ids[-truncate:]
        return tokenizer.with_start(kept) if add_special_tokens else kept

    async def _look_up(self, request: Request) -> Prefix | None:
        """What the prompt can go on from and only the store has."""
        if self._stored is None or request.start is not None or request.params.prompt_logprobs is not None:
            return None
        beginning = self._engine.beginning(request)
        found = await asyncio.to_thread(self._stored.find, request.prompt_array, beginning)
        if self._observer:
            self._observer.on_look_up(request.num_prompt_tokens, found.key.length if found else 0)
        return found

    async def _compile(self, grammar: Grammar) -> Matcher:
        longest, timeout = self._engine.config.max_grammar_length, self._engine.config.grammar_timeout
        if len(grammar.source) > longest:
            raise InvalidRequestError(
                f"{grammar.name} must have at most {longest} characters here, not {len(grammar.source)}."
            )
        if known := self._grammars.find(grammar):
            return known
        try:
            await asyncio.wait_for(self._grammar_turn.acquire(), timeout)
        except TimeoutError as error:
            raise OverloadedError(f"{grammar.name} waited {timeout:g} seconds for others to be compiled.") from error
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._grammar_threads, self._grammars.compile, grammar)
        finally:
            self._grammar_turn.release()

    def _check_ready(self) -> None:
        if self._draining:
            raise _shutting_down()
        if not self.is_alive:
            raise _dead()

    def _give_back(self, n_places: int) -> None:
        self._n_requests -= n_places

    def _let_go(self, stream: RequestStream) -> None:
        self._n_open -= 1
        self._uncount(stream)
        self._commands.put(lambda: self._abort(stream.request.request_id))
        if self._observer:
            self._observer.on_close(stream)

    def _uncount(self, stream: RequestStream) -> None:
        """A request that the engine has done makes room for another, also if its reader is slow."""
        if stream.is_counted:
            stream.is_counted = False
            self._give_back(1)

    def _deliver(self, outputs: list[tuple[RequestStream, RequestOutput]], now: float) -> None:
        for stream, output in outputs:
            interval = stream.put(output, now)
            if self._observer and output.token is not None:
                self._observer.on_token(stream, interval)
            if stream.error is not None or not stream.num_unfinished:
                self._uncount(stream)

    # The engine's thread

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception:
            logger.critical("The engine has failed: nothing can be generated any more.", exc_info=True)
            self._has_died = True
            self._tell_all(_dead)
            while (command := self._commands.get()) is not None:  # of requests that were on their way here
                with contextlib.suppress(Exception):
                    command()
                self._tell_all(_dead)

    def _step_until_stopped(self) -> None:
        while True:
            while not self._engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return self._end_all(_shutting_down)
                command()
            try:
                outputs = self._engine.step()
            except Exception:
                logger.exception("A step failed; every request ends with it.")
                self._end_all(lambda: GenerationError("Generation failed in the server."))
                continue
            self._send([(self._streams[output.request_id], output) for output in outputs])

    def _send(self, outputs: list[tuple[RequestStream, RequestOutput]]) -> None:
        """All outputs of a step in one call: waking up the event loop costs as much as a token."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody will read
            self._loop.call_soon_threadsafe(self._deliver, outputs, time.monotonic())

    def _add(self, request: Request, stream: RequestStream, prefix: Prefix | None) -> None:
        self._streams[request.request_id] = stream
        if prefix:
            self._engine.prefix_cache.put(prefix)
        self._engine.add_request(request)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None):
            self._engine.abort_request(request_id)

    def _end_all(self, make_error: Callable[[], ServerError]) -> None:
        for request_id in self._streams:
            self._engine.abort_request(request_id)
        self._tell_all(make_error)

    def _tell_all(self, make_error: Callable[[], ServerError]) -> None:
        # An error of its own for each stream: raising one keeps its traceback in it.
        self._send([(stream, RequestOutput(name, error=make_error())) for name, stream in self._streams.items()])


def _dead() -> ServerError:
    return EngineDeadError("The engine has failed, and generates nothing until the server is restarted.")


def _shutting_down() -> ServerError:
    return ShuttingDownError("The server is shutting down.")
