"""One table from exceptions to HTTP statuses and to the error types of both contracts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from model.errors import ModelError
from server.api.validation import invalid_field, validation_sentence
from server.errors import (
    BusySessionError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    QuotaError,
    RequestTimeoutError,
    ShuttingDownError,
    SlowReaderError,
    StoreUnavailableError,
    UnauthorizedError,
)

logger = logging.getLogger(__name__)

Surface = Literal["tgi", "openai"]
TGIErrorType = Literal["validation", "generation", "overloaded", "incomplete_generation"]


@dataclass(frozen=True)
class Meaning:
    """What a kind of exception is called in text-generation-inference's contract and in OpenAI's."""

    status: int
    tgi_type: TGIErrorType
    openai_type: str
    code: str | None = None  # of OpenAI's
    openai_status: int | None = None  # where it differs


INVALID = Meaning(422, "validation", "invalid_request_error", openai_status=400)
FAILED = Meaning(500, "generation", "server_error")
MEANINGS: dict[type[Exception], Meaning] = {
    InvalidRequestError: INVALID,
    ModelError: INVALID,
    RequestValidationError: INVALID,
    UnauthorizedError: Meaning(401, "validation", "authentication_error", "invalid_api_key"),
    NotFoundError: Meaning(404, "validation", "invalid_request_error", "not_found"),
    PayloadTooLargeError: Meaning(413, "validation", "invalid_request_error", "payload_too_large"),
    BusySessionError: Meaning(409, "validation", "invalid_request_error", "busy_session"),
    QuotaError: Meaning(429, "overloaded", "rate_limit_error", "quota"),
    OverloadedError: Meaning(429, "overloaded", "rate_limit_error", "overloaded"),
    SlowReaderError: Meaning(408, "incomplete_generation", "timeout_error", "slow_reader"),
    GenerationError: Meaning(424, "generation", "generation_error"),
    RequestTimeoutError: Meaning(504, "generation", "timeout_error", "deadline_exceeded"),
    ShuttingDownError: Meaning(503, "overloaded", "service_unavailable_error", "shutting_down"),
    StoreUnavailableError: Meaning(503, "overloaded", "service_unavailable_error", "store_unavailable"),
}
RETRY_AFTER_SECONDS = "1"


class ErrorResponse(BaseModel):
    """An error in the contract of text-generation-inference."""

    error: str
    error_type: TGIErrorType


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """An error in OpenAI's contract."""

    error: OpenAIError


TGI_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (401, 404, 409, 413, 422, 424, 429, 500, 503, 504)
}
OPENAI_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorResponse} for status in (400, 401, 404, 409, 413, 424, 429, 500, 503, 504)
}


def surface_of(path: str) -> Surface:
    return "openai" if path.startswith("/v1/") else "tgi"


def meaning(error: Exception) -> Meaning:
    return next((meaning for kind, meaning in MEANINGS.items() if isinstance(error, kind)), FAILED)


def status_of(error: Exception, surface: Surface) -> int:
    found = meaning(error)
    return found.openai_status or found.status if surface == "openai" else found.status


def error_body(error: Exception, surface: Surface) -> dict[str, Any]:
    """What the client is told. An error that is not ours is logged, and says nothing of its inside."""
    found, param = meaning(error), None
    if isinstance(error, RequestValidationError):
        sentence, param = validation_sentence(error.errors(), body_prefix=1), invalid_field(error.errors(), 1)
    elif found is FAILED:
        logger.error("A request failed.", exc_info=error)
        sentence = "The server failed on this request."
    else:
        sentence = str(error)
    return _body(sentence, found, surface, param)


def error_response(error: Exception, surface: Surface) -> JSONResponse:
    status = status_of(error, surface)
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error, surface), status, headers)


def _body(sentence: str, found: Meaning, surface: Surface, param: str | None = None) -> dict[str, Any]:
    if surface == "openai":
        return {"error": {"message": sentence, "type": found.openai_type, "param": param, "code": found.code}}
    return {"error": sentence, "error_type": found.tgi_type}


def add_error_handlers(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, surface_of(request.url.path))

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        """Starlette's own: unknown paths and methods, and bodies that cannot be decoded."""
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, PayloadTooLargeError):  # raised while FastAPI read the body
            return await on_error(request, error.__cause__)
        if error.status_code == 400:  # bytes that are not UTF-8, nesting too deep: as any other invalid body
            return await on_error(
                request, InvalidRequestError("The body is not JSON in UTF-8, or is nested too deeply.")
            )
        surface = surface_of(request.url.path)
        return JSONResponse(_body(f"{error.detail}.", INVALID, surface), error.status_code, error.headers)

    for kind in MEANINGS:
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
