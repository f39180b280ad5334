"""What an HTTP contract owns: its routes, and the words in which it tells of errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.api.errors import FAILED, STATUSES, Kind, Problem, by_kind, problem_of
from server.errors import InvalidRequestError, PayloadTooLargeError, SlowBodyError

RETRY_AFTER_SECONDS = "1"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A folder of server/api has one of these; how it tells of errors within a stream is its own affair.

    prefixes    of the paths that are its own, those that no route has included
    error_body  of a problem
    statuses    of errors that have others than STATUSES here
    responses   how its errors look, by status, for the OpenAPI document
    events      what the data of its server-sent events is, for the same
    """

    router: APIRouter
    prefixes: tuple[str, ...]
    error_body: Callable[[Problem], dict[str, Any]]
    statuses: Mapping[Kind, int]
    responses: Mapping[int | str, dict[str, Any]]
    events: tuple[type[BaseModel], ...] = ()

    def status_of(self, kind: Kind) -> int:
        return by_kind({**STATUSES, **self.statuses}, kind, FAILED)

    def error_response(self, error: Exception) -> JSONResponse:
        status = self.status_of(type(error))
        headers = {"Retry-After": RETRY_AFTER_SECONDS} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse(self.error_body(problem_of(error)), status, headers)


class Contracts:
    """All contracts of an application. Each path is of the one that has the longest prefix of it, or else of "/"."""

    def __init__(self, contracts: Sequence[Contract]) -> None:
        self.events = [event for contract in contracts for event in contract.events]
        self._paths = [route.path for c in contracts for route in c.router.routes if isinstance(route, APIRoute)]
        self._by_prefix = {prefix: contract for contract in contracts for prefix in contract.prefixes}

    def of(self, path: str) -> Contract:
        prefixes = (prefix for prefix in self._by_prefix if path.startswith(prefix))
        return self._by_prefix[max(prefixes, key=len, default="/")]  # "OPTIONS *" has a path without a slash

    def _meant(self, path: str) -> str | None:
        """The route of a contract that is named nearly so."""
        return next(iter(difflib.get_close_matches(path[:100], self._paths, 1, cutoff=0.75)), None)

    def error_response(self, error: Exception, path: str) -> JSONResponse:
        return self.of(path).error_response(error)

    def responses(self, statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
        """How errors of routes that no contract has look, for the OpenAPI document."""
        return {status: self.of("/").responses[status] for status in statuses}

    def add_error_handlers(self, app: FastAPI) -> None:
        async def on_error(request: Request, error: Exception) -> JSONResponse:
            return self.error_response(error, request.url.path)

        async def on_http_error(request: Request, error: Exception) -> JSONResponse:
            """Starlette's own: unknown paths and methods, and bodies that cannot be decoded."""
            assert isinstance(error, HTTPException)
            if isinstance(error.__cause__, PayloadTooLargeError | SlowBodyError):  # raised while FastAPI read the body
                return await on_error(request, error.__cause__)
            if error.status_code == 400:  # bytes that are not UTF-8, nesting too deep: as any other invalid body
                return await on_error(
                    request, InvalidRequestError("The body is not JSON in UTF-8, or is nested too deeply.")
                )
            meant = self._meant(request.url.path) if error.status_code == 404 else None
            end = f"; did you mean {meant}?" if meant else "."
            problem = Problem(InvalidRequestError, f"{error.detail}{end}")
            return JSONResponse(self.of(request.url.path).error_body(problem), error.status_code, error.headers)

        for kind in STATUSES:
            app.add_exception_handler(kind, on_error)
        app.add_exception_handler(HTTPException, on_http_error)
