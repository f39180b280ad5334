"""The synchronous engine: every running request advances by one token in one batched step of the model."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from model.sampling import log_probability
from model.state import AFTState
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.transformer import AFTForCausalLM
from server.engine.request import FinishReason, Request, TokenOutput
from server.errors import GenerationError, InvalidRequestError, OverloadedError

PREFILL_CHUNK = 2048  # tokens of a prompt read at a time, which bounds the memory of a prefill

Outputs = list[tuple[str, TokenOutput | GenerationError]]  # by request id


class LLMEngine:
    """Not thread-safe: one thread calls everything.

    Between steps, row i of `_state` belongs to `_running[i]`, and its last token is still to be read.
    """

    def __init__(
        self, model: AFTForCausalLM, tokenizer: Tokenizer, *, max_num_seqs: int = 32, max_queue_length: int = 256
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_num_seqs, self.max_queue_length = max_num_seqs, max_queue_length
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._state: AFTState | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises OverloadedError if the queue is full, InvalidRequestError if it can never run."""
        if len(self._waiting) >= self.max_queue_length:
            raise OverloadedError(f"The queue is full: {self.max_queue_length} requests are waiting already.")
        limit = self.model.config.context_limit
        total = len(request.prompt_ids) + request.max_new_tokens
        if limit is not None and total > limit:
            raise InvalidRequestError(
                f"inputs of {len(request.prompt_ids)} tokens and max_new_tokens of {request.max_new_tokens} make "
                f"{total}, but this model reads at most {limit} tokens."
            )
        self._waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        """Drop a request, waiting or running; its place is free at the next step."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        self._keep([i for i, request in enumerate(self._running) if request.request_id != request_id])

    @torch.inference_mode()
    def step(self) -> Outputs:
        """Read the prompts of requests that there is room for, and generate one token for each running request.

        A request that fails ends with a GenerationError among the outputs; the others go on.
        """
        outputs: Outputs = []
        if self._running:
            assert self._state is not None
            token_ids = torch.tensor([request.last_token_id for request in self._running], device=self.model.device)
            logits, self._state = self.model.step(token_ids, self._state)
            outputs += self._advance(logits.cpu())
        while self._waiting and len(self._running) < self.max_num_seqs:
            outputs += self._start(self._waiting.popleft())
        return outputs

    def _start(self, request: Request) -> Outputs:
        """Read a prompt, generate the first token, and join the batch."""
        prompt = torch.tensor([request.prompt_ids], device=self.model.device)
        state: AFTState | None = None
        for chunk in torch.split(prompt, PREFILL_CHUNK, 1):
            logits, state = self.model.prefill(chunk, state)
        assert state is not None
        output = self._next_output(request, logits[0].cpu())
        if not _is_last(output):
            self._running.append(request)
            self._state = AFTState.concatenate([self._state, state]) if self._state else state
        return [(request.request_id, output)]

    def _advance(self, logits: Tensor) -> Outputs:
        """A token for each running request from logits [B, V]; those that end leave the batch."""
        outputs = [self._next_output(request, row) for request, row in zip(self._running, logits, strict=True)]
        ids = [request.request_id for request in self._running]
        self._keep([i for i, output in enumerate(outputs) if not _is_last(output)])
        return list(zip(ids, outputs, strict=True))

    def _next_output(self, request: Request, logits: Tensor) -> TokenOutput | GenerationError:
        try:
            token_id = request.sampler.next_token(logits)
        except ValueError as error:
            return GenerationError(str(error))
        request.n_generated += 1
        request.last_token_id = token_id
        logprob = log_probability(logits, token_id)
        if token_id == self.tokenizer.end_of_text_id:
            # Text held back as the possible start of a stop string must not be lost; it goes out with this token.
            tail = request.detokenizer.finish()
            return TokenOutput(token_id, tail or END_OF_TEXT, logprob, not tail, FinishReason.END_OF_TEXT)
        text = request.detokenizer.append(self.tokenizer.token_bytes[token_id])
        if request.detokenizer.stopped_by is not None:
            return TokenOutput(token_id, text, logprob, False, FinishReason.STOP_SEQUENCE)
        if request.n_generated == request.max_new_tokens:
            text += request.detokenizer.finish()
            return TokenOutput(token_id, text, logprob, False, FinishReason.LENGTH)
        return TokenOutput(token_id, text, logprob, False)

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self._running):
            self._running = [self._running[i] for i in rows]
            self._state = self._state.select(rows) if self._state and rows else None


def _is_last(output: TokenOutput | GenerationError) -> bool:
    return isinstance(output, GenerationError) or output.finish_reason is not None
