"""What happens to every HTTP request before and after its route: id, log line, trace, key, limits of its body."""

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
from server.errors import PayloadTooLargeError, ServerError, SlowBodyError, UnauthorizedError, UnsupportedEncodingError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

QUIET_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics"})  # asked for all the time; logged for debugging only
GIVEN_ID = re.compile(rb"[!-~]{1,128}")
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
SLOWEST = 16 * 2**10  # bytes in a second of a body that is waited for


class RoutePath:
    """Takes away what a proxy has before every path, if the proxy does not: inside there are the routes' own."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and f"{scope['path']}/".startswith(f"{self.root_path}/"):
            path = scope["path"][len(self.root_path) :] or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send)


class Head:
    """Answers HEAD as GET without its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_without_body)


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
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode()), NO_SNIFFING]
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
    """Refuses requests without one of the keys, all but those of `open_paths`, and to read "/".

    A key is sent as Authorization: Bearer KEY, or as some clients have it, x-api-key: KEY.
    """

    def __init__(self, app: ASGIApp, contracts: Contracts, keys: Sequence[str], open_paths: frozenset[str]) -> None:
        self.app, self.contracts, self.open_paths = app, contracts, open_paths
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope) and not self._admit(scope):
            error = UnauthorizedError("This server needs an API key: send it as Authorization: Bearer KEY.")
            await self.contracts.error_response(error, scope["path"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in self.open_paths or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))

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
    """Refuses compressed bodies, and those of more than `max_bytes`: by Content-Length, or as soon as more has come.

    A body has `timeout` seconds, and one more for each SLOWEST bytes that have come.

    larger: paths that take bodies of more, and of how many bytes.
    """

    def __init__(
        self, app: ASGIApp, contracts: Contracts, max_bytes: int, larger: Mapping[str, int], timeout: float
    ) -> None:
        self.app, self.contracts, self.max_bytes, self.larger = app, contracts, max_bytes, larger
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        max_bytes = max(self.max_bytes, self.larger.get(scope["path"], 0))
        too_large = PayloadTooLargeError(f"The body must have at most {max_bytes} bytes.")
        length = headers.get(b"content-length", b"0")
        coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        error: ServerError | None = None
        if not length.isdigit() or int(length[:20]) > max_bytes:
            error = too_large
        elif coding.lower() != "identity":
            error = UnsupportedEncodingError(f"Content-Encoding must be identity or left out, not {coding[:100]!r}.")
        if error:
            await self.contracts.error_response(error, scope["path"])(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        started, n_bytes, has_more = loop.time(), 0, True

        async def limited() -> Message:
            nonlocal n_bytes, has_more
            try:
                async with asyncio.timeout_at(started + self.timeout + n_bytes / SLOWEST if has_more else None):
                    message = await receive()
            except TimeoutError as late:
                raise SlowBodyError(f"The body came too slowly: {n_bytes} bytes of it in time.") from late
            n_bytes += len(message.get("body", b""))
            has_more = message.get("more_body", False)
            if n_bytes > max_bytes:
                raise too_large
            return message

        await self.app(scope, limited, send)
