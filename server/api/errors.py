"""One table from exceptions to HTTP statuses and TGI's error types."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from model.errors import ModelError
from server.api.validation import validation_sentence
from server.errors import GenerationError, InvalidRequestError, OverloadedError, RequestTimeoutError, ShuttingDownError

logger = logging.getLogger(__name__)

STATUS_AND_TYPE: dict[type[Exception], tuple[int, str]] = {
    InvalidRequestError: (422, "validation"),
    ModelError: (422, "validation"),
    OverloadedError: (429, "overloaded"),
    RequestTimeoutError: (504, "generation"),
    GenerationError: (424, "generation"),
    ShuttingDownError: (503, "overloaded"),
}
RETRY_AFTER_SECONDS = 1


def status_and_type(error: Exception) -> tuple[int, str]:
    for kind, answer in STATUS_AND_TYPE.items():
        if isinstance(error, kind):
            return answer
    return 500, "generation"


def error_body(error: Exception) -> dict[str, str]:
    """What the client is told. An error that is not ours is logged, and says nothing of its inside."""
    status, error_type = status_and_type(error)
    if status == 500:
        logger.error("A request failed.", exc_info=error)
        return {"error": "The server failed on this request.", "error_type": error_type}
    return {"error": str(error), "error_type": error_type}


def add_error_handlers(app: FastAPI) -> None:
    async def on_error(_: Request, error: Exception) -> JSONResponse:
        status, _type = status_and_type(error)
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
        return JSONResponse(error_body(error), status, headers)

    async def on_invalid_body(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(
            {"error": validation_sentence(error.errors(), body_prefix=1), "error_type": "validation"}, 422
        )

    async def on_http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI's answer to bytes that are not UTF-8; huggingface_hub misreads a 400
            return JSONResponse({"error": "The body is not UTF-8 JSON.", "error_type": "validation"}, 422)
        return JSONResponse({"error": f"{error.detail}.", "error_type": "validation"}, error.status_code, error.headers)

    for kind in (*STATUS_AND_TYPE, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
