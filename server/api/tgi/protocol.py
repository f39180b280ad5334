"""Bodies of the text-generation-inference (TGI) contract, as its clients send and read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from server.api.tgi.errors import FinishReasonName
from server.api.validation import NO_EFFECT, Body, Peers, SessionName, StopSequence, validation_sentence
from server.engine.async_engine import TEXT_THREADS
from server.errors import InvalidRequestError

MAX_STOP_SEQUENCES = 16
MAX_BEST_OF = 128
MAX_TOP_N_TOKENS = 20


class GrammarParameter(Body):
    """value: a regular expression, or a JSON schema as an object or as text; or its `{"name": ..., "schema": ...}`."""

    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]

    @model_validator(mode="after")
    def _regex_is_text(self) -> Self:
        if self.type == "regex" and not isinstance(self.value, str):
            raise ValueError("grammar.value must be a string for a regex")
        return self


# Of Hugging Face's inference API and of transformers, which clients of these send.
PARAMETER_PEERS: Mapping[str, Peers] = {
    "adapter_id": Peers((), "this server has no adapters"),
    "num_return_sequences": Peers((1,), "best_of is what this server has"),
    "num_beams": Peers((1,)),
    "length_penalty": Peers((1,)),
    "no_repeat_ngram_size": Peers((0,)),
    "early_stopping": Peers((False,)),
    "use_cache": Peers((True,)),
    "return_text": Peers((True,)),
    "return_tensors": Peers((False,)),
    "clean_up_tokenization_spaces": Peers((False,)),
    "stop_sequences": Peers(([],), "stop is what this server has"),
}


class GenerateParameters(Body):
    """Every field may be null, which means its default."""

    peers: ClassVar[Mapping[str, Peers]] = PARAMETER_PEERS

    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="100 if not given")
    do_sample: bool | None = Field(None, description="Implied by temperature, top_k, top_p or typical_p")
    temperature: Annotated[FiniteFloat, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    typical_p: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0)] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    grammar: GrammarParameter | None = Field(None, description="What the text must match")
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None = Field(
        None, description="Generation ends before the first of these strings"
    )
    return_full_text: bool | None = Field(None, description="Whether generated_text starts with the inputs")
    truncate: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="Keep the last tokens")
    details: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = Field(
        None, description="Texts to generate, of which the one of highest mean log-probability is returned"
    )
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP_N_TOKENS)] | None = Field(
        None, description="How many most likely tokens to tell at each step"
    )
    decoder_input_details: bool | None = Field(None, description="Whether details tell the tokens of the inputs")
    watermark: bool | None = Field(None, description="Kirchenbauer et al. 2023")
    ignore_eos_token: bool | None = Field(None, description="Whether the end-of-text token is one like others")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of > 1:
            if self.seed is not None:
                raise ValueError("best_of above 1 and seed exclude each other")
            if not self.samples:
                raise ValueError("best_of above 1 needs sampling: set do_sample")
        return self

    @property
    def samples(self) -> bool:
        """Tokens are sampled if any parameter asks for it, and the most likely ones are taken otherwise."""
        filters = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return bool(self.do_sample) or any(value is not None for value in filters)


class GenerateRequest(Body):
    # Of Hugging Face's inference API, and what proxies add for themselves.
    peers: ClassVar[Mapping[str, Peers]] = {"options": NO_EFFECT, "max_retries": NO_EFFECT}

    inputs: str
    parameters: GenerateParameters | None = Field(
        None, description="Without this object tokens are sampled; with it, only if it asks for that"
    )
    stream: bool | None = None
    session_id: SessionName = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if not self.inputs and self.session_id is None:
            raise ValueError("inputs must not be empty, but in a session that has turns")
        for name, most in (("best_of", 1), ("decoder_input_details", False)):
            if self.streams and (getattr(self.given, name) or most) > most:
                raise ValueError(f"{name} is not possible in a stream")
        return self

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def given(self) -> GenerateParameters:
        """The parameters. TGI samples unless there is an object of them."""
        return self.parameters or GenerateParameters(do_sample=True)

    @property
    def prefix(self) -> str:
        """What generated_text begins with."""
        return self.inputs if self.given.return_full_text else ""


class StreamRequest(GenerateRequest):
    """A request whose answer is a stream, whatever `stream` says."""

    @property
    def streams(self) -> bool:
        return True


def parse_generate_request(fields: object) -> GenerateRequest:
    """Raises InvalidRequestError, in a sentence that names the field."""
    try:
        return GenerateRequest.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequestError(validation_sentence(error.errors())) from error


class Token(BaseModel):
    """logprob in nats, of the model itself, before temperature and filters."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(BaseModel):
    """A token of the inputs; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken] = []
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Details(BaseModel):
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    cached_tokens: int = Field(description="Tokens of the inputs whose state was cached, and which were not read again")
    prefill: list[PrefillToken] = []
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    best_of_sequences: list[BestOfSequence] | None = Field(None, description="The texts that were not the best")


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    input_length: int
    cached_tokens: int


class StreamEvent(BaseModel):
    """One token. The last event also has generated_text and, if asked for, details."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None = None
    details: StreamDetails | None = None


class Info(BaseModel):
    """The server and its model. state_bytes: of one conversation, at any length."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int = MAX_STOP_SEQUENCES
    max_top_n_tokens: int = MAX_TOP_N_TOKENS
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    validation_workers: int = Field(TEXT_THREADS, description="Threads that tokenise long prompts")
    sha: str | None = None
    docker_label: str | None = None
    router: str = "aft-server"
    version: str
    variant: str
    parameters: int
    state_bytes: int
    kv_cache_bytes_per_token: int = Field(description="What a Transformer of the same shape would add for each token")
