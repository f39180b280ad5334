"""What a client may send and hold before anybody has looked at its key: bytes, seconds and connections.

uvicorn on h11 ignores offers of other protocols and bounds what it keeps of a head. What it lacks is here: time for
what a client owes, a bound on connections, and answers that reach a client that still sends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import sys
from collections import Counter
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.config import APIConfig
from server.errors import ConfigurationError

MAX_HEAD = 32 * 2**10  # bytes of a start line with its header fields, of trailers, and of the line before a chunk
MAX_FIELDS = 100
MAX_TARGET = 8 * 2**10  # bytes of an address
# Bytes that are parsed before others have their turn: 8 KiB may be a thousand chunks of a byte.
PIECE = 8 * 2**10
MAX_THROWN_AWAY = 128 * 2**20  # bytes of a request that has its answer already
MOST_CONNECTIONS = 1024  # unless more are asked for

SENTENCES = {
    400: "This is no valid HTTP request.",
    408: "The head of the request did not come in time.",
    414: f"The address must have at most {MAX_TARGET} bytes.",
    431: f"The head of the request must have at most {MAX_HEAD} bytes and {MAX_FIELDS} fields.",
    501: "Transfer-Encoding must be chunked.",
    503: "All connections are taken.",
}


def uvicorn_config(app: Any, config: APIConfig, **options: Any) -> uvicorn.Config:
    """For a server that keeps these limits. Raises ConfigurationError, for TLS files that cannot be read too."""
    made = uvicorn.Config(
        app,
        http=partial(Connection, limits=config, places=Places.of(config)),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        h11_max_incomplete_event_size=MAX_HEAD,
        **options,
    )
    try:
        made.load()
    except OSError as error:  # an ssl.SSLError is one
        raise ConfigurationError(f"ssl_certfile and ssl_keyfile cannot be read: {error}.") from error
    return made


class Places:
    """Who holds a connection.

    Where all are taken, a new one gets the place of the one that has owed its server something for longest: a request,
    the rest of one, or to read its answer. One whose request is being answered is never ended for another.
    """

    def __init__(self, most: int, most_of_address: int) -> None:
        self.most, self.most_of_address = most, most_of_address
        self._taken: Counter[str] = Counter()  # by address
        self._owing: dict[Connection, None] = {}  # longest first

    @classmethod
    def of(cls, config: APIConfig) -> Places:
        """Raises ConfigurationError for more connections than the process has files for."""
        bound = _max_files() // 2  # the other half is for stores, threads and a burst that was just accepted
        most = min(MOST_CONNECTIONS, bound) if config.max_connections is None else config.max_connections
        if most > bound:
            raise ConfigurationError(
                f"max_connections must be at most {bound}, half of the files that the process may open "
                f"(ulimit -n), not {most}."
            )
        return cls(most, config.max_connections_per_address or max(most // 2, 1))

    def take(self, connection: Connection) -> bool:
        """False if there is no place, and none to be had."""
        address = connection.address
        if self._taken[address] >= self.most_of_address and not self._end_longest(address):
            return False
        if self._taken.total() >= self.most and not self._end_longest():
            return False
        self._taken[address] += 1
        self._owing[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        self._owing.pop(connection, None)
        self._taken[connection.address] -= 1
        if not self._taken[connection.address]:
            del self._taken[connection.address]

    def set_owing(self, connection: Connection, owes: bool) -> None:
        self._owing.pop(connection, None)
        if owes:
            self._owing[connection] = None

    def _end_longest(self, address: str | None = None) -> bool:
        for connection in self._owing:
            if address is None or connection.address == address:
                connection.abort()
                return True
        return False


class _Transport:
    """A transport whose end is the connection's to decide."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.is_ending or self._transport.is_closing()

    def close(self) -> None:
        self._connection.end()


