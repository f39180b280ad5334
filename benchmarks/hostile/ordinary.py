"""Ordinary clients: what they get is, bit for bit, what they got when they were alone, and without long gaps."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import httpx2

from benchmarks.hostile.words import words

PATIENCE = 180  # seconds for an answer
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": words(3, 6), "parameters": {"max_new_tokens": 90, "details": True}}),
    (
        "/generate_stream",
        {
            "inputs": words(4, 40),
            "parameters": {"max_new_tokens": 90, "do_sample": True, "seed": 4, "top_n_tokens": 3, "details": True},
        },
    ),
    (
        "/generate_stream",
        {
            "inputs": words(5, 10),
            "parameters": {"max_new_tokens": 60, "seed": 5, "grammar": {"type": "regex", "value": "[a-z ]{90}"}},
        },
    ),
    (
        "/v1/completions",
        {"prompt": words(6, 300), "max_tokens": 90, "seed": 6, "logprobs": 3, "stop": ["zzz"]},
    ),
    ("/v1/completions", {"prompt": words(7, 20), "max_tokens": 90, "seed": 7, "top_k": 50, "frequency_penalty": 0.5}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": words(8, 30)}], "max_tokens": 90, "seed": 8, "temperature": 1.2},
    ),
]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": words(9, 30), "max_tokens": 30, "n": 3, "seed": 9, "logprobs": 2}),
    ("/v1/completions", {"prompt": words(10, 100), "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": [words(11, 5), words(12, 9)], "max_tokens": 20, "seed": 11}),
]
TURNS = [words(20 + i, 12) for i in range(3)]


@dataclass
class Seen:
    """By the ordinary clients. Gaps and latencies as (when it ended, seconds), on the machine's monotonic clock."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    health: list[tuple[float, float]] = field(default_factory=list)
    own_delay: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class FailedError(Exception):
    """A request that should have been served was not."""


