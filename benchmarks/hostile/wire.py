"""Attacks on what comes before a request is understood: bodies, headers, connections, and readers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import httpx2

from benchmarks.hostile.attacker import (
    ADDRESS,
    MIB,
    PATIENCE,
    REFUSED,
    Attacker,
    WeaknessError,
    attack,
    outcome,
    refused,
    several,
)

# Bodies


@attack
async def body_huge(self: Attacker) -> str:
    return await self.post("/generate", b" " * (16 * MIB), REFUSED)


@attack
async def body_without_end(self: Attacker) -> str:
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    head = self.head("/generate", "Content-Type: application/json", "Transfer-Encoding: chunked", "")
    return refused(await self.raw([head, *[chunk] * 512]))


@attack
async def body_slow(self: Attacker) -> str:
    head = self.head("/generate", "Content-Type: application/json", "Content-Length: 100000", "")
    found = [self.raw([head, *[b" "] * 100_000], pause=0.2) for _ in range(20)]
    return await several(*(closed(one) for one in found))


async def closed(found: Awaitable[tuple[str, int]]) -> str:
    what, n_sent = await found
    if what == "open":
        raise WeaknessError(f"a connection that had sent {n_sent} bytes was open after {PATIENCE} seconds")
    return what


@attack
async def body_of_unknown_keys(self: Attacker) -> str:
    path = self.chance.choice(["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
    return await self.post(path, {str(i): 0 for i in range(380_000)}, REFUSED)


@attack
async def body_deep(self: Attacker) -> str:
    opening, closing = self.chance.choice([("[", "]"), ('{"a":', "}")])
    n = self.chance.choice([500, 100_000])
    return await self.post("/generate", f'{{"inputs": {opening * n}1{closing * n}}}'.encode(), REFUSED)


WRONG: list[Any] = [
    *(None, True, -1, 0.5, 10**400, float("nan"), float("inf"), "", "\ud800", "x\x00", "y" * 3000, [], [[]], {}),
    *([None], [1e300], ["a", 1], {"a": {"b": []}}, {"type": "regex", "value": 1}, [{"role": "user"}], 2**53 + 1),
]
FIELDS = {
    "/generate": ("inputs", "parameters", "stream", "session_id"),
    "/v1/completions": ("prompt", "max_tokens", "stop", "logit_bias", "n", "temperature", "seed", "logprobs"),
    "/v1/chat/completions": ("messages", "response_format", "top_logprobs", "stream_options", "tools"),
    "/tokenize": ("inputs", "prompt", "messages"),
    "/detokenize": ("tokens",),
}


@attack
async def body_of_wrong_types(self: Attacker) -> str:
    path = self.chance.choice(list(FIELDS))
    whole: dict[str, dict[str, Any]] = {"/generate": {"inputs": "x"}, "/detokenize": {"tokens": [5]}}
    good = whole.get(path, {})
    broken = [{**good, self.chance.choice(FIELDS[path]): self.chance.choice(WRONG)} for _ in range(20)]
    limit = {"parameters": {"max_new_tokens": 2}} if path == "/generate" else {}
    return await several(*(self.post(path, {**limit, **body}) for body in broken))


# Headers and connections


@attack
async def headers_without_end(self: Attacker) -> str:
    lines = (b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(8192))
    return refused(await self.raw([b"GET /health HTTP/1.1\r\nHost: x\r\n", *lines]))


@attack
async def header_long(self: Attacker) -> str:
    pieces = [b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", *[b"a" * 2**16] * 128]
    return refused(await self.raw(pieces))


@attack
async def url_long(self: Attacker) -> str:
    return refused(await self.raw([b"GET /", *[b"a" * 2**16] * 128]))


@attack
async def headers_many(self: Attacker) -> str:
    lines = (b"X-%d: a\r\n" % i for i in range(500_000))
    return refused(await self.raw([b"GET /health HTTP/1.1\r\nHost: x\r\n", b"".join(lines), b"\r\n"]))


@attack
async def trailers_without_end(self: Attacker) -> str:
    head = self.head("/generate", "Content-Type: application/json", "Transfer-Encoding: chunked", "")
    body = json.dumps({"inputs": "One day", "parameters": {"max_new_tokens": 1}}).encode()
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    lines = (b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(8192))
    return refused(await self.raw([head, chunk, *lines]))


@attack
async def headers_slow(self: Attacker) -> str:
    pieces = [b"GET /health HTTP/1.1\r\nHost: x\r\n", *[b"X"] * 100_000]
    return await several(*(closed(self.raw(pieces, pause=0.2)) for _ in range(20)))


@attack
async def connections_silent(self: Attacker) -> str:
    """Most of them hold for seconds only; whether one is closed by itself is seen with the last."""
    writers = []
    for _ in range(400):
        with suppress(OSError):
            writers.append((await asyncio.open_connection(self.host, self.port, local_addr=(ADDRESS, 0)))[1])
    await asyncio.sleep(3)
    for writer in writers:
        writer.close()
    return await closed(self.raw([]))


BAD_REQUESTS = [
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX\x00Y: 1\r\n\r\n",
    b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 1000 + b"nonsense\r\n\r\n",
    bytes(range(256)) * 16,
]


@attack
async def requests_malformed(self: Attacker) -> str:
    async def one(content: bytes) -> str:
        what, _ = await self.raw([content], seconds=30)
        if what == "200":
            raise WeaknessError(f"{content[:60]!r} was served")
        return what

    return await several(*(one(content) for content in self.chance.sample(BAD_REQUESTS, 6)))


@attack
async def upgrade_to_h2c(self: Attacker) -> str:
    """As every client of the JDK offers it: ignored, and the request is served (RFC 9110, 7.8)."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    body = {"inputs": "One day", "parameters": {"max_new_tokens": 2}}
    return outcome(await self.ask("POST", "/generate", allowed=frozenset({200}), json=body, headers=headers))