class _Parser(h11.Connection):
    """h11's, which also refuses what is too much once it is there, and two lengths of one body."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if type(event) is h11.Request:
            names = [name for name, _ in event.headers]
            if len(names) > MAX_FIELDS:
                raise h11.RemoteProtocolError("too many fields", error_status_hint=431)
            if len(event.target) > MAX_TARGET:
                raise h11.RemoteProtocolError("too long an address", error_status_hint=414)
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("two lengths")
        return event


class Connection(H11Protocol):
    """One client's. It ends if what the client owes does not come for `limits.read_timeout` seconds, or if it does not
    read its answer for `limits.write_timeout`."""

    def __init__(self, *arguments: Any, limits: APIConfig, places: Places, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn = _Parser(h11.SERVER, MAX_HEAD)
        self.limits, self.places = limits, places
        self.address = ""
        self.is_ending = False
        self._has_place = False
        self._unparsed = bytearray()
        self._goes_on = False  # in the next round of the loop
        self._n_thrown_away = 0
        self._owes: str | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    # Beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self.address = address_of(self.client)
        self._has_place = self.places.take(self)
        if self._has_place:
            self._watch()
        else:
            self._refuse(503)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_ending = True
        self._leave()
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer:
                timer.cancel()

    def end(self) -> None:
        """At once, or after the rest of the request: a client that finds its connection closed reads no answer."""
        reads_on = self._has_place and not self.is_ending and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        self.is_ending = True
        self._watch()
        if not reads_on:
            self._transport.close()
            self._limit_writing()  # what is left to be sent is waited for
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def abort(self) -> None:
        self.is_ending = True
        self._leave()
        self._drop()

    def shutdown(self) -> None:
        """The server ends."""
        if self.is_ending:
            self._transport.abort()
        else:
            super().shutdown()

    def _leave(self) -> None:
        if self._has_place:
            self._has_place = False
            self.places.leave(self)

    def _refuse(self, status: int) -> None:
        """Answer what is no request, and end."""
        if self.cycle is not None:  # the request is read no further
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self._transport.abort()
            return
        content = SENTENCES[status].encode()
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("x-content-type-options", "nosniff"),
            ("content-length", str(len(content))),
            ("connection", "close"),
            *([("retry-after", "1")] if status == 503 else []),
        ]
        phrase = HTTPStatus(status).phrase
        for event in (
            h11.Response(status_code=status, headers=headers, reason=phrase),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self._transport.write(self.conn.send(event) or b"")
        self.end()

    # What comes

    def data_received(self, data: bytes) -> None:
        if self._owes == "rest":
            self._n_thrown_away += len(data)
            if self._n_thrown_away > MAX_THROWN_AWAY:
                self._transport.abort()
        if not self.is_ending:
            self._unparsed += data
            if not self._goes_on:
                self._parse()

    def _parse(self) -> None:
        """A piece of what has come, and the others in later rounds of the event loop."""
        self._goes_on = False
        if self.is_ending:
            self._unparsed.clear()
        if not self._unparsed:
            return
        # A request that is not answered yet keeps the next one waiting, here and not in h11, which has no bound on it.
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            super().data_received(piece)
            self._goes_on = bool(self._unparsed) and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self._goes_on:
            self.loop.call_soon(self._parse)
        if self._unparsed:
            self._transport.pause_reading()
        elif not self.flow.read_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.places.set_owing(self, False)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        self._refuse(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400)

    def _unsupported_upgrade_warning(self) -> None:
        """An offer that may be ignored, as every JDK client makes, is no reason for a warning."""

    # What goes

    def on_response_complete(self) -> None:
        if self._has_place:
            self.places.set_owing(self, True)
        super().on_response_complete()
        self._watch()
        if not self._goes_on:
            self._parse()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._has_place:
            self.places.set_owing(self, True)
        self._limit_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing and not self.is_ending:
            self._writing.cancel()
            self._writing = None
        if self._has_place and self.cycle is not None and not self.cycle.response_complete:
            self.places.set_owing(self, False)

    # Time

    def _limit_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_timeout, self._drop)

    def _drop(self) -> None:
        """End with what is left to be sent, also that which the system keeps."""
        found = self._transport.get_extra_info("socket")
        if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _watch(self) -> None:
        """Give the client its time for what it owes now. The time for a body that is read is its reader's."""
        is_answered = self.is_ending or (self.cycle is not None and self.cycle.response_complete)
        if is_answered and self.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            owes: str | None = "rest"
        elif self.conn.their_state is h11.IDLE and not self.is_ending:
            owes = "head"
        else:
            owes = None
        if owes == self._owes:
            return
        if self._reading:
            self._reading.cancel()
        self._owes, self._n_thrown_away = owes, 0
        self._reading = self.loop.call_later(self.limits.read_timeout, self._on_late) if owes else None

    def _on_late(self) -> None:
        if self._owes == "head" and not self.is_ending and self.conn.trailing_data[0]:
            self._refuse(408)
        else:
            self._transport.abort()


def address_of(client: tuple[str, int] | None) -> str:
    """Whom connections are counted for: an IPv6 network of 64 bits, which one user has, or an IPv4 address."""
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


def _max_files() -> int:
    """That the process may open."""
    if sys.platform == "win32":
        return 2 * MOST_CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else files
