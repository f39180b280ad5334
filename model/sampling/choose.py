"""How a batch chooses: the next token of each sequence from its logits.

Every row is computed from its own logits, parameters and random generator alone, so what a sequence draws does not
depend on what else is in the batch. Shapes: B sequences, R of them (rows), V vocabulary. All on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.sampling.adjust import Step, Vocabulary, steps
from model.sampling.params import LARGEST, SamplingError, SamplingParams


class Sampler:
    """What the choice of one text's tokens depends on besides the logits: parameters, steps, generator.

    index: which of the texts of `params` it is; first: steps of the caller's own, before those of the parameters.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocabulary: Vocabulary,
        index: int = 0,
        first: Sequence[Step] = (),
    ) -> None:
        self.params = params
        self.end_ids = params.end_ids(vocabulary.end_of_text_id)
        self.steps = [*first, *steps(params, prompt_ids, vocabulary)]
        self._generator = _generator(params, index)

    def fork(self, index: int, first: Sequence[Step] = ()) -> Sampler:
        """Of text `index` of the same request, which goes on from here; first: steps of its own, before the others."""
        forked = copy.copy(self)
        forked.steps = [*first, *(step.copy() for step in self.steps)]
        forked._generator = _generator(self.params, index)
        return forked

    def adjust(self, logits: Tensor) -> None:
        """Take every step on logits [V], in place."""
        for step in self.steps:
            step.adjust(logits)
        # A penalty near 0 takes a logit to infinity; the most likely tokens then are equally likely.
        logits.nan_to_num_(nan=-math.inf, posinf=LARGEST, neginf=-math.inf)

    def uniform(self) -> float:
        """The sequence's next random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def observe(self, token_id: int) -> None:
        """Remember a token that was chosen."""
        for step in self.steps:
            step.observe(token_id)


def _generator(params: SamplingParams, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((params.seed + index) % 2**64)


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | Exception]:
    """The next token id for each row of logits [B, V], or why there is none: a SamplingError, or what a step raised.

    Entries may be -inf. Not modified.
    """
    failed: dict[int, Exception] = {}
    if any(sampler.steps for sampler in samplers):
        logits = logits.clone()
        for row, sampler in enumerate(samplers):
            if sampler.steps:
                try:
                    sampler.adjust(logits[row])
                except Exception as problem:  # of this row alone
                    failed[row] = problem
    best, best_ids = logits.max(-1)
    rows = [i for i, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if rows:
        drawn = _draw(logits if len(rows) == len(samplers) else logits[rows], [samplers[i] for i in rows])
        best_ids[rows] = drawn
    return [
        failed[row] if row in failed else _chosen(samplers[row], value, token_id)
        for row, (value, token_id) in enumerate(zip(best.tolist(), best_ids.tolist(), strict=True))
    ]


def _chosen(sampler: Sampler, logit: float, token_id: int) -> int | Exception:
    """The token, once the text's steps know of it."""
    if logit == -math.inf:
        return SamplingError("Grammar, bans and min_tokens together leave no token to choose.")
    try:
        sampler.observe(token_id)
    except Exception as problem:
        return problem
    return token_id


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw a token id for each row of logits [R, V]: temperature, top-k, top-p, min-p, typical-p, then by chance."""
    params = [sampler.params for sampler in samplers]
    # The largest logit is subtracted first: a temperature near 0 then gives -inf, not inf - inf.
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / _column([p.temperature for p in params])
    for applies, keep in (
        (lambda p: p.top_k is not None or p.top_p < 1, _keep_top),
        (lambda p: p.min_p > 0, _keep_min_p),
        (lambda p: p.typical_p < 1, _keep_typical),
    ):
        _filter(logits, params, applies, keep)
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    point = _column([sampler.uniform() for sampler in samplers]) * total
    # Never the total itself: the first entry beyond the point then is a token that has a probability.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)


def _filter(
    logits: Tensor,
    params: Sequence[SamplingParams],
    applies: Callable[[SamplingParams], bool],
    keep: Callable[[Tensor, Sequence[SamplingParams]], Tensor],
) -> None:
    """Set to -inf, in place, what `keep` does not keep in the rows that it applies to."""
    rows = [i for i, p in enumerate(params) if applies(p)]
    if rows:
        chosen = logits[rows]
        logits[rows] = chosen.masked_fill(~keep(chosen, [params[i] for i in rows]), -math.inf)


def _keep_top(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, then top-p of what that leaves. Of equally likely tokens those of smaller id come first."""
    vocab_size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    k = _column([min(p.top_k or vocab_size, vocab_size) for p in params])
    within_k = torch.arange(vocab_size) < k
    probabilities = ordered.masked_fill(~within_k, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = _column([p.top_p for p in params])
    kept = within_k & ((before < top_p) | (top_p == 1))
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _keep_min_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True)).exp() >= _column([p.min_p for p in params])


def _keep_typical(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    information = -log_probabilities
    entropy = (probabilities * information.masked_fill(probabilities == 0, 0.0)).sum(-1, keepdim=True)
    order = (information - entropy).abs().sort(dim=-1, stable=True).indices
    ordered = probabilities.gather(-1, order)
    kept = ordered.cumsum(-1) - ordered < _column([p.typical_p for p in params])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
