"""Choosing the next token of each sequence of a batch from its logits.

Every row is computed from its own logits, parameters and random generator alone, so what a sequence draws does not
depend on what else is in the batch. Shapes: B sequences, R of them (rows), V vocabulary. All on the CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from model.errors import ModelError
from model.watermark import DELTA, green_list

SEED_BITS = 53  # of seeds that are drawn: JavaScript has no larger whole numbers to give them back in
LARGEST = 1e30  # of penalties and biases, and of logits after them: products and sums stay far from overflow


class SamplingError(ModelError, ValueError):
    """A sampling parameter is out of range, or leaves no token to choose."""


@dataclass(frozen=True)
class Grammar:
    """What the text must match: kind "json_schema" or "regex", and its source."""

    kind: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex"):
            raise SamplingError(f"grammar kind must be json_schema or regex, not {self.kind!r}.")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Self:
        """From a schema, or its text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a text is generated. Raises SamplingError, naming the field, for any value out of range.

    n, best_of           texts to return, and to generate; the ones of highest mean log-probability are returned
    max_tokens           tokens of each text at most; 0 only reads the prompt
    min_tokens           tokens before which no end-of-text or stop token can be chosen
    temperature          divides the logits; 0 takes the most likely token
    top_k                only the k most likely tokens; None for all
    top_p                only the fewest most likely tokens whose probabilities reach p
    typical_p            only the fewest tokens nearest to the expected information whose probabilities reach p
                         (Meister et al. 2022)
    min_p                only tokens at least min_p times as likely as the most likely one
    repetition_penalty   logits of tokens in prompt or text are divided (if positive) or multiplied by it
                         (Keskar et al. 2019)
    frequency_penalty    is taken from a token's logit as often as the text has it
    presence_penalty     is taken from a token's logit once if the text has it
    logit_bias           is added to the logits of these token ids
    allowed_token_ids    only these; None for all
    banned_token_ids     none of these
    stop                 the text ends before the first of these strings
    stop_token_ids       the text ends with the first of these tokens
    ignore_eos           whether end of text is a token like others
    include_stop         whether the stop string stays in the text
    watermark            makes half of the vocabulary likelier, see `model.watermark`
    seed                 of the random generator of the first text; text i has seed + i
    logprobs             how many most likely tokens to report beside each token; None reports none
    prompt_logprobs      the same for the tokens of the prompt
    grammar              what the text must match
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    watermark: bool = False
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        require = self._require
        require("n", self.n >= 1, "at least 1")
        require("best_of", self.best_of is None or self.best_of >= self.n, f"at least n = {self.n}")
        require("max_tokens", self.max_tokens >= 0, "at least 0")
        require("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens = {self.max_tokens}")
        require("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite")
        require("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        require("repetition_penalty", 0 < self.repetition_penalty <= LARGEST, f"above 0 and at most {LARGEST:g}")
        for name in ("frequency_penalty", "presence_penalty"):
            require(name, abs(getattr(self, name)) <= LARGEST, f"from {-LARGEST:g} to {LARGEST:g}")
        biases = self.logit_bias.values()
        require(
            "logit_bias", all(abs(b) <= LARGEST for b in biases), f"from {-LARGEST:g} to {LARGEST:g} for each token"
        )
        require("allowed_token_ids", self.allowed_token_ids != (), "None or at least one token")
        require("stop", "" not in self.stop, "strings of at least one character")
        require("seed", 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")
        require("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        require("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "at least 0")

    @property
    def n_generated(self) -> int:
        """Texts to generate."""
        return self.best_of if self.best_of is not None else self.n

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises SamplingError for a token id that the model does not have."""
        fields = {
            "logit_bias": tuple(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "banned_token_ids": self.banned_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in fields.items():
            if bad := [token_id for token_id in ids if not 0 <= token_id < vocab_size]:
                raise SamplingError(f"{name} must hold token ids from 0 to {vocab_size - 1}, not {bad[0]}.")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise SamplingError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")


GREEDY = SamplingParams(temperature=0.0)


class Sampler:
    """What the choice of one sequence's tokens depends on besides the logits: parameters, tokens so far, generator."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, end_of_text_id: int, index: int = 0
    ) -> None:
        self.params, self.vocab_size = params, vocab_size
        self.n_tokens = 0
        self.end_ids = (*params.stop_token_ids, *(() if params.ignore_eos else (end_of_text_id,)))
        self._previous_id = prompt_ids[-1] if prompt_ids else end_of_text_id
        self._generator = torch.Generator().manual_seed((params.seed + index) % 2**64)
        self._bias = self._static_bias()
        self._counts: Tensor | None = None  # [V], how often the text has each token
        self._seen: Tensor | None = None  # [V], whether prompt or text has it
        if params.frequency_penalty or params.presence_penalty:
            self._counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt_ids, dtype=torch.long)] = True

    @property
    def adjusts(self) -> bool:
        too_short = self.n_tokens < self.params.min_tokens
        penalises = self._counts is not None or self._seen is not None
        return too_short or penalises or self._bias is not None or self.params.watermark

    def adjust(self, logits: Tensor) -> None:
        """Apply penalties, biases and bans to logits [V], in place."""
        params = self.params
        if self._seen is not None:
            scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            torch.where(self._seen, scaled, logits, out=logits)
        if self._counts is not None:
            logits -= params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            logits += self._bias
        if params.watermark:
            logits += DELTA * green_list(self._previous_id, self.vocab_size)
        if self.n_tokens < params.min_tokens:
            logits[list(self.end_ids)] = -math.inf
        # A penalty near 0 takes a logit to infinity; the most likely tokens then are equally likely.
        logits.nan_to_num_(nan=-math.inf, posinf=LARGEST, neginf=-math.inf)

    def uniform(self) -> float:
        """The sequence's next random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def observe(self, token_id: int) -> None:
        """Count a token that was chosen."""
        self.n_tokens += 1
        self._previous_id = token_id
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    def _static_bias(self) -> Tensor | None:
        params = self.params
        if not (params.logit_bias or params.banned_token_ids or params.allowed_token_ids is not None):
            return None
        bias = torch.zeros(self.vocab_size)
        for token_id, value in params.logit_bias.items():
            bias[token_id] = value
        if params.allowed_token_ids is not None:
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
            allowed[list(params.allowed_token_ids)] = True
            bias[~allowed] = -math.inf
        bias[list(params.banned_token_ids)] = -math.inf
        return bias


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | SamplingError]:
    """The next token id for each row of logits [B, V], or why there is none. Entries may be -inf. Not modified."""
    if any(sampler.adjusts for sampler in samplers):
        logits = logits.clone()
        for row, sampler in zip(logits, samplers, strict=True):
            if sampler.adjusts:
                sampler.adjust(row)
    best, best_ids = logits.max(-1)
    rows = [i for i, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if rows:
        drawn = _draw(logits if len(rows) == len(samplers) else logits[rows], [samplers[i] for i in rows])
        best_ids[rows] = drawn
    results: list[int | SamplingError] = []
    for sampler, value, token_id in zip(samplers, best.tolist(), best_ids.tolist(), strict=True):
        if value == -math.inf:
            results.append(SamplingError("Grammar, bans and min_tokens together leave no token to choose."))
        else:
            sampler.observe(token_id)
            results.append(token_id)
    return results


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
