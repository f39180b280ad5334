"""The synchronous engine: continuous batching over states of constant size."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.backends.choose import make_runner
from model.checkpoint import fingerprint
from model.errors import ModelError
from model.language_model import LanguageModel
from model.sampling import Sampler
from model.tokenizer import Tokenizer
from server.engine.config import DEFAULT_MAX_MODEL_LEN, EngineConfig
from server.engine.conversation import Conversation
from server.engine.detokenizer import Detokenizer
from server.engine.prefix_cache import Prefix, PrefixCache
from server.engine.request import FinishReason, Request, RequestOutput, Text
from server.engine.scheduler import Scheduler
from server.engine.snapshot import KeyHash, Snapshot, StateFiles
from server.engine.state_pool import StatePool
from server.engine.token_processor import TokenProcessor, failure, prompt_logprobs
from server.errors import ConfigurationError, GenerationError, InvalidRequestError, PromptTooLongError, ServerError


class LLMEngine:
    """`add_request`, then `step` until there is no more work. Not thread-safe: one thread calls everything.

    A step decodes one token of every running text in one batch, and reads chunks of prompts within the budget.
    Row i of the pool is the state of `_running[i]` before its last token.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self._clock = clock
        self.max_model_len = longest_sequence(self.config.max_model_len, model.config.context_limit)
        self.model_config, self.num_parameters, self.device = model.config, model.num_parameters, model.device
        empty = model.init_state(1)
        n_slots = self.config.n_slots(empty.nbytes)
        self.pool = StatePool(empty, n_slots)
        self.fingerprint = fingerprint(model, self.config.quantize or "")
        self.state_files = StateFiles(self.fingerprint, empty, model.config.vocab_size, type(model), self.max_model_len)
        self.runner = make_runner(
            model,
            self.pool.states,
            self.config.chunk_size,
            quantize=self.config.quantize,
            batch_invariant=self.config.batch_invariant,
        )
        # Where decoding and reading round differently, the same bits need prompts that are always cut alike.
        self._cuts_alike = self.config.batch_invariant and not self.runner.is_batch_invariant
        self.prefix_cache = PrefixCache(self.config.prefix_cache_bytes)
        self._processor = TokenProcessor(tokenizer)
        self.scheduler = Scheduler(n_slots=n_slots, chunk_size=self.config.chunk_size)
        self._running: list[Text] = []
        self.num_step_tokens = 0  # decoded and read in the last step
        self._n_failures = {"decoding": 0, "reading": 0, "starting": 0}  # in a row

    @property
    def has_work(self) -> bool:
        return bool(self._running) or not self.scheduler.is_empty

    @property
    def num_running(self) -> int:
        """Texts being decoded."""
        return len(self._running)

    @property
    def num_failures(self) -> int:
        """How often decoding or reading has failed since it last went well, for a reason that is not a request's."""
        return max(self._n_failures.values())

    def prepare(self, request: Request) -> None:
        """Make what the request's texts share: masks and biases. May be called from any thread before `add_request`."""
        if request.sampler is None:
            request.sampler = Sampler(request.params, request.prompt_array, self.tokenizer)

    def check_request(self, request: Request) -> None:
        """Raises InvalidRequestError or SamplingError if the request can never run. May be called from any thread."""
        params, vocab_size = request.params, self.model_config.vocab_size
        params.check_vocabulary(vocab_size)
        can_be_empty = request.start is not None and request.start.snapshot.logits is not None
        if not request.prompt_ids and not can_be_empty:
            raise InvalidRequestError("The prompt must have at least one token.")
        if request.prompt_ids and not _all_below(request, vocab_size):
            raise InvalidRequestError(f"The prompt must be of token ids from 0 to {vocab_size - 1}.")
        if params.n_generated > self.scheduler.n_slots:
            raise InvalidRequestError(
                f"n and best_of must be at most {self.scheduler.n_slots}, the texts that this server decodes at a "
                f"time, not {params.n_generated}."
            )
        n_given = request.num_earlier_tokens + request.num_prompt_tokens
        total = n_given + params.max_tokens
        if total > self.max_model_len:
            raise PromptTooLongError(
                f"This model's maximum context length is {self.max_model_len} tokens, but a prompt of {n_given} tokens "
                f"and {params.max_tokens} new ones make {total}."
            )

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises as `check_request`."""
        self.check_request(request)
        self.prepare(request)
        self.scheduler.add(request, self._clock())

    def abort_request(self, request_id: str) -> None:
        """Drop a request wherever it is. Its slots are free at once."""
        self._remove([request for request in self._requests() if request.request_id == request_id])

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Advance every running text by a token and some prompts by a chunk. What fails ends with an error output, and
        with it the requests that it was done for: those that decode, or the one that reads.
        """
        self.num_step_tokens = self.num_running
        outputs = self._try("decoding", self._decode, self._decoding()) if self._running else []
        for request, n_slots in Counter(self.scheduler.admit()).items():
            outputs += self._try("starting", self._go_on, [request], request, n_slots)
        for request, end in list(self.scheduler.chunks(self.num_running)):
            self.num_step_tokens += end - request.num_computed_tokens
            outputs += self._try("reading", self._read, [request], request, end)
        return outputs

    def _try(
        self, what: str, work: Callable[..., list[RequestOutput]], requests: Collection[Request], *arguments: object
    ) -> list[RequestOutput]:
        try:
            outputs = work(*arguments)
            self._n_failures[what] = 0
            return outputs
        except Exception as problem:
            self._n_failures[what] += not isinstance(problem, (ServerError, ModelError))
            error = failure(problem)
            return self._fail(requests, lambda: type(error)(*error.args))

    def fail_started(self, *, waiting: bool) -> list[RequestOutput]:
        """Drop what has started, after a step that failed as a whole, and with `waiting` all else, too."""
        started = [r for r in dict.fromkeys(self._requests()) if waiting or r.admitted_at is not None]
        return self._fail(started, lambda: GenerationError("Generation failed in the server."))

    def _fail(self, requests: Collection[Request], make_error: Callable[[], ServerError]) -> list[RequestOutput]:
        """Drop requests. Each gets an error of its own: raising one keeps its traceback in it."""
        self._remove(requests)
        return [RequestOutput(request.request_id, error=make_error()) for request in requests]

    def _decoding(self) -> list[Request]:
        return list(dict.fromkeys(text.request for text in self._running))

    def beginning(self, request: Request) -> KeyHash:
        """What names the states that the request's prompt goes through. May be called from any thread."""
        return KeyHash(request.start.snapshot.name if request.start else self.fingerprint, request.cache_salt)

    def _go_on(self, request: Request, n_slots: int) -> list[RequestOutput]:
        """With slots that the request has got: for its prompt, the first time, and then for so many texts."""
        if request.admitted_at is not None:
            assert request.read_state is not None
            return self._start_texts(request, request.read_state, n_slots)
        request.admitted_at = self._clock()
        self._find_prefix(request)
        return []

    def _find_prefix(self, request: Request) -> None:
        """Go on from the longest cached prefix. Log-probabilities of the prompt need all of it read."""
        request.read_key, request.read_state = self.beginning(request), None
        if request.start is not None:
            request.read_state = request.start.snapshot
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs += [None] if request.prompt_ids else []
            return
        multiple_of = self.config.chunk_size if self._cuts_alike else 1
        prefix = self.prefix_cache.match(request.prompt_array, request.read_key, multiple_of)
        if prefix is not None:
            request.num_computed_tokens = request.num_cached_tokens = prefix.key.length
            request.read_key.read(request.prompt_array[: prefix.key.length])
            request.read_state = prefix.snapshot

    def _read(self, request: Request, end: int) -> list[RequestOutput]:
        """Read the prompt up to token `end`; if that is all of it, the texts start."""
        if request.num_computed_tokens < end:
            self._read_chunk(request, end)
        if end < request.num_prompt_tokens:
            return []
        assert request.read_state is not None
        if request.params.max_tokens == 0:
            return self._end_without_texts(request, request.read_state)
        self.scheduler.finish_reading(request)
        return self._start_texts(request, request.read_state, 1)

    def _read_chunk(self, request: Request, end: int) -> None:
        start, before = request.num_computed_tokens, request.read_state
        n_top, n_tokens = request.params.prompt_logprobs, end - start
        is_all = end == request.num_prompt_tokens
        n_logits = n_tokens if n_top is not None else int(is_all)
        ids = request.prompt_ids[start:end]
        logits, state = self.runner.read(ids, before.state if before else None, n_logits)
        logits = logits.cpu()
        if n_top is not None:
            following = request.prompt_ids[start + 1 : end + 1]
            request.prompt_logprobs += prompt_logprobs(logits[: len(following)], following, n_top)
        key = request.read_key.read(request.prompt_array[start:end]).key
        request.num_computed_tokens = end
        request.read_state = Snapshot(state, logits[-1].clone() if is_all else None, key.name)
        if self.config.prefix_cache_bytes:
            # What follows a conversation is found in memory only: a store is asked for prompts.
            self.prefix_cache.put(Prefix(key, request.read_state, is_lasting=request.start is None))

    def _end_without_texts(self, request: Request, prompt: Snapshot) -> list[RequestOutput]:
        self._remove([request])
        after = Conversation(prompt) if request.keep_conversation else None
        name, length = request.request_id, FinishReason.LENGTH
        return [
            RequestOutput(name, i, finish_reason=length, conversation=after) for i in range(request.params.n_generated)
        ]

    def _start_texts(self, request: Request, prompt: Snapshot, n_texts: int) -> list[RequestOutput]:
        """Fork the state after the prompt for the next texts, which have slots, and choose the first token of each."""
        assert prompt.logits is not None
        first_row = self.num_running
        try:
            for _ in range(n_texts):
                text = self._new_text(request, request.num_started_texts)
                self.pool.append(prompt.state)
                self._running.append(text)
                request.num_started_texts += 1
        except Exception:
            for _ in range(first_row + n_texts - self.num_running):  # slots that no text has
                self.scheduler.free_slot(request)
            raise
        if request.num_started_texts == request.params.n_generated:
            request.read_state = None
        return self._advance(first_row, prompt.logits.expand(n_texts, -1))

    def _new_text(self, request: Request, index: int) -> Text:
        params, matcher = request.params, request.matcher.copy() if request.matcher else None
        assert request.sampler is not None
        return Text(
            request,
            index,
            request.sampler.fork(index, first=[matcher] if matcher else []),
            Detokenizer(params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens),
            matcher,
        )

    def _decode(self) -> list[RequestOutput]:
        logits = self.runner.step_([text.token_ids[-1] for text in self._running])
        return self._advance(0, logits.cpu())

    def _advance(self, first_row: int, logits: Tensor) -> list[RequestOutput]:
        """Choose a token for each running text from `first_row` on, by logits [R, V], and let go those that end."""
        outputs = self._processor.process(self._running[first_row:], logits)
        failed: dict[Request, RequestOutput] = {}
        for i in reversed(range(len(outputs))):  # removing a row moves the last one: rows before it stay
            output, text = outputs[i], self._running[first_row + i]
            if output.error is not None:
                failed[text.request] = output
            elif output.finish_reason is not None:
                outputs[i] = self._keep(output, text, first_row + i, logits[i])
                self._release(first_row + i)
        if not failed:
            return outputs
        self._remove(failed)
        ended = {request.request_id for request in failed}
        return [output for output in outputs if output.request_id not in ended] + list(failed.values())

    def _release(self, row: int) -> None:
        """Give up the row and the slot of a running text; the last row takes its place."""
        self.pool.remove(row)
        text, last = self._running[row], self._running.pop()
        if row < len(self._running):
            self._running[row] = last
        self.scheduler.free_slot(text.request)

    def _requests(self) -> Iterator[Request]:
        """All that have not ended; some twice, whose texts run and wait."""
        yield from self.scheduler.requests()
        yield from self._decoding()

    def _remove(self, requests: Collection[Request]) -> None:
        """Drop requests wherever they are."""
        self.scheduler.remove(requests)
        for request in requests:
            request.read_state = None
        for row in reversed(range(self.num_running)):
            if self._running[row].request in requests:
                self._release(row)

    def _keep(self, output: RequestOutput, text: Text, row: int, logits: Tensor) -> RequestOutput:
        """At the end of a text: a next turn goes on from here. The last token was chosen, but not read."""
        request, (*read, last) = text.request, text.token_ids
        # A turn of a conversation is gone on from by the conversation; a batch-invariant engine, where decoding and
        # reading round differently, must not go on from a decoded state.
        is_cached = bool(read and self.config.prefix_cache_bytes) and request.start is None and not self._cuts_alike
        if not (is_cached or request.keep_conversation):
            return output
        key = request.read_key.copy().read(array("i", read)).key
        snapshot = Snapshot(self.pool.snapshot(row), logits.clone(), key.name)
        if is_cached:  # at a length that no later prompt is looked for at in a store
            self.prefix_cache.put(Prefix(key, snapshot, is_lasting=False))
        if not request.keep_conversation:
            return output
        # The end of a text is no part of a conversation that goes on.
        unread = () if last == self.tokenizer.end_of_text_id else (last,)
        return replace(output, conversation=Conversation(snapshot, unread))


def longest_sequence(configured: int | None, context_limit: int | None) -> int:
    """Tokens of a prompt and its text together. Raises ConfigurationError for more than the model can read."""
    if configured is None:
        return DEFAULT_MAX_MODEL_LEN if context_limit is None else context_limit
    if context_limit is not None and configured > context_limit:
        raise ConfigurationError(
            f"max_model_len must be at most the {context_limit} positions of the model, not {configured}."
        )
    return configured


def _all_below(request: Request, vocab_size: int) -> bool:
    """Whether all ids of the prompt are from 0 to vocab_size - 1; by numpy, since prompts are long."""
    try:
        ids = np.frombuffer(request.prompt_array, dtype=np.intc)
    except OverflowError:
        return False
    return bool(ids.min() >= 0 and ids.max() < vocab_size)
