"""The synchronous engine: continuous batching over states of constant size."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import fingerprint
from model.runner import make_runner
from model.sampling import Sampler
from model.state import AFTState
from model.tokenizer import Tokenizer
from model.transformer import AFTForCausalLM
from server.engine.config import DEFAULT_MAX_MODEL_LEN, EngineConfig
from server.engine.conversation import Conversation
from server.engine.detokenizer import Detokenizer
from server.engine.prefix_cache import PrefixCache
from server.engine.request import FinishReason, Request, RequestOutput, Sequence
from server.engine.scheduler import Scheduler
from server.engine.snapshot import Snapshot
from server.engine.state_pool import StatePool
from server.engine.token_processor import TokenProcessor, failure, prompt_logprobs
from server.errors import ConfigurationError, InvalidRequestError, RequestTimeoutError, ServerError


class LLMEngine:
    """`add_request`, then `step` until there is no more work. Not thread-safe: one thread calls everything.

    A step decodes one token of every running text in one batch, and reads chunks of prompts within the budget.
    Row i of the pool is the state of `_running[i]` before its last token.
    """

    def __init__(
        self,
        model: AFTForCausalLM,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self._clock = clock
        self.max_model_len = longest_sequence(self.config.max_model_len, model.config.context_limit)
        empty = model.init_state(1)
        n_slots = min(self.config.max_num_seqs, StatePool.slots_within(empty, self.config.state_memory))
        self.pool = StatePool(empty, n_slots)
        self.runner = make_runner(model, self.pool.states, self.config.chunk_size, self.config.quantize)
        self.model = self.runner.model
        self.num_parameters = model.num_parameters
        self.fingerprint = fingerprint(model, self.config.quantize or "")
        self.prefix_cache = PrefixCache(self.config.prefix_cache_bytes, self.fingerprint)
        self._processor = TokenProcessor(tokenizer)
        self.scheduler = Scheduler(
            n_slots=n_slots,
            chunk_size=self.config.chunk_size,
            max_num_batched_tokens=self.config.batched_tokens,
        )
        self._running: list[Sequence] = []
        self._read_so_far: dict[Request, Snapshot] = {}  # after [0, num_computed_tokens) of prompts being read

    @property
    def has_work(self) -> bool:
        return bool(self._running or self.scheduler.num_reading or self.scheduler.num_waiting)

    @property
    def _pads(self) -> bool:
        """Whether batches must always be full, and prompts always cut alike, to give the same bits."""
        return self.config.batch_invariant and not self.runner.is_exact

    @property
    def num_running(self) -> int:
        """Texts being decoded."""
        return len(self._running)

    def check_request(self, request: Request) -> None:
        """Raises InvalidRequestError or SamplingError if the request can never run. May be called from any thread."""
        params, vocab_size = request.params, self.model.config.vocab_size
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
            raise InvalidRequestError(
                f"A prompt of {n_given} tokens and {params.max_tokens} new ones make {total}, but at most "
                f"{self.max_model_len} are allowed here."
            )

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises as `check_request`."""
        self.check_request(request)
        self.scheduler.add(request, self._clock())

    def abort_request(self, request_id: str) -> None:
        """Drop a request wherever it is. Its slots are free at once."""
        self._remove(lambda request: request.request_id == request_id)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Advance every running text by a token and some prompts by a chunk. What fails ends with an error output."""
        outputs = self._expire()
        if self._running:
            outputs += self._decode()
        for request in self.scheduler.admit():
            request.admitted_at = self._clock()
            self._find_prefix(request)
        for request, end in list(self.scheduler.chunks(self.num_running)):
            try:
                outputs += self._read(request, end)
            except Exception as problem:
                outputs.append(self._fail(request, failure(problem)))
        return outputs

    def _expire(self) -> list[RequestOutput]:
        now = self._clock()
        return [
            RequestOutput(request.request_id, error=RequestTimeoutError("The request was not done by its deadline."))
            for request in self._remove(lambda request: request.deadline <= now)
        ]

    # Reading prompts

    def _find_prefix(self, request: Request) -> None:
        """Go on from the longest cached prefix. Log-probabilities of the prompt need all of it read."""
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)
        if request.start is not None:
            self._read_so_far[request] = request.start.snapshot
        if request.start is not None or request.params.prompt_logprobs is not None:
            return
        multiple_of = self.config.chunk_size if self._pads else 1
        n_cached, snapshot = self.prefix_cache.match(request.prompt_array, request.cache_salt, multiple_of)
        if snapshot is not None:
            request.num_computed_tokens = request.num_cached_tokens = n_cached
            self._read_so_far[request] = snapshot

    def _read(self, request: Request, end: int) -> list[RequestOutput]:
        """Read the prompt up to token `end`; if that is all of it, the texts start."""
        start, before = request.num_computed_tokens, self._read_so_far.pop(request, None)
        if start < end:
            after = self._read_chunk(request, start, end, before.state if before else None)
            request.num_computed_tokens = end
            self._remember(request, request.prompt_array[:end], after)
        else:
            assert before is not None
            after = before
        if end < request.num_prompt_tokens:
            self._read_so_far[request] = after
            return []
        return self._start_texts(request, after)

    def _read_chunk(self, request: Request, start: int, end: int, state: AFTState | None) -> Snapshot:
        hidden, state = self.runner.read(request.prompt_ids[start:end], state)
        n_top = request.params.prompt_logprobs
        if n_top is not None:
            following = request.prompt_ids[start + 1 : end + 1]
            logits = self.model.logits(hidden[: len(following)]).cpu()
            request.prompt_logprobs += prompt_logprobs(logits, following, n_top)
        is_all = end == request.num_prompt_tokens
        return Snapshot(state, self.model.logits(hidden[-1]).cpu() if is_all else None)

    def _start_texts(self, request: Request, prompt: Snapshot) -> list[RequestOutput]:
        """Fork the state after the prompt for every text, and choose the first token of each."""
        n = request.params.n_generated
        sequences = [self._new_sequence(request, index) for index in range(n)]
        self.scheduler.finish_reading(request)
        if request.params.max_tokens == 0:
            self.scheduler.free_slots(n)
            after = Conversation(prompt) if request.keep_conversation else None
            length = FinishReason.LENGTH
            return [RequestOutput(request.request_id, i, finish_reason=length, conversation=after) for i in range(n)]
        assert prompt.logits is not None
        first_row = self.num_running
        for sequence in sequences:
            self.pool.append(prompt.state)
            self._running.append(sequence)
        return self._advance(first_row, prompt.logits.expand(n, -1))

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        params, matcher = request.params, request.matcher.copy() if request.matcher else None
        return Sequence(
            request,
            index,
            Sampler(params, request.prompt_ids, self.tokenizer, index, first=[matcher] if matcher else []),
            Detokenizer(params.stop, include_stop=params.include_stop),
            matcher,
        )

    # Decoding

    def _decode(self) -> list[RequestOutput]:
        n_rows = self.pool.n_slots if self._pads else self.num_running
        last_ids = [sequence.token_ids[-1] for sequence in self._running]
        last_ids += [0] * (n_rows - self.num_running)
        logits = self.runner.step_(last_ids)
        self.pool.rewind_free()
        return self._advance(0, logits[: self.num_running].cpu())

    def _advance(self, first_row: int, logits: Tensor) -> list[RequestOutput]:
        """Choose a token for each running text from `first_row` on, by logits [R, V], and let go those that end."""
        outputs = self._processor.process(self._running[first_row:], logits)
        failed: dict[str, RequestOutput] = {}
        for i in reversed(range(len(outputs))):  # removing a row moves the last one: rows before it stay
            output, sequence = outputs[i], self._running[first_row + i]
            if output.error is not None:
                failed[output.request_id] = output
            elif output.finish_reason is not None:
                outputs[i] = self._keep(output, sequence, first_row + i, logits[i])
                self._release(first_row + i)
        for output in failed.values():
            self._remove(lambda request, failed=output.request_id: request.request_id == failed)  # type: ignore[misc]
        return [output for output in outputs if output.request_id not in failed] + list(failed.values())

    # Ends

    def _release(self, row: int) -> None:
        """Give up the row and the slot of a running text; the last row takes its place."""
        self.pool.remove(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last
        self.scheduler.free_slots(1)

    def _remove(self, should_go: Callable[[Request], bool]) -> list[Request]:
        """Drop requests wherever they are."""
        removed = self.scheduler.remove(should_go)
        for request in removed:
            self._read_so_far.pop(request, None)
        for row in reversed(range(self.num_running)):
            request = self._running[row].request
            if should_go(request):
                self._release(row)
                if request not in removed:
                    removed.append(request)
        return removed

    def _fail(self, request: Request, error: ServerError) -> RequestOutput:
        self._remove(lambda other: other is request)
        return RequestOutput(request.request_id, error=error)

    # The prefix cache

    def _caches(self, request: Request) -> bool:
        """Keys are of all tokens from the first: those of a conversation are not known."""
        return bool(self.config.prefix_cache_bytes) and request.start is None

    def _remember(self, request: Request, token_ids: Items[int], snapshot: Snapshot) -> None:
        if self._caches(request):
            self.prefix_cache.put(token_ids, snapshot, request.cache_salt)

    def _keep(self, output: RequestOutput, sequence: Sequence, row: int, logits: Tensor) -> RequestOutput:
        """At the end of a text: a next turn goes on from here. The last token was chosen, but not read."""
        request, (*read, last) = sequence.request, sequence.token_ids
        # Where decoding and reading round differently, a batch-invariant engine must not go on from a decoded state.
        is_cached = bool(read) and self._caches(request) and not self._pads
        if not (is_cached or request.keep_conversation):
            return output
        snapshot = Snapshot(self.pool.snapshot(row), logits.clone())
        if is_cached:
            ids = request.prompt_array + array("i", read)
            self.prefix_cache.put(ids, snapshot, request.cache_salt, is_generated=True)
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
