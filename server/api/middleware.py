"""What happens to every HTTP request before and after its route: an id, a log line, a trace, a key, a size limit."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.contracts import Contracts
from server.api.record import Record
from server.api.tracing import Tracer
from server.errors import PayloadTooLargeError, UnauthorizedError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/ui", "/openapi.json", "/docs"})
QUIET_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics"})  # asked for all the time; logged for debugging only
GIVEN_ID = re.compile(rb"[!-~]{1,128}")


class RequestLog:
    """Gives each request its id, takes an x-request-id as it, and writes one line when it is over."""

    def __init__(self, app: ASGIApp, contracts: Contracts, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.app, self.contracts, self.metrics, self.tracer = app, contracts, metrics, tracer

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
            response = self.contracts.error_response(error, record.path)  # logs it
            if not has_started:
                await response(scope, receive, send_with_id)
        finally:
            self._finish(record)

    def _finish(self, record: Record) -> None:
        fields = record.summary()
        self.metrics.on_answer(record.status)
        level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
        logger.log(level, "request", extra=fields)
        if self.tracer and record.path not in QUIET_PATHS:
            self.tracer.record(record.headers, record.started_at, fields)


class APIKeys:
    """Refuses requests without one of the keys, all paths but OPEN_PATHS.

    A key is sent as Authorization: Bearer KEY, or as some clients have it, x-api-key: KEY.
    """

    def __init__(self, app: ASGIApp, contracts: Contracts, keys: Sequence[str]) -> None:
        self.app, self.contracts = app, contracts
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._admit(scope):
            error = UnauthorizedError("This server needs an API key: send it as Authorization: Bearer KEY.")
            await self.contracts.error_response(error, scope["path"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> bool:
        """Whether the key is known; `request.state.owner` then tells keys apart without telling them."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"bearer " + headers.get(b"x-api-key", b"")).partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time, so the time tells nothing of them.
        n_equal = sum(hmac.compare_digest(digest, known) for known in self._digests)
        scope["state"]["owner"] = digest.hex()[:16]
        return n_equal > 0 and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, by their Content-Length or as soon as more has come.

    larger: paths that take bodies of more, and of how many bytes.
    """

    def __init__(self, app: ASGIApp, contracts: Contracts, max_bytes: int, larger: Mapping[str, int]) -> None:
        self.app, self.contracts, self.max_bytes, self.larger = app, contracts, max_bytes, larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = max(self.max_bytes, self.larger.get(scope["path"], 0))
        error = PayloadTooLargeError(f"The body must have at most {max_bytes} bytes.")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > max_bytes:
            await self.contracts.error_response(error, scope["path"])(scope, receive, send)
            return
        n_bytes = 0

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > max_bytes:
                raise error
            return message

        await self.app(scope, limited, send)
