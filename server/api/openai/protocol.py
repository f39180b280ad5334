"""Bodies of OpenAI's contract, with the extensions that vLLM made common.

What other servers' bodies have besides is in `peers`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from server.api.messages import Messages, TemplateOptions
from server.api.openai import peers
from server.api.validation import INT32, Body, Peers, SessionName, StopSequence, TokenIds, wrong

MAX_STOP_SEQUENCES = 16
MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIASES = 2**16
TOKEN_ID = re.compile(r"^[0-9]{1,9}$")
TOOL_CHOICES = {"tools": "tool_choice", "functions": "function_call"}


def _to_prompts(value: Any, check: ValidatorFunctionWrapHandler) -> list[str | list[int]]:
    """Any of the four forms of a prompt as a list of texts or of lists of token ids."""
    if value is None:
        return [""]
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    with contextlib.suppress(ValidationError):
        if prompts := check(value):
            found: list[str | list[int]] = prompts
            return found
    raise ValueError("prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


def _check_biases(value: Any) -> Any:
    """Ends at the first that is wrong: there may be hundreds of thousands."""
    if isinstance(value, dict):
        if len(value) > MAX_BIASES:
            raise ValueError(f"there must be at most {MAX_BIASES} biases, not {len(value)}")
        for token_id, bias in value.items():
            if not TOKEN_ID.fullmatch(token_id):
                raise ValueError(f"{json.dumps(token_id[:80])} is not a token id")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token_id} must be a number from -100 to 100")
    return value


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32}}
Prompts = Annotated[
    Annotated[list[str | TokenIds], Field(fail_fast=True)],
    WrapValidator(_to_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                {**_IDS, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=TOKEN_ID.pattern)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_check_biases),
]
Stop = Annotated[
    Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None,
    BeforeValidator(_to_list),
    WithJsonSchema(
        {
            "anyOf": [
                {**_TEXT, "minLength": 1, "maxLength": 256},
                {
                    "type": "array",
                    "items": {**_TEXT, "minLength": 1, "maxLength": 256},
                    "maxItems": MAX_STOP_SEQUENCES,
                },
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Without effect")


AnySchema = Annotated[
    str | dict[str, Any] | None, WithJsonSchema({"anyOf": [_TEXT, {"type": "object"}, {"type": "null"}]})
]


def _check_one_given(*fields: tuple[str, Any], at_least: int) -> None:
    n_given = sum(value is not None for _, value in fields)
    if not at_least <= n_given <= 1:
        how_many = "exactly" if at_least else "at most"
        names = " and ".join(", ".join(name for name, _ in fields).rsplit(", ", 1))
        raise ValueError(f"response_format must have {how_many} one of {names}")


class TextFormat(Body):
    type: Literal["text"]


class JSONObjectFormat(Body):
    """Any object, or one of a schema: `schema` as llama.cpp, Together and Fireworks have it, `value` as TGI."""

    type: Literal["json_object", "json"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    value: AnySchema = None

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        _check_one_given(("schema", self.schema_), ("value", self.value), at_least=0)
        return self


class JSONSchema(Body):
    """strict: without effect, since every schema is followed."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Body):
    """One of json_schema, as OpenAI has it, schema (llama.cpp) and value (TGI: a schema, or its name and schema)."""

    type: Literal["json_schema"]
    json_schema: JSONSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    value: AnySchema = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = (("json_schema", self.json_schema), ("schema", self.schema_), ("value", self.value))
        _check_one_given(*given, at_least=1)
        return self


class RegexFormat(Body):
    type: Literal["regex"]
    value: str


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat | RegexFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """What the text must match: one of these."""

    json_: AnySchema = Field(None, alias="json", description="A JSON schema, or its text")
    regex: str | None = None
    grammar: str | None = Field(None, description="In llama.cpp's form (GBNF) or Lark's")
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)] | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = (self.json_, self.regex, self.grammar, self.choice, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise ValueError("structured_outputs must have exactly one of json, regex, grammar, choice and json_object")
        return self


class GenerationRequest(Body):
    """What /v1/completions and /v1/chat/completions have in common. Null means the default."""

    prompt_field: ClassVar[str]  # what the prompt comes from

    model: str | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = Field(None, description="1 if not given")
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    response_format: ResponseFormat | None = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = Field(None, description="0 and -1 are all")
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0, le=1e6)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = Field(None, description="As structured_outputs.regex; sglang's")
    ebnf: str | None = Field(None, description="As structured_outputs.grammar; sglang's")
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="Keep the last tokens of the prompt"
    )
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = Field(None, description="Smaller goes first")
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Cached prefixes are shared among requests of the same salt only"
    )
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None

    session_id: SessionName = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options needs stream to be true")
        has_format = self.response_format is not None and self.response_format.type != "text"
        given = (has_format or None, self.structured_outputs, self.regex, self.ebnf)
        if sum(value is not None for value in given) > 1:
            raise wrong("response_format", "response_format, structured_outputs, regex and ebnf exclude each other")
        return self


class CompletionRequest(GenerationRequest):
    peers: ClassVar[Mapping[str, Peers]] = peers.COMPLETION
    prompt_field: ClassVar[str] = "prompt"

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = Field(None, description="16 if not given")
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = Field(None, description="Whether the prompt is part of the text")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether a text follows the token that starts every text; true if not given"
    )

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise wrong("best_of", "best_of must be at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise wrong("best_of", "best_of above n is not possible in a stream")
        return self


class ChatCompletionRequest(TemplateOptions, GenerationRequest):
    peers: ClassVar[Mapping[str, Peers]] = peers.CHAT
    prompt_field: ClassVar[str] = "messages"

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="As max_completion_tokens")
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="1024 if not given")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_tools_that_must_not_be_called(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        unused = [name for name, choice in TOOL_CHOICES.items() if fields.get(choice) == "none"]
        return {name: value for name, value in fields.items() if name not in unused}

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs to be true")
        return self


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """Also the chunks of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatAnswer(BaseModel):
    role: Literal["assistant"] | None = "assistant"
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "aft-server"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
