"""A text put together from the outputs of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

from server.engine.request import FinishReason, RequestOutput, TokenOutput


@dataclass
class Completion:
    """One generated text."""

    index: int
    tokens: list[TokenOutput] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> Self:
        """What one output adds to its text."""
        completion = cls(output.index)
        completion.add(output)
        return completion

    def add(self, output: RequestOutput) -> None:
        if output.token is not None:
            self.tokens.append(output.token)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens if not token.special)

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def mean_logprob(self) -> float:
        """In nats per token; -inf without tokens."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else -math.inf


def best(completions: list[Completion], n: int) -> list[Completion]:
    """The n completions of highest mean log-probability, best first; all in their order if there are just n."""
    if len(completions) == n:
        return completions
    return sorted(completions, key=lambda completion: completion.mean_logprob, reverse=True)[:n]
