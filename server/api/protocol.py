"""Bodies of the text-generation-inference (TGI) contract, as its clients send and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from server.api.validation import validation_sentence
from server.engine import FinishReason
from server.errors import InvalidRequestError

# Accepted only with the value that changes nothing, since clients send their defaults.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "adapter_id": (None,),
    "best_of": (None, 1),
    "decoder_input_details": (None, False),
    "top_n_tokens": (None, 0),
    "watermark": (None, False),
}

MAX_STOP_SEQUENCES = 16
StopSequence = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GrammarParameter(Body):
    """value: a regular expression, or a JSON schema as an object or as text."""

    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]

    @model_validator(mode="after")
    def _regex_is_text(self) -> Self:
        if self.type == "regex" and not isinstance(self.value, str):
            raise ValueError("grammar.value must be a string for a regex")
        return self


class GenerateParameters(Body):
    """Every field may be null, which means its default."""

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
    stop: Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES)] | None = Field(
        None, description="Generation ends before the first of these strings"
    )
    return_full_text: bool | None = Field(None, description="Whether generated_text starts with the inputs")
    truncate: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="Keep the last tokens")
    details: bool | None = None
    adapter_id: Any = None
    best_of: Any = None
    decoder_input_details: Any = None
    top_n_tokens: Any = None
    watermark: Any = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name, neutral in NEUTRAL_VALUES.items():
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return self


class GenerateRequest(Body):
    inputs: Annotated[str, Field(min_length=1)]
    parameters: GenerateParameters | None = Field(
        None, description="Without this object tokens are sampled; with it, only if it asks for that"
    )
    stream: bool | None = None

    @property
    def given(self) -> GenerateParameters:
        """The parameters. TGI samples unless there is an object of them."""
        return self.parameters or GenerateParameters(do_sample=True)

    @property
    def prefix(self) -> str:
        """What generated_text begins with."""
        return self.inputs if self.given.return_full_text else ""


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


class Details(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    cached_tokens: int = Field(description="Tokens of the inputs whose state was cached, and which were not read again")
    prefill: list[Token] = []
    tokens: list[Token]


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int
    cached_tokens: int


class StreamEvent(BaseModel):
    """One token. The last event also has generated_text and, if asked for, details."""

    index: int
    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class ErrorResponse(BaseModel):
    error: str
    error_type: Literal["validation", "generation", "overloaded", "incomplete_generation"]
