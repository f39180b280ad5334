"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from model.sampling import Sampler, Sampling
from server.engine.detokenizer import Detokenizer


class FinishReason(StrEnum):
    LENGTH = "length"
    END_OF_TEXT = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. text is what it adds to the stream, which may be nothing yet, or more than the token.

    logprob in nats, of the model itself, before temperature and filters; finish_reason on the last token only.
    """

    token_id: int
    text: str
    logprob: float
    special: bool
    finish_reason: FinishReason | None = None


@dataclass
class Request:
    """A sequence to be generated, and how far it has come."""

    request_id: str
    prompt_ids: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 100
    stop: tuple[str, ...] = ()
    n_generated: int = field(default=0, init=False)
    last_token_id: int = field(default=-1, init=False)
    sampler: Sampler = field(init=False)
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling)
        self.detokenizer = Detokenizer(self.stop)
