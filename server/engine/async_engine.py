"""The engine for asyncio: a thread runs the steps, and each request reads its outputs from a buffer of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from model.sampling import Grammar, SamplingParams
from server.engine.admission import Admission
from server.engine.conversation import Conversation
from server.engine.info import EngineInfo
from server.engine.llm_engine import LLMEngine
from server.engine.prefix_cache import Prefix
from server.engine.prefix_store import StoredPrefixes
from server.engine.request import Request, RequestOutput
from server.engine.request_stream import RequestStream, Unread
from server.engine.structured_output import GrammarCompiler, Matcher
from server.engine.token_processor import failure
from server.errors import (
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestTimeoutError,
    ServerError,
    ShuttingDownError,
)

logger = logging.getLogger(__name__)

LONG_PROMPT = 4096  # characters, or ids, from which a prompt is read in a thread, so that streams go on meanwhile
TEXT_THREADS = 2  # that read long prompts at a time; threads of their own, so that nothing else waits behind them
MAX_FAILURES = 3  # in a row, from which on the engine counts as failing
STOP_SECONDS = 2.0  # that the engine's thread has to end its step

T = TypeVar("T")


class Observer(Protocol):
    """Told of what happens to requests, on the event loop."""

    def on_token(self, stream: RequestStream, interval: float | None) -> None:
        """A token came, `interval` seconds after the last one of its text, None for the first."""

    def on_step(self, n_tokens: int) -> None:
        """So many tokens were decoded and read in a step. Called by the engine's thread."""

    def on_close(self, stream: RequestStream) -> None:
        """A request was let go, done or not."""

    def on_look_up(self, n_wanted: int, n_found: int) -> None:
        """A prompt of `n_wanted` tokens was looked for in the store of prefixes, which had `n_found` of them."""


