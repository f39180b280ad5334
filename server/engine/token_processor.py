"""From logits to outputs: chooses each text's next token, turns it into text, and sees where texts end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import ModelError
from model.sampling import sample
from model.tokenizer import Tokenizer
from server.engine.request import FinishReason, PromptLogprob, RequestOutput, Text, TokenOutput, TopLogprobs
from server.errors import GenerationError, ServerError

logger = logging.getLogger(__name__)

LONGEST_SUM = 2**15  # addends; PyTorch cuts longer ones for its threads, and elsewhere in batches of other sizes


class TokenProcessor:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def process(self, texts: Sequence[Text], logits: Tensor) -> list[RequestOutput]:
        """The next output of each text from its row of logits [R, V], on the CPU.

        What goes wrong with one text becomes the error of its output, and touches no other.
        """
        normalizers = log_normalizers(logits)  # not finite where a logit is NaN or infinity, or all are -infinity
        errors: dict[int, ServerError] = {
            row: GenerationError("The model's logits are not finite.")
            for row, total in enumerate(normalizers.tolist())
            if not math.isfinite(total)
        }
        good = [row for row in range(len(texts)) if row not in errors]
        chosen = sample(logits if not errors else logits[good], [texts[row].sampler for row in good])
        token_ids = dict(zip(good, chosen, strict=True))
        # A row without a token looks up token 0, and throws that away.
        column = [i if isinstance(i := token_ids.get(row), int) else 0 for row in range(len(texts))]
        logprobs = (logits.gather(-1, torch.tensor(column).unsqueeze(-1)).squeeze(-1) - normalizers).tolist()
        outputs = []
        for row, text in enumerate(texts):
            error, token_id = errors.get(row), token_ids.get(row)
            if isinstance(token_id, Exception):
                error = failure(token_id)
            elif token_id is not None:
                n_top = text.request.params.logprobs
                top = None if n_top is None else top_logprobs(logits[row] - normalizers[row], n_top)
                try:
                    outputs.append(self._output(text, token_id, logprobs[row], top))
                    continue
                except Exception as problem:
                    error = failure(problem)
            outputs.append(RequestOutput(text.request.request_id, text.index, error=error))
        return outputs

    def _output(self, text: Text, token_id: int, logprob: float, top: TopLogprobs | None) -> RequestOutput:
        released, special, reason = self._read(text, token_id)
        token = TokenOutput(token_id, released, logprob, special, top)
        stopped = reason is FinishReason.STOP_SEQUENCE
        stop_reason = (text.detokenizer.stopped_by or token_id) if stopped else None
        return RequestOutput(text.request.request_id, text.index, token, reason, stop_reason)

    def _read(self, text: Text, token_id: int) -> tuple[str, bool, FinishReason | None]:
        """Add a token to a text: what that releases, whether the token is special, and why it was the last one."""
        text.token_ids.append(token_id)
        detokenizer, params = text.detokenizer, text.request.params
        if token_id in text.sampler.end_ids:
            is_end_of_text = token_id == self.tokenizer.end_of_text_id
            end = FinishReason.END_OF_TEXT if is_end_of_text else FinishReason.STOP_SEQUENCE
            # Text held back as the possible start of a stop string must not be lost: it goes out with this token.
            tail = detokenizer.finish()
            return tail or self.tokenizer.token_text(token_id), not tail, end
        token_bytes = self.tokenizer.token_bytes[token_id]
        released = detokenizer.append(token_bytes)
        reason: FinishReason | None = None
        if detokenizer.stopped_by is not None:
            return released, False, FinishReason.STOP_SEQUENCE
        if text.matcher and text.matcher.is_complete:
            reason = FinishReason.END_OF_TEXT
        elif len(text.token_ids) == params.max_tokens:
            reason = FinishReason.LENGTH
        released += detokenizer.finish() if reason else ""
        return released, not token_bytes and not released, reason


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], n_top: int) -> list[PromptLogprob]:
    """Of each of `token_ids` [T], from the logits [T, V] of the position before it."""
    log_probabilities = logits - log_normalizers(logits).unsqueeze(-1)
    return [
        PromptLogprob(token_id, float(row[token_id]), top_logprobs(row, n_top))
        for row, token_id in zip(log_probabilities, token_ids, strict=True)
    ]


def log_normalizers(logits: Tensor) -> Tensor:
    """What is taken from each row of logits [R, V] to make log-probabilities of it [R]: the same bits in any batch."""
    if logits.shape[-1] <= LONGEST_SUM:
        return logits.logsumexp(-1)
    return torch.stack([row.logsumexp(-1) for row in logits])


def top_logprobs(log_probabilities: Tensor, n_top: int) -> TopLogprobs:
    """The `n_top` most likely tokens by log-probabilities [V]."""
    values, ids = log_probabilities.topk(min(n_top, len(log_probabilities)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def failure(problem: Exception) -> ServerError:
    """The error that a client is told. One that is not ours is logged, and says nothing of its inside."""
    if isinstance(problem, ServerError):
        return problem
    if isinstance(problem, ModelError):
        return GenerationError(str(problem))
    logger.error("A request failed.", exc_info=problem)
    return GenerationError("Generation failed in the server.")
