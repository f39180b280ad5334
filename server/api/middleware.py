"""What happens to every HTTP request before and after its route: an id, a log line, a trace, a key, a size limit."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, surface_of
from server.api.tracing import Tracer
from server.engine import RequestStream
from server.errors import PayloadTooLargeError, UnauthorizedError

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/ui", "/openapi.json", "/docs"})
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked for every few seconds; logged for debugging only
GIVEN_ID = re.compile(rb"[!-~]{1,128}")


@dataclass
class Record:
    """One HTTP request, for its log line and its trace; at `request.state.record`."""

    request_id: str
    method: str
    path: str
    headers: dict[str, str]
    started_at: float = field(default_factory=time.time)  # seconds since 1970
    started: float = field(default_factory=time.monotonic)
    status: int = 499  # nobody was there to read an answer
    streams: list[RequestStream] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Times in seconds. Of several prompts, tokens are summed and times are the latest."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 6),
        }
        if self.streams:
            requests = [stream.request for stream in self.streams]
            fields |= {
                "prompt_tokens": sum(request.num_prompt_tokens for request in requests),
                "cached_tokens": sum(request.num_cached_tokens for request in requests),
                "generated_tokens": sum(stream.num_generated_tokens for stream in self.streams),
                "finish_reasons": [reason for stream in self.streams for reason in _reasons(stream)],
                "queue_seconds": _latest((request.admitted_at, request.arrived_at) for request in requests),
                "time_to_first_token": _latest((s.first_token_at, s.request.arrived_at) for s in self.streams),
            }
        return fields


def _reasons(stream: RequestStream) -> list[str]:
    unfinished = [type(stream.error).__name__ if stream.error else "abandoned"] * stream.num_unfinished
    return [*stream.finish_reasons, *unfinished]


def _latest(spans: Any) -> float | None:
    known = [end - start for end, start in spans if end is not None]
    return round(max(known), 6) if known else None


class RequestLog:
    """Gives each request its id, takes an x-request-id as it, and writes one line when it is over."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        record = Record(
            given.decode() if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex,
            scope["method"],
            scope["path"],
            {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()},
        )
        scope.setdefault("state", {})["record"] = record
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started, record.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # uvicorn's, of clients that do not read when the server ends
            logger.warning("A client was cut off that did not read its answer.")
        except Exception as error:
            response = error_response(error, surface_of(record.path))  # logs it
            if not has_started:
                await response(scope, receive, send_with_id)
        finally:
            self._finish(record)

    def _finish(self, record: Record) -> None:
        fields = record.summary()
        level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
        logger.log(level, "request", extra=fields)
        if self.tracer and record.path not in QUIET_PATHS:
            self.tracer.record(record.headers, record.started_at, fields)


class APIKeys:
    """Refuses requests without one of the keys, all paths but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._admit(scope):
            error = UnauthorizedError("This server needs an API key: send it as Authorization: Bearer KEY.")
            await error_response(error, surface_of(scope["path"]))(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> bool:
        """Whether the key is known; `request.state.owner` then tells keys apart without telling them."""
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time, so the time tells nothing of them.
        n_equal = sum(hmac.compare_digest(digest, known) for known in self._digests)
        scope["state"]["owner"] = digest.hex()[:16]
        return n_equal > 0 and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, by their Content-Length or as soon as more has come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = PayloadTooLargeError(f"The body must have at most {self.max_bytes} bytes.")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_bytes:
            await error_response(error, surface_of(scope["path"]))(scope, receive, send)
            return
        n_bytes = 0

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                raise error
            return message

        await self.app(scope, limited, send)