class AsyncEngine:
    """Owns the engine's thread between `start` and `stop`. Everything else is called from one event loop.

    What can end without the thread is ended by the event loop: deadlines, and every stream once the thread is gone or
    is not waited for any more. info: what there is to know of the engine, which nobody else touches.
    """

    def __init__(
        self,
        engine: LLMEngine,
        observer: Observer | None = None,
        stored: StoredPrefixes | None = None,
        n_owners: int = 1,
    ) -> None:
        """n_owners: how many there are to share the engine; of several, none may have all of it."""
        self._engine, self._observer, self._stored = engine, observer, stored
        self.info = EngineInfo.of(engine)
        config, scheduler = engine.config, engine.scheduler
        scheduler.max_slots_per_owner = config.share_of_one(config.max_num_seqs_per_key, scheduler.n_slots, n_owners)
        self._max_per_owner = config.share_of_one(config.max_requests_per_key, self.info.capacity, n_owners)
        self._grammars = GrammarCompiler(engine.tokenizer, config.grammar_timeout)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # touched by the engine's thread only
        self._open: dict[RequestStream, asyncio.TimerHandle | None] = {}  # with what ends them at their deadlines
        self._unread = Unread()
        self._n_requests: Counter[str] = Counter()  # by owner
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._draining = self._has_died = False
        self._busy_since: float | None = None  # time.monotonic(); None while the thread has nothing to do
        self._n_failed_steps = 0  # in a row

    def start(self) -> None:
        """To be called on the event loop that will read the outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why nothing can be generated, in a sentence, if so: the thread has ended, hangs, or fails again and again."""
        if (error := self._standstill()) is not None:
            return str(error)
        if (n_failures := max(self._n_failed_steps, self._engine.num_failures)) >= MAX_FAILURES:
            return f"The engine has failed {n_failures} times in a row."
        return None

    def _standstill(self) -> ServerError | None:
        if not self._thread.is_alive() or self._has_died:
            return _dead()
        since, longest = self._busy_since, self._engine.config.step_timeout
        if since is not None and time.monotonic() - since > longest:
            return EngineDeadError(f"The engine has not ended its step in {longest:g} seconds.")
        return None

    @property
    def is_alive(self) -> bool:
        """Whether something can be generated, as far as one can tell."""
        return self.problem is None

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here. A failing engine takes them all the same: one success heals it."""
        return self.is_alive and not self._draining

    @property
    def num_requests(self) -> int:
        """Requests accepted and not yet let go by their readers."""
        return len(self._open)

    async def drain(self, timeout: float) -> None:
        """Take no more requests; return when all have ended, or after `timeout` seconds."""
        self._draining = True
        self._grammars.processes.close()
        deadline = time.monotonic() + timeout
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the thread after the current step. Requests still there end with ShuttingDownError, at once.

        To be called from another thread than the event loop's. A step that goes on for `timeout` seconds is not waited
        for any longer.
        """
        self._draining = True
        self._on_loop(self._end_all, _shutting_down)
        self._grammars.processes.close()
        self._commands.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.critical("The engine's step does not end; it is left alone.")

    def admit(self, n_requests: int = 1, owner: str = "") -> Admission:
        """Take places for requests, all or none, before anything is done for them: `with engine.admit() as admission`.

        Raises OverloadedError if the queue has not as many, or the owner has his share of it, InvalidRequestError if it
        never has, ShuttingDownError, and EngineDeadError if there is no thread to generate.
        """
        arrived_at = time.monotonic()
        self._check_ready()
        most = min(self.info.capacity, self._max_per_owner)
        if n_requests > most:
            raise InvalidRequestError(f"There must be at most {most} prompts, not {n_requests}.")
        if (n_all := self._n_requests.total()) + n_requests > self.info.capacity:
            raise OverloadedError(f"The queue is full: {n_all} requests run or wait already.")
        if (n_own := self._n_requests[owner]) + n_requests > self._max_per_owner:
            raise OverloadedError(
                f"{n_own} requests of this API key run or wait already, and at most {self._max_per_owner} may."
            )
        self._n_requests[owner] += n_requests
        return Admission(n_requests, owner, arrived_at, self._give_back)

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

        admission: whose next place it takes, whose owner it has, and from which its times count; without one it asks
        for a place itself, before any work is done, and raises as `admit`; add_special_tokens: whether a text is
        preceded by the end-of-text token, as every text the model learned from was; truncate: keep the last tokens of
        the prompt only; timeout in seconds from arrival; start, keep_conversation: as of Request, whose prompt is the
        unread tokens of start and then `prompt`. Raises InvalidRequestError, ModelError for bad text or parameters,
        RequestTimeoutError, ShuttingDownError and EngineDeadError. The stream must be closed, whatever happens.
        """
        with contextlib.nullcontext(admission) if admission else self.admit() as place:
            deadline = None if timeout is None else place.arrived_at + timeout
            async with _until(deadline):
                prompt_ids = await self.encode(prompt, add_special_tokens=add_special_tokens, truncate=truncate)
                request = Request(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=[*start.unread_ids, *prompt_ids] if start else prompt_ids,
                    params=params,
                    owner=place.owner,
                    priority=priority,
                    cache_salt=cache_salt,
                    start=start,
                    keep_conversation=keep_conversation,
                    matcher=await self._compile(params.grammar) if params.grammar else None,
                    arrived_at=place.arrived_at,
                )
                n_ids = len(prompt_ids) + len(params.allowed_token_ids or ()) + len(params.logit_bias)
                await self.aside(n_ids, self._prepare, request)
                prefix = await self._look_up(request)
            self._check_ready()  # again: the engine may have stopped while the prompt was tokenised
            place.take()
        stream = RequestStream(request, self._let_go, self._unread)
        self._open[stream] = None if deadline is None else self._at(deadline, stream)
        self._commands.put(lambda: self._add(stream, prefix))
        return stream

    def _prepare(self, request: Request) -> None:
        self._engine.check_request(request)
        self._engine.prepare(request)

    async def encode(
        self, prompt: str | list[int], *, add_special_tokens: bool = True, truncate: int | None = None
    ) -> list[int]:
        """Token ids of a prompt, as `submit` reads it; with `truncate` the last ones, so many in all.

        Raises PromptTooLongError for a text that is too long whatever its tokens are.
        """
        tokenizer = self.info.tokenizer
        if not isinstance(prompt, str):
            return prompt if truncate is None else prompt[-truncate:]
        if truncate is None and (n_least := tokenizer.fewest_tokens(prompt)) > self.info.max_model_len:
            raise PromptTooLongError(
                f"This model's maximum context length is {self.info.max_model_len} tokens, but a prompt of "
                f"{len(prompt)} characters has at least {n_least}."
            )
        ids = await self.aside(len(prompt), tokenizer.encode, prompt)
        whole = tokenizer.with_start(ids) if add_special_tokens else ids
        if truncate is None or len(whole) <= truncate:
            return whole
        n_first = len(whole) - len(ids)  # what begins a text stays
        return whole[:n_first] + ids[len(ids) - truncate + n_first :]

    async def aside(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Read a text, without holding up the event loop if its `size`, in characters or ids, is large: then in one of
        a few threads, behind which only other long ones wait.
        """
        if size <= LONG_PROMPT:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, work, *arguments)

    async def _look_up(self, request: Request) -> Prefix | None:
        """What the prompt can go on from and only the store has."""
        if self._stored is None or request.start is not None or request.params.prompt_logprobs is not None:
            return None
        beginning = self._engine.beginning(request)
        found = await self._stored.look_up(request.prompt_array, beginning)
        if self._observer:
            self._tell(self._observer.on_look_up, request.num_prompt_tokens, found.key.length if found else 0)
        return found

    async def _compile(self, grammar: Grammar) -> Matcher:
        longest, timeout = self._engine.config.max_grammar_length, self._engine.config.grammar_timeout
        if len(grammar.source) > longest:
            raise InvalidRequestError(
                f"{grammar.name} must have at most {longest} characters here, not {len(grammar.source)}."
            )
        if known := self._grammars.find(grammar):
            return known
        busy = f"{grammar.name} waited {timeout:g} seconds for others to be compiled."
        return await self._grammars.processes.in_thread(busy, self._grammars.compile, grammar)

    def _check_ready(self) -> None:
        if self._draining:
            raise _shutting_down()
        if (error := self._standstill()) is not None:
            raise error

    def _give_back(self, owner: str, n_places: int) -> None:
        self._n_requests[owner] -= n_places
        if not self._n_requests[owner]:
            del self._n_requests[owner]

    def _let_go(self, stream: RequestStream) -> None:
        if timer := self._open.pop(stream):
            timer.cancel()
        self._uncount(stream)
        self._abandon(stream)
        if self._observer:
            self._tell(self._observer.on_close, stream)

    def _uncount(self, stream: RequestStream) -> None:
        """A request that the engine has done makes room for another, also if its reader is slow."""
        if stream.is_counted:
            stream.is_counted = False
            self._give_back(stream.request.owner, 1)

    def _abandon(self, stream: RequestStream) -> None:
        self._commands.put(lambda: self._abort(stream.request.request_id))

    def _at(self, deadline: float, stream: RequestStream) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(deadline - time.monotonic(), self._end, stream, _late)

    def _end(self, stream: RequestStream, make_error: Callable[[], ServerError]) -> None:
        """Unless it has ended already: whatever the engine does, its reader reads an error after what has come."""
        if stream.error is None and stream.num_unfinished:
            stream.put(RequestOutput(stream.request.request_id, error=make_error()), time.monotonic())
            self._uncount(stream)
            self._abandon(stream)

    def _end_all(self, make_error: Callable[[], ServerError]) -> None:
        for stream in list(self._open):
            self._end(stream, make_error)

    def _receive(self, outputs: list[tuple[RequestStream, RequestOutput]], now: float) -> None:
        try:
            self._deliver(outputs, now)
        except BaseException:  # a text must not go on with a hole where these outputs were
            for stream, _ in outputs:
                self._end(stream, _failed)
            raise

    def _deliver(self, outputs: list[tuple[RequestStream, RequestOutput]], now: float) -> None:
        for stream, output in outputs:
            interval = stream.put(output, now)
            if self._observer and output.token is not None:
                self._tell(self._observer.on_token, stream, interval)
            if stream.error is not None or not stream.num_unfinished:
                self._uncount(stream)

    def _tell(self, told: Callable[..., None], *arguments: Any) -> None:
        """Tell the observer, whose failures are nobody else's."""
        try:
            told(*arguments)
        except Exception:
            logger.exception("A request could not be observed.")

    # The engine's thread

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            logger.critical("The engine has failed: nothing can be generated any more.", exc_info=True)
            self._has_died = True
        finally:
            self._on_loop(self._end_all, _dead if self._has_died else _shutting_down)

    def _work(self) -> None:
        """Commands and steps, until there is the command to stop."""
        while True:
            while not self._engine.has_work or not self._commands.empty():
                self._busy_since = None
                command = self._commands.get()
                self._busy_since = time.monotonic()
                if command is None:
                    for request_id in list(self._streams):
                        self._abort(request_id)
                    return
                command()
            self._busy_since = time.monotonic()
            self._send(self._step())

    def _step(self) -> list[RequestOutput]:
        try:
            outputs = self._engine.step()
            self._n_failed_steps = 0
            if self._observer:
                self._tell(self._observer.on_step, self._engine.num_step_tokens)
            return outputs
        except Exception:
            logger.exception("A step failed; what has started ends with it.")
            self._n_failed_steps += 1
            # What waits had no part in it, but must not wait for ever for a step that succeeds.
            return self._engine.fail_started(waiting=self._n_failed_steps >= MAX_FAILURES)

    def _send(self, outputs: list[RequestOutput]) -> None:
        """All outputs of a step in one call: waking up the event loop costs as much as a token."""
        known = [(stream, output) for output in outputs if (stream := self._streams.get(output.request_id))]
        self._on_loop(self._receive, known, time.monotonic())
        for request_id in {output.request_id for output in outputs} - self._streams.keys():
            self._drop(request_id)  # again: it could not be dropped the first time

    def _on_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody will read
                self._loop.call_soon_threadsafe(call, *arguments)

    def _add(self, stream: RequestStream, prefix: Prefix | None) -> None:
        name = stream.request.request_id
        self._streams[name] = stream
        try:
            if prefix:
                self._engine.prefix_cache.put(prefix)
            self._engine.add_request(stream.request)
        except Exception as problem:
            self._send([RequestOutput(name, error=failure(problem))])
            self._abort(name)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None):
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        try:
            self._engine.abort_request(request_id)
        except Exception:
            logger.exception("A request could not be dropped; that is tried again when it has an output.")


@contextlib.asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """Raises RequestTimeoutError if what is within takes longer; deadline: of time.monotonic()."""
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()) as limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise _late() from error
        raise


def _dead() -> ServerError:
    return EngineDeadError("The engine has failed, and generates nothing until the server is restarted.")


def _shutting_down() -> ServerError:
    return ShuttingDownError("The server is shutting down.")


def _late() -> ServerError:
    return RequestTimeoutError("The request was not done by its deadline.")


def _failed() -> ServerError:
    return GenerationError("Generation failed in the server.")