class Ordinary:
    """alone: the answers to be expected. news: tells the attacker prompts and session ids that are none of his."""

    def __init__(self, url: str, key: str, news: Queue[tuple[str, str]], stop: Event) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self.client = httpx2.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE)
        self.news, self.stop = news, stop
        self.seen = Seen()
        self.alone: dict[str, Any] = {}

    async def learn(self) -> None:
        """What the same requests give alone, one after another."""
        for path, body in STREAMS:
            self.alone[key_of(path, body)] = await self.stream(path, body)
        for path, body in WHOLE:
            self.alone[key_of(path, body)] = essence(await self.post(path, body))
        self.alone["turns"] = await self.talk()
        self.seen = Seen()

    async def live(self) -> Seen:
        """Until it is told to stop."""
        streams = [self.repeat(self.streaming, i) for i in range(3)]
        others = [self.repeat(self.asking), self.repeat(self.talking), self.repeat(self.confiding)]
        await asyncio.gather(*streams, *others, self.look_at_health(), self.look_at_itself())
        await self.client.aclose()
        return self.seen

    async def repeat(self, action: Any, seed: int = 0) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            try:
                await action(chance)
                self.seen.counts[action.__name__] += 1
            except (FailedError, httpx2.HTTPError) as error:
                self.seen.failures.append(f"{action.__name__}: {type(error).__name__}: {error!s:.300}")
                await asyncio.sleep(0.5)  # a server that is gone is noticed by somebody else
            await asyncio.sleep(0.05)

    async def streaming(self, chance: random.Random) -> None:
        path, body = chance.choice(STREAMS)
        self.compare(key_of(path, body), await self.stream(path, body))

    async def asking(self, chance: random.Random) -> None:
        path, body = chance.choice(WHOLE)
        self.compare(key_of(path, body), essence(await self.post(path, body)))

    async def talking(self, chance: random.Random) -> None:
        self.compare("turns", await self.talk())

    async def confiding(self, chance: random.Random) -> None:
        """A prompt that nobody else knows. Once it is cached, the attacker is told, and guesses it."""
        secret = words(random.SystemRandom().getrandbits(64), 300)
        await self.post("/v1/completions", {"prompt": secret, "max_tokens": 2})
        self.news.put(("secret", secret))
        await asyncio.sleep(1)

    def compare(self, what: str, found: Any) -> None:
        if found != self.alone[what]:
            self.seen.differences.append(f"{what:.200}: {found!s:.300} and not {self.alone[what]!s:.300}")

    async def talk(self) -> list[Any]:
        """A session of three turns; the last is taken by a fork and by an imported copy as well, to the same text."""
        session = (await self.post("/sessions"))["session_id"]
        self.news.put(("session", session))
        made = [session]
        found: list[Any] = []
        try:
            found += [await self.turn(session, turn) for turn in TURNS[:-1]]
            forks = (await self.post(f"/sessions/{session}/fork", {"n": 1}))["sessions"]
            made += [card["session_id"] for card in forks]
            file = (await self.request("GET", f"/sessions/{session}/export")).content
            made.append((await self.request("POST", "/sessions/import", content=file)).json()["session_id"])
            lasts = [await self.turn(name, TURNS[-1]) for name in made]
            if any(last != lasts[0] for last in lasts):
                self.seen.differences.append(f"a session, its fork and its copy: {lasts}")
            return [*found, lasts[0]]
        finally:
            for name in made:
                await self.request("DELETE", f"/sessions/{name}")

    async def turn(self, session: str, inputs: str) -> Any:
        parameters = {"max_new_tokens": 20, "do_sample": True, "seed": 1, "details": True}
        return essence(
            await self.post("/generate", {"inputs": inputs, "parameters": parameters, "session_id": session})
        )

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return (await self.request("POST", path, json=body)).json()

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Again, if the server says that it is busy. Raises FailedError."""
        while True:
            response = await self.client.request(method, path, **options)
            if response.status_code != 429:
                break
            self.seen.counts["told to come back"] += 1
            await asyncio.sleep(0.2)
        if response.status_code >= 300:
            raise FailedError(f"{method} {path}: {response.status_code} {response.text}")
        return response

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events but for what no two requests share. Raises FailedError."""
        while True:
            started = last = time.monotonic()
            async with self.client.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code == 429:
                    self.seen.counts["told to come back"] += 1
                    await asyncio.sleep(0.2)
                    continue
                if response.status_code != 200:
                    raise FailedError(f"{path}: {response.status_code} {(await response.aread())!r:.300}")
                events: list[Any] = []
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    now = time.monotonic()
                    if events:
                        self.seen.gaps.append((now, now - last))
                    else:
                        self.seen.first_tokens.append(now - started)
                    last = now
                    text = line.removeprefix("data:").strip()
                    events.append(text if text == "[DONE]" else essence(json.loads(text)))
                if any("error" in event for event in events if isinstance(event, dict)):
                    raise FailedError(f"{path}: a stream ended with {events[-2:]}")
                return events

    async def look_at_health(self) -> None:
        while not self.stop.is_set():
            started = time.monotonic()
            try:
                status: object = (await self.client.get("/health")).status_code
            except httpx2.HTTPError as error:
                status = type(error).__name__
            now = time.monotonic()
            self.seen.health.append((now, now - started))
            if status != 200:
                self.seen.failures.append(f"/health: {status}")
            await asyncio.sleep(0.25)

    async def look_at_itself(self) -> None:
        """The longest time for which these clients themselves were not run."""
        while not self.stop.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            self.seen.own_delay = max(self.seen.own_delay, time.monotonic() - before - 0.01)


def key_of(path: str, body: dict[str, Any]) -> str:
    return f"{path} {json.dumps(body)}"


def essence(answer: Any, depth: int = 0) -> Any:
    """Without names, times and what the cache had, which differ from one request to the next."""
    if isinstance(answer, dict):
        volatile = {"cached_tokens", *(("id", "created") if depth == 0 else ())}
        return {name: essence(value, depth + 1) for name, value in answer.items() if name not in volatile}
    return [essence(value, depth + 1) for value in answer] if isinstance(answer, list) else answer


async def _live(url: str, key: str, news: Queue[tuple[str, str]], ready: Event, stop: Event) -> Seen:
    clients = Ordinary(url, key, news, stop)
    await clients.learn()
    ready.set()
    seen = await clients.live()
    news.cancel_join_thread()  # nobody listens any more
    return seen


def run(url: str, key: str, news: Queue[tuple[str, str]], ready: Event, stop: Event, results: Any) -> None:
    """The process of the ordinary clients; results: a connection that gets what they saw."""
    results.send(asyncio.run(_live(url, key, news, ready, stop)))
