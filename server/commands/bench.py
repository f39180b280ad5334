"""`aft bench`: what a server does for many clients that stream at a time.

The clients speak HTTP over bare sockets: on a machine that they share with the server, a client library would be a
large part of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table
from uvicorn.loops.auto import auto_loop_factory

from server.errors import ServerError

T = TypeVar("T")


class BenchError(ServerError):
    """The server did not answer as expected."""


@dataclass
class Timing:
    """One stream. Times in seconds from its request."""

    arrivals: list[float] = field(default_factory=list)

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0]

    @property
    def inter_token_latencies(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def stream(host: str, port: int, path: str, body: dict[str, Any], api_key: str | None = None) -> Timing:
    """Send `body` to a route and time its events. Raises BenchError unless a stream of tokens is the answer."""
    content = json.dumps({**body, "stream": True}).encode()
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BenchError(f"Nobody answers at http://{host}:{port} ({reason}); is aft serve running there?") from error
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise BenchError(f"The server answered {(status + await reader.read()).decode(errors='replace')}")
        timing = Timing()
        end = b""
        while chunk := await reader.read(2**16):
            # An event ends with an empty line; the one that ends the head is "\r\n\r\n".
            n_events = (end[-1:] + chunk).count(b"\n\n")
            timing.arrivals += [time.perf_counter() - started] * n_events
            end = (end + chunk)[-4096:]
        if b'"error"' in end or not timing.arrivals:
            raise BenchError(f"A stream ended with {end.decode(errors='replace')}")
    except (OSError, ValueError) as error:  # the latter of a first line without an end
        raise BenchError(f"http://{host}:{port} broke off its answer: {error}.") from error
    finally:
        writer.close()
    return timing


def parse_url(url: str) -> tuple[str, int]:
    """Host and port. Raises BenchError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise BenchError(f"url must be http://HOST:PORT, not {url!r}: {error}.") from error
    if parts.scheme != "http" or not host:
        raise BenchError(f"url must be http://HOST:PORT, not {url!r}.")
    return host, port


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on the event loop that costs least."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(main)


async def run(
    url: str, bodies: list[dict[str, Any]], n_clients: int, *, path: str = "/generate", api_key: str | None = None
) -> list[Timing]:
    """Timings of all bodies, of which `n_clients` are under way at a time. Raises BenchError as `stream`."""
    host, port = parse_url(url)
    gate = asyncio.Semaphore(n_clients)

    async def one(body: dict[str, Any]) -> Timing:
        async with gate:
            return await stream(host, port, path, body, api_key)

    return await asyncio.gather(*(one(body) for body in bodies))


def bench(
    url: Annotated[str, typer.Option(help="Address of the server, http only.")] = "http://127.0.0.1:8000",
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="Streams at a time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Streams in all.")] = 64,
    prompt: Annotated[str, typer.Option(help="Each prompt is this and a number.")] = "Once upon a time, in year",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text; fewer if it ends.")] = 128,
    api_key: Annotated[str | None, typer.Option(help="Sent with each request.")] = None,
) -> None:
    """Measure a running server: throughput, time to the first token, time between tokens."""
    bodies = [
        {"inputs": f"{prompt} {i}", "parameters": {"max_new_tokens": max_tokens, "do_sample": True, "seed": i}}
        for i in range(requests)
    ]
    started = time.perf_counter()
    timings = run_fast(run(url, bodies, clients, api_key=api_key))
    seconds = time.perf_counter() - started
    n_tokens = sum(len(timing.arrivals) for timing in timings)
    table = Table("", "median", "p90", "p99")
    for name, values in (
        ("time to first token, ms", [timing.time_to_first_token for timing in timings]),
        ("between tokens, ms", [gap for timing in timings for gap in timing.inter_token_latencies]),
        ("whole text, ms", [timing.arrivals[-1] for timing in timings]),
    ):
        table.add_row(name, *(f"{1000 * percentile(values, p):.1f}" for p in (50, 90, 99)))
    console = Console()
    console.print(
        f"{requests} streams, {clients} at a time: {n_tokens} tokens in {seconds:.1f} s, "
        f"{n_tokens / seconds:,.0f} tokens/s",
        highlight=False,
    )
    console.print(table)


def percentile(values: list[float], p: int) -> float:
    """The value that p percent do not exceed; 0 of none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]
