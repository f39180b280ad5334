"""What one text remembers of its tokens, and how that changes the logits of its next one. V: vocabulary. On the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.sampling.params import SamplingParams
from model.sampling.watermark import DELTA, green_list


class Vocabulary(Protocol):
    """What a step may ask of a tokenizer: V, the bytes that each id stands for, and the token that ends a text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def end_of_text_id(self) -> int: ...


class Step(Protocol):
    """One change of one text's logits. What it raises ends that text, and touches no other."""

    def adjust(self, logits: Tensor) -> None:
        """Change the logits [V] of the next token, in place. Entries may be -inf."""

    def observe(self, token_id: int) -> None:
        """Remember a token that was chosen."""

    def copy(self) -> Step:
        """For another text of the same request, that goes on from here. What never changes is shared."""


def steps(params: SamplingParams, prompt_ids: Sequence[int], vocabulary: Vocabulary) -> list[Step]:
    """Only those that the parameters ask for, in the order in which they apply."""
    vocab_size, end_of_text_id = vocabulary.vocab_size, vocabulary.end_of_text_id
    asked: list[Step] = []
    if params.repetition_penalty != 1.0:
        asked.append(RepetitionPenalty(params.repetition_penalty, prompt_ids, vocab_size))
    if params.frequency_penalty or params.presence_penalty:
        asked.append(CountPenalties(params.frequency_penalty, params.presence_penalty, vocab_size))
    if params.logit_bias or params.banned_token_ids or params.allowed_token_ids is not None:
        asked.append(Bias(params.logit_bias, params.allowed_token_ids, params.banned_token_ids, vocab_size))
    if params.watermark:
        asked.append(Watermark(prompt_ids[-1] if prompt_ids else end_of_text_id, vocab_size))
    if params.min_tokens:
        asked.append(MinTokens(params.min_tokens, params.end_ids(end_of_text_id)))
    return asked


class RepetitionPenalty:
    """Of tokens that prompt or text have."""

    def __init__(self, penalty: float, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self._penalty = penalty
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[_ids(prompt_ids)] = True

    def adjust(self, logits: Tensor) -> None:
        scaled = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        torch.where(self._seen, scaled, logits, out=logits)

    def observe(self, token_id: int) -> None:
        self._seen[token_id] = True

    def copy(self) -> RepetitionPenalty:
        copied = copy.copy(self)
        copied._seen = self._seen.clone()
        return copied


class CountPenalties:
    """Frequency and presence: by how often the text has each token, and by whether it has it."""

    def __init__(self, frequency: float, presence: float, vocab_size: int) -> None:
        self._frequency, self._presence = frequency, presence
        self._counts = torch.zeros(vocab_size)

    def adjust(self, logits: Tensor) -> None:
        logits -= self._frequency * self._counts + self._presence * (self._counts > 0)

    def observe(self, token_id: int) -> None:
        self._counts[token_id] += 1

    def copy(self) -> CountPenalties:
        copied = copy.copy(self)
        copied._counts = self._counts.clone()
        return copied


class Bias:
    """The same at every token: biases, and bans of those that are banned or not allowed."""

    def __init__(
        self, biases: Mapping[int, float], allowed: Sequence[int] | None, banned: Sequence[int], vocab_size: int
    ) -> None:
        self._bias = torch.zeros(vocab_size)
        self._bias[_ids(list(biases))] = torch.tensor(list(biases.values()), dtype=torch.float32)
        if allowed is not None:
            is_allowed = torch.zeros(vocab_size, dtype=torch.bool)
            is_allowed[_ids(allowed)] = True
            self._bias[~is_allowed] = -math.inf
        self._bias[_ids(banned)] = -math.inf

    def adjust(self, logits: Tensor) -> None:
        logits += self._bias

    def observe(self, token_id: int) -> None:
        pass

    def copy(self) -> Bias:
        return self


class Watermark:
    """DELTA for the tokens that are green after the one before."""

    def __init__(self, previous_id: int, vocab_size: int) -> None:
        self._previous_id, self._vocab_size = previous_id, vocab_size

    def adjust(self, logits: Tensor) -> None:
        logits += DELTA * green_list(self._previous_id, self._vocab_size)

    def observe(self, token_id: int) -> None:
        self._previous_id = token_id

    def copy(self) -> Watermark:
        return copy.copy(self)


class MinTokens:
    """No end while the text is too short."""

    def __init__(self, n_tokens: int, end_ids: Sequence[int]) -> None:
        self._n_missing, self._end_ids = n_tokens, list(end_ids)

    def adjust(self, logits: Tensor) -> None:
        if self._n_missing > 0:
            logits[self._end_ids] = -math.inf

    def observe(self, token_id: int) -> None:
        self._n_missing -= 1

    def copy(self) -> MinTokens:
        return copy.copy(self)


def _ids(token_ids: Sequence[int]) -> Tensor:
    """As an index. Prompts of a million tokens come as array("i"), which numpy reads in one piece."""
    return torch.from_numpy(np.asarray(token_ids, dtype=np.int64))
