"""Choosing the next token of one sequence from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    do_sample    False takes the most likely token and ignores the rest
    temperature  > 0; logits are divided by it
    top_k        if given, only the k most likely tokens can be drawn
    top_p        if given, only the fewest most likely tokens whose probabilities reach p (0 < p <= 1)
    seed         of the sequence's own random generator, 0 .. 2^64 - 1
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Sampler:
    """Draws the tokens of one sequence from logits on the CPU, so that a seed means the same on every device.

    The generator is the sequence's own, so what it draws depends on no other sequence.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def next_token(self, logits: Tensor) -> int:
        """A token id for logits [V]. Raises ValueError if they are not finite."""
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("The model's logits are not finite.")
        if not self.sampling.do_sample:
            return int(logits.argmax())
        probabilities, ids = self._candidates(logits.double())
        cumulative = probabilities.cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, point, right=True)
        return int(ids[index.clamp(max=len(ids) - 1)])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, in falling order, and ids of the tokens that can be drawn."""
        sampling = self.sampling
        # The largest logit is subtracted first: a temperature near 0 then gives -inf, not inf - inf.
        scaled, ids = ((logits - logits.max()) / sampling.temperature).sort(descending=True, stable=True)
        probabilities = scaled[: sampling.top_k].softmax(0)
        if sampling.top_p is not None:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities[before < sampling.top_p]
        return probabilities, ids[: len(probabilities)]


def log_probability(logits: Tensor, token_id: int) -> float:
    """The model's own log-probability of a token in nats, before temperature and filters; logits [V]."""
    return float(logits[token_id] - logits.logsumexp(0))
