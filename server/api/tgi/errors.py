"""The words of text-generation-inference's contract for errors and for the ends of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from model.errors import ModelError
from server.api.errors import Kind, Problem, by_kind, problem_of
from server.api.streaming import sse
from server.engine import FinishReason
from server.errors import (
    BusySessionError,
    EngineDeadError,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    QuotaError,
    RequestTimeoutError,
    ShuttingDownError,
    SlowBodyError,
    SlowReaderError,
    StoreUnavailableError,
    UnauthorizedError,
    UnsupportedEncodingError,
)

ErrorType = Literal["validation", "generation", "overloaded", "incomplete_generation"]
FinishReasonName = Literal["length", "eos_token", "stop_sequence"]

TYPES: Mapping[Kind, ErrorType] = {
    InvalidRequestError: "validation",
    ModelError: "validation",
    RequestValidationError: "validation",
    UnauthorizedError: "validation",
    NotFoundError: "validation",
    ForbiddenError: "validation",
    UnsupportedEncodingError: "validation",
    SlowBodyError: "validation",
    PayloadTooLargeError: "validation",
    BusySessionError: "validation",
    QuotaError: "overloaded",
    OverloadedError: "overloaded",
    SlowReaderError: "incomplete_generation",
    GenerationError: "generation",
    RequestTimeoutError: "generation",
    ShuttingDownError: "overloaded",
    EngineDeadError: "generation",
    StoreUnavailableError: "overloaded",
}
FINISH_REASONS: Mapping[FinishReason, FinishReasonName] = {
    FinishReason.LENGTH: "length",
    FinishReason.END_OF_TEXT: "eos_token",
    FinishReason.STOP_SEQUENCE: "stop_sequence",
}


class ErrorResponse(BaseModel):
    """An error in the contract of text-generation-inference."""

    error: str
    error_type: ErrorType


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (401, 403, 404, 408, 409, 413, 415, 422, 424, 429, 500, 503, 504)
}


def error_body(problem: Problem) -> dict[str, Any]:
    return {"error": problem.sentence, "error_type": by_kind(TYPES, problem.kind, "generation")}


def event(content: object) -> bytes:
    return sse(content, "data:")


def error_event(error: Exception) -> bytes:
    return event(error_body(problem_of(error)))
