"""The words of OpenAI's contract for errors and for the ends of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from model.errors import ModelError
from server.api.errors import Kind, Problem, by_kind, problem_of
from server.api.openai.protocol import ChatCompletionRequest, CompletionRequest
from server.api.streaming import sse
from server.engine import FinishReason
from server.errors import (
    BusySessionError,
    EngineDeadError,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PromptTooLongError,
    QuotaError,
    RequestTimeoutError,
    ShuttingDownError,
    SlowBodyError,
    SlowReaderError,
    StoreUnavailableError,
    UnauthorizedError,
    UnsupportedEncodingError,
)

INVALID = "invalid_request_error"
# The type, and the code if there is one.
NAMES: Mapping[Kind, tuple[str, str | None]] = {
    InvalidRequestError: (INVALID, None),
    PromptTooLongError: (INVALID, "context_length_exceeded"),
    ModelError: (INVALID, None),
    RequestValidationError: (INVALID, None),
    UnauthorizedError: ("authentication_error", "invalid_api_key"),
    NotFoundError: (INVALID, "not_found"),
    ModelNotFoundError: (INVALID, "model_not_found"),
    ForbiddenError: ("permission_error", None),
    UnsupportedEncodingError: (INVALID, None),
    SlowBodyError: ("timeout_error", "slow_body"),
    PayloadTooLargeError: (INVALID, "payload_too_large"),
    BusySessionError: (INVALID, "busy_session"),
    QuotaError: ("rate_limit_error", "quota"),
    OverloadedError: ("rate_limit_error", "overloaded"),
    SlowReaderError: ("timeout_error", "slow_reader"),
    GenerationError: ("generation_error", None),
    RequestTimeoutError: ("timeout_error", "deadline_exceeded"),
    ShuttingDownError: ("service_unavailable_error", "shutting_down"),
    EngineDeadError: ("service_unavailable_error", "engine_dead"),
    StoreUnavailableError: ("service_unavailable_error", "store_unavailable"),
}
FIELDS = frozenset(CompletionRequest.model_fields | ChatCompletionRequest.model_fields)
STATUSES: Mapping[Kind, int] = {InvalidRequestError: 400, ModelError: 400, RequestValidationError: 400}
FINISH_REASONS: Mapping[FinishReason, Literal["length", "stop"]] = {
    FinishReason.LENGTH: "length",
    FinishReason.END_OF_TEXT: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
DONE = b"data: [DONE]\n\n"


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """An error in OpenAI's contract."""

    error: OpenAIError


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorResponse}
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 424, 429, 500, 503, 504)
}


def error_body(problem: Problem) -> dict[str, Any]:
    kind, code = by_kind(NAMES, problem.kind, ("server_error", None))
    return {"error": {"message": problem.sentence, "type": kind, "param": _param(problem), "code": code}}


def _param(problem: Problem) -> str | None:
    """Where no validator tells the field, the sentence does, in its first word: "n and best_of must be ..."."""
    if problem.field is not None or problem.kind is ModelNotFoundError:
        return problem.field or "model"
    word = problem.sentence.partition(" ")[0].rstrip(":")
    return word if word in FIELDS else None


def error_event(error: Exception) -> bytes:
    return sse(error_body(problem_of(error))) + DONE
