"""What a text may be asked to be: parameters, each checked when it is given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from model.errors import ModelError

SEED_BITS = 53  # of seeds that are drawn: JavaScript has no larger whole numbers to give them back in
LARGEST = 1e30  # of penalties and biases, and of logits after them: products and sums stay far from overflow


class SamplingError(ModelError, ValueError):
    """A sampling parameter is out of range, or leaves no token to choose."""


@dataclass(frozen=True)
class Grammar:
    """What the text must match: kind "json_schema", "regex" or "grammar" (of Lark's or llama.cpp's form), its source.

    name: the field that asked for it, in sentences about it.
    """

    kind: str
    source: str
    name: str = field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "grammar"):
            raise SamplingError(f"grammar kind must be json_schema, regex or grammar, not {self.kind!r}.")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any], name: str = "grammar") -> Self:
        """From a schema, or its text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema), name)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a text is generated. Raises SamplingError, naming the field, for any value out of range.

    n, best_of           texts to return, and to generate; the ones of highest mean log-probability are returned
    max_tokens           tokens of each text at most; 0 only reads the prompt
    min_tokens           tokens before which no end-of-text or stop token can be chosen, and no stop string counts
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
    watermark            makes half of the vocabulary likelier, see `model.sampling.watermark`
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
        for name in ("allowed_token_ids", "banned_token_ids"):  # a million of them may be a few
            if ids := getattr(self, name):
                object.__setattr__(self, name, tuple(dict.fromkeys(ids)))
        require("allowed_token_ids", self.allowed_token_ids != (), "None or at least one token")
        require("stop", "" not in self.stop, "strings of at least one character")
        require("seed", 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")
        require("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        require("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "at least 0")

    @property
    def n_generated(self) -> int:
        """Texts to generate."""
        return self.best_of if self.best_of is not None else self.n

    def end_ids(self, end_of_text_id: int) -> tuple[int, ...]:
        """Tokens that end a text."""
        return (*self.stop_token_ids, *(() if self.ignore_eos else (end_of_text_id,)))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises SamplingError for a token id that the model does not have."""
        fields = {
            "logit_bias": tuple(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "banned_token_ids": self.banned_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in fields.items():
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
                raise SamplingError(f"{name} must hold token ids from 0 to {vocab_size - 1}, not {bad}.")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise SamplingError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")


GREEDY = SamplingParams(temperature=0.0)
