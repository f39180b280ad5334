"""Bodies of the text-generation-inference (TGI) contract, as its clients send and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from server.engine import FinishReason

# Accepted only with the value that changes nothing, since clients send their defaults.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "adapter_id": (None,),
    "best_of": (None, 1),
    "decoder_input_details": (None, False),
    "frequency_penalty": (None, 0.0),
    "grammar": (None,),
    "repetition_penalty": (None, 1.0),
    "top_n_tokens": (None, 0),
    "typical_p": (None,),
    "watermark": (None, False),
}

MAX_STOP_SEQUENCES = 16
StopSequence = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GenerateParameters(Body):
    """Every field may be null, which means its default."""

    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="100 if not given")
    do_sample: bool | None = Field(None, description="Implied by temperature, top_k or top_p")
    temperature: Annotated[FiniteFloat, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
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
    frequency_penalty: Any = None
    grammar: Any = None
    repetition_penalty: Any = None
    top_n_tokens: Any = None
    typical_p: Any = None
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


class StreamEvent(BaseModel):
    """One token. The last event also has generated_text and, if asked for, details."""

    index: int
    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class ErrorResponse(BaseModel):
    error: str
    error_type: Literal["validation", "generation", "overloaded", "incomplete_generation"]