@attack
async def pipelined_and_unread(self: Attacker) -> str:
    request = b"GET /tokenizer_info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + self.key.encode() + b"\r\n\r\n"
    _, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ADDRESS, 0), limit=1)
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(5):
            for _ in range(500):
                writer.write(request * 50)
                await writer.drain()
    writer.transport.abort()
    return "left"


# Readers


@attack
async def streams_unread(self: Attacker) -> str:
    body = json.dumps({"prompt": "One day", "max_tokens": 4000, "ignore_eos": True, "logprobs": 20, "stream": True})
    head = self.head("/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}", "")
    writers = []
    for _ in range(16):
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ADDRESS, 0), limit=1)
        writer.write(head + b"\r\n" + body.encode())
        writers.append(writer)
        del reader
    await asyncio.sleep(20)
    for writer in writers:
        writer.transport.abort()
    return "left"


@attack
async def streams_read_slowly(self: Attacker) -> str:
    async with self.stream("/generate_stream", {"inputs": "One day", "parameters": {"max_new_tokens": 3000}}) as found:
        if found is None or found.status_code != 200:
            return outcome(found)
        n_read = 0
        with suppress(httpx2.TransportError):
            async for chunk in found.aiter_raw(1024):
                n_read += len(chunk)
                await asyncio.sleep(0.5)
                if n_read > 30 * 1024:
                    break
    return "left"


@attack
async def streams_left(self: Attacker) -> str:
    async def one() -> str:
        async with self.stream("/v1/completions", {"prompt": "One day", "max_tokens": 5000, "n": 4}) as found:
            if found is not None and found.status_code == 200:
                with suppress(httpx2.TransportError):
                    async for _ in found.aiter_raw():
                        break
        return "left" if found is not None and found.status_code == 200 else outcome(found)

    return await several(*(one() for _ in range(20)))
