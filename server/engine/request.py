"""What goes into the engine and what comes out."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from model.sampling import Sampler, SamplingParams
from server.engine.conversation import Conversation
from server.engine.detokenizer import Detokenizer
from server.engine.snapshot import KeyHash, Snapshot
from server.engine.structured_output import Matcher
from server.errors import ServerError


class FinishReason(StrEnum):
    """Why a text ended: it has as many tokens as were asked for; its own end; a stop string or a stop token."""

    LENGTH = "length"
    END_OF_TEXT = "end_of_text"
    STOP_SEQUENCE = "stop"


TopLogprobs = tuple[tuple[int, float], ...]  # token id and log-probability, most likely first


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. text is what it adds to the stream, which may be nothing yet, or more than the token.

    logprob in nats, of the model itself, before temperature and filters. A special token is not part of the text.
    """

    token_id: int
    text: str
    logprob: float
    special: bool
    top_logprobs: TopLogprobs | None = None


@dataclass(frozen=True)
class PromptLogprob:
    """Log-probability in nats of a prompt token, given those before it."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


@dataclass(frozen=True)
class RequestOutput:
    """What one step adds to text `index` of a request: a token, its end, or (for the whole request) an error.

    stop_reason: the stop string or the id of the stop token that ended the text; conversation: what the text leaves
    behind at its end, if the request asked for it.
    """

    request_id: str
    index: int = 0
    token: TokenOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    conversation: Conversation | None = None
    error: ServerError | None = None


@dataclass(eq=False)
class Text:
    """One of the texts that a request asks for."""

    request: Request
    index: int
    sampler: Sampler
    detokenizer: Detokenizer
    matcher: Matcher | None
    token_ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """A prompt, what to generate from it, and how far it has come.

    owner        whose request it is; slots are shared among owners, and priorities order the requests of one
    priority     each step of it is worth as much as having waited PRIORITY_SECONDS longer; smaller goes first
    cache_salt   requests share cached prefixes only with those of the same salt
    start        the conversation that the prompt goes on from; prompt_ids begin with its unread tokens
    keep_conversation  whether each text's end brings what it leaves behind
    matcher      compiled from params.grammar; each text goes on from a copy
    sampler      made from params, once, with masks and biases; each text goes on from a fork
    arrived_at, admitted_at  time.monotonic() at which it was asked for, before anything was done for it, and got its
                             first slot

    Tokens [0, num_computed_tokens) of the prompt have been read, of which [0, num_cached_tokens) came from the cache.
    read_state is the state after them, until each text has started from it, and read_key what names it. What cannot be
    given is written by the engine's thread; others may read it once they have an output of the request.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    owner: str = ""
    priority: int = 0
    cache_salt: str = ""
    start: Conversation | None = None
    keep_conversation: bool = False
    matcher: Matcher | None = None
    sampler: Sampler | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = field(default=None, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_started_texts: int = field(default=0, init=False)
    prompt_logprobs: list[PromptLogprob | None] = field(default_factory=list, init=False)
    read_state: Snapshot | None = field(default=None, init=False)
    read_key: KeyHash = field(init=False)

    @cached_property
    def prompt_array(self) -> array[int]:
        """The prompt as the prefix cache hashes it fastest."""
        return array("i", self.prompt_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_earlier_tokens(self) -> int:
        """Tokens that the conversation had read before the prompt."""
        return int(self.start.snapshot.state.position[0]) if self.start else 0
