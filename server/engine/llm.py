"""Generation from Python, without a server: a checkpoint, a list of prompts, their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint
from model.errors import ModelError
from model.sampling import SamplingParams
from server.engine.completion import Completion, best
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.request import PromptLogprob, Request, RequestOutput, TokenOutput
from server.engine.structured_output import GrammarCompiler
from server.errors import InvalidRequestError, ServerError

Prompt = str | list[int]


@dataclass
class Result:
    """What came of a prompt: `params.n` completions, best first if there were more to choose from, or an error."""

    prompt: Prompt
    prompt_token_ids: list[int]
    completions: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: list[PromptLogprob | None] = field(default_factory=list)
    error: ServerError | ModelError | None = None


class LLM:
    """A checkpoint and an engine.

    >>> LLM("weights/aft-conv-stories").generate(["Once upon a time"], SamplingParams(max_tokens=50))
    """

    def __init__(
        self, path: Path | str, config: EngineConfig | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        """Raises CheckpointError for a damaged checkpoint."""
        model, self.tokenizer = load_checkpoint(path, device)
        self.engine = LLMEngine(model, self.tokenizer, config)
        self._grammars = GrammarCompiler(self.tokenizer, self.engine.config.grammar_timeout)
        self._is_streaming = False

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> list[Result]:
        """Results in the order of `prompts`; params for all of them, or one for each."""
        results: dict[int, Result] = dict(self.stream(prompts, params))
        return [results[i] for i in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[tuple[int, Result]]:
        """(index of the prompt, result) as they are done. A prompt that fails has a result with an error.

        One stream at a time, of these or of `tokens`; closing it drops what is not done.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts, but {len(each)} parameters.")
        with self._alone():
            yield from self._stream(prompts, each)

    def tokens(self, prompt: Prompt, params: SamplingParams) -> Iterator[TokenOutput]:
        """The tokens of one text as they come. One stream at a time, as `stream` says.

        Raises what `generate` puts into the result, and InvalidRequestError for parameters of several texts.
        """
        if params.n_generated > 1:
            raise InvalidRequestError(f"n and best_of must be 1 for the tokens of one text, not {params.n_generated}.")
        with self._alone():
            request = self._add("0", prompt, params)
            try:
                while True:
                    for output in self._step():
                        if output.request_id != request.request_id:
                            continue
                        if output.error is not None:
                            raise output.error
                        if output.token is not None:
                            yield output.token
                        if output.finish_reason is not None:
                            return
            finally:
                self.engine.abort_request(request.request_id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises RuntimeError while another stream is open: their requests would be taken for one another's."""
        if self._is_streaming or self.engine.has_work:
            raise RuntimeError("Another stream of this LLM is not done; close it first.")
        self._is_streaming = True
        try:
            yield
        finally:
            self._is_streaming = False

    def _stream(self, prompts: Sequence[Prompt], each: Sequence[SamplingParams]) -> Iterator[tuple[int, Result]]:
        pending: dict[str, tuple[int, Request, list[Completion]]] = {}
        next_prompt = 0
        try:
            while next_prompt < len(prompts) or pending:
                # Few enough wait that a huge list of prompts is not tokenised at once, enough to keep the batch full.
                while next_prompt < len(prompts) and self.engine.scheduler.num_waiting < self.engine.pool.n_slots:
                    try:
                        request = self._add(f"{next_prompt}", prompts[next_prompt], each[next_prompt])
                    except (ServerError, ModelError) as error:
                        yield next_prompt, Result(prompts[next_prompt], [], [], error=error)
                    else:
                        completions = [Completion(i) for i in range(request.params.n_generated)]
                        pending[request.request_id] = next_prompt, request, completions
                    next_prompt += 1
                for output in self._step() if pending else ():
                    index, request, completions = pending[output.request_id]
                    if _is_done(output, completions):
                        del pending[output.request_id]
                        yield index, _result(prompts[index], request, completions, output.error)
        finally:
            for request_id in pending:
                self.engine.abort_request(request_id)

    def _step(self) -> list[RequestOutput]:
        """Raises RuntimeError if there is nothing to step, though a request is not done: it would never be."""
        if not self.engine.has_work:
            raise RuntimeError("The engine has no work left, and requests that are not done: somebody aborted them.")
        return self.engine.step()

    def _add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        matcher = self._grammars.compile(params.grammar) if params.grammar else None
        request = Request(request_id, ids, params, matcher=matcher)
        self.engine.add_request(request)
        return request


def _is_done(output: RequestOutput, completions: list[Completion]) -> bool:
    """Take in an output; whether the request has ended with it."""
    completion = completions[output.index]
    completion.add(output)
    return output.error is not None or all(completion.finish_reason for completion in completions)


def _result(prompt: Prompt, request: Request, completions: list[Completion], error: ServerError | None) -> Result:
    return Result(
        prompt,
        request.prompt_ids,
        best(completions, request.params.n),
        request.num_cached_tokens,
        request.prompt_logprobs,
        error,
    )
