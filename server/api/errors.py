"""From exceptions to what a client is told, before a contract gives it its words: one table of HTTP statuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastapi.exceptions import RequestValidationError

from model.errors import ModelError
from server.api.validation import invalid_field, validation_sentence
from server.errors import (
    BusySessionError,
    EngineDeadError,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
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

logger = logging.getLogger(__name__)

T = TypeVar("T")
Kind = type[Exception]

# A contract may have others for some.
STATUSES: Mapping[Kind, int] = {
    InvalidRequestError: 422,
    ModelError: 422,
    RequestValidationError: 422,
    UnauthorizedError: 401,
    NotFoundError: 404,
    ForbiddenError: 403,
    PayloadTooLargeError: 413,
    UnsupportedEncodingError: 415,
    SlowBodyError: 408,
    BusySessionError: 409,
    QuotaError: 429,
    OverloadedError: 429,
    SlowReaderError: 408,
    GenerationError: 424,
    RequestTimeoutError: 504,
    ShuttingDownError: 503,
    EngineDeadError: 503,
    StoreUnavailableError: 503,
}
FAILED = 500  # what nobody foresaw


@dataclass(frozen=True)
class Problem:
    """What a client is told. kind: for which each contract has a name; field: of the body, if one of it is wrong."""

    kind: Kind
    sentence: str
    field: str | None = None


def problem_of(error: Exception) -> Problem:
    """An error that is not ours is logged, and says nothing of its inside."""
    kind = type(error)
    if isinstance(error, RequestValidationError):
        found = error.errors()
        return Problem(kind, validation_sentence(found, body_prefix=1), invalid_field(found, body_prefix=1))
    if by_kind(STATUSES, kind, FAILED) == FAILED:
        logger.error("A request failed.", exc_info=error)
        return Problem(kind, "The server failed on this request.")
    return Problem(kind, str(error), error.field if isinstance(error, PromptTooLongError) else None)


def by_kind(table: Mapping[Kind, T], kind: Kind, default: T) -> T:
    """The entry of a kind of exception, or of what it is a kind of."""
    return next((table[base] for base in kind.__mro__ if base in table), default)
