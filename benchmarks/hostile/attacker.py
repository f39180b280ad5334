"""What an attacker with one ordinary key sends, attack by attack.

An attack is over when it was refused in a sentence, closed, or served within its bounds. Otherwise it raises one of the
three errors below.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx2

ADDRESS = "127.0.0.2"  # the attacker's own, so that limits for each address are his alone
PATIENCE = 60  # seconds in which a connection that says nothing whole should be closed
ANSWER = 300  # seconds for an answer, which may be long
REFUSED = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 422, 424, 431, 501})
BUSY = frozenset({429, 503, 504})
SERVED = frozenset({200, 201, 204})
MIB = 2**20


class LeakError(Exception):
    """Something of another key was seen."""


class UnansweredError(Exception):
    """A request got no answer, or one that is no sentence."""


class WeaknessError(Exception):
    """What should have been refused, closed or served was not."""


Attack = Callable[["Attacker"], Awaitable[str]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Named `body huge` for `body_huge`."""
    ATTACKS[function.__name__.replace("_", " ")] = function
    return function


class Attacker:
    """secrets: prompts that another key has sent; sessions: of another key."""

    def __init__(self, url: str, key: str, seed: int) -> None:
        self.url, self.key, self.chance = url, key, random.Random(seed)
        self.secrets: list[str] = []
        self.sessions: list[str] = []
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=ANSWER,
            transport=httpx2.AsyncHTTPTransport(local_address=ADDRESS, limits=limits),
        )
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)

    async def ask(
        self, method: str, path: str, *, allowed: frozenset[int] = REFUSED | SERVED, **options: Any
    ) -> httpx2.Response | None:
        """The answer, if any: None for a connection that was closed. `allowed`: statuses beside those of a busy server.

        Raises UnansweredError and WeaknessError.
        """
        try:
            response = await self.client.request(method, path, **options)
        except httpx2.TimeoutException as error:
            raise UnansweredError(f"{method} {path}: no answer within {ANSWER} seconds") from error
        except httpx2.TransportError:
            return None
        self.check(response, f"{method} {path}")
        if response.status_code not in allowed | BUSY:
            raise WeaknessError(f"{method} {path}: {response.status_code} {response.text:.200}")
        return response

    def check(self, response: httpx2.Response, what: str) -> None:
        """Raises UnansweredError for a failure that is told in no sentence, or is a mistake of the server."""
        status = response.status_code
        if status >= 400 and (status not in REFUSED | BUSY | {401, 403, 409, 421} or len(response.text) < 8):
            raise UnansweredError(f"{what}: {status} {response.text:.200}")

    async def post(self, path: str, body: Any, allowed: frozenset[int] = REFUSED | SERVED) -> str:
        """The status, or `closed`."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return outcome(await self.ask("POST", path, allowed=allowed, content=content, headers=headers))

    async def complete(self, allowed: frozenset[int] = REFUSED | SERVED, **fields: Any) -> str:
        return await self.post("/v1/completions", {"prompt": "One day", "max_tokens": 4, **fields}, allowed)

    async def own_file(self) -> bytes:
        """A conversation of the attacker's. Raises OSError if the server is too busy for one, or has no room for it."""
        made = await self.ask("POST", "/sessions")
        if made is None or made.status_code != 201:
            raise OSError(outcome(made))
        name = made.json()["session_id"]
        body = {"inputs": "One day", "parameters": {"max_new_tokens": 3}, "session_id": name}
        await self.ask("POST", "/generate", json=body)
        file = await self.ask("GET", f"/sessions/{name}/export")
        await self.ask("DELETE", f"/sessions/{name}")
        if file is None or file.status_code != 200:
            raise OSError(outcome(file))
        return file.content

    async def own_sessions(self) -> list[dict[str, Any]]:
        """The attacker's, of which there are at most so many; none if the server is too busy."""
        listed = await self.ask("GET", "/sessions", params={"limit": 1000})
        return list(listed.json()["sessions"]) if listed is not None and listed.status_code == 200 else []

    async def import_(self, name: str, content: bytes) -> str:
        """Of a file that no server wrote. Raises WeaknessError if it becomes a session."""
        response = await self.ask("POST", "/sessions/import", content=content)
        if response is not None and response.status_code == 201:
            await self.ask("DELETE", f"/sessions/{response.json()['session_id']}")
            raise WeaknessError(f"a file with {name} became a session")
        return outcome(response)

    async def raw(self, pieces: Iterable[bytes], *, pause: float = 0.0, seconds: float = PATIENCE) -> tuple[str, int]:
        """Sends pieces until the server answers or closes: the status, `closed` or `open`, and how much it took."""
        n_sent, received = 0, b""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ADDRESS, 0))
                answer = asyncio.create_task(reader.read(2**16))
                try:
                    for piece in pieces:
                        if answer.done():
                            break
                        writer.write(piece)
                        await writer.drain()
                        n_sent += len(piece)
                        await asyncio.sleep(pause)
                    received = await answer
                    return (received[9:12].decode("latin-1") if received else "closed"), n_sent
                except ConnectionError:
                    return "closed", n_sent
                finally:
                    answer.cancel()
                    writer.transport.abort()
        return "open", n_sent

    def head(self, path: str, *lines: str, key: bool = True) -> bytes:
        """Of a POST, without the empty line at its end."""
        authorization = (f"Authorization: Bearer {self.key}",) if key else ()
        return "\r\n".join((f"POST {path} HTTP/1.1", f"Host: {self.host}", *authorization, *lines, "")).encode()

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx2.Response | None]:
        """A stream that is left at the end of the block."""
        try:
            async with self.client.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    await response.aread()
                    self.check(response, path)
                yield response
        except httpx2.TimeoutException as error:
            raise UnansweredError(f"{path}: no answer within {ANSWER} seconds") from error
        except httpx2.TransportError:
            yield None


def outcome(response: httpx2.Response | None) -> str:
    return "closed" if response is None else str(response.status_code)


async def several(*asked: Awaitable[str]) -> str:
    """All at once: the outcomes, each once."""
    return " ".join(sorted(set(await asyncio.gather(*asked))))


def refused(found: tuple[str, int]) -> str:
    """Raises WeaknessError for what was served, or taken and left open."""
    what, n_sent = found
    if what == "open" or what.startswith("2"):
        raise WeaknessError(f"{n_sent} bytes were taken: {what}")
    return what
