"""Thousands of mixed requests through one server: is every one accounted for, and does memory stay?

    python -m benchmarks.soak --requests 10000

Against the asynchronous engine in this process, on the bundled weights: prompts of 1 to 400 tokens, some of them seen
before, greedy and sampled, several texts at once, stop strings, grammars, log-probabilities, requests that are left,
that run into a deadline, that are refused.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from model import load_checkpoint
from model.errors import ModelError
from model.sampling import Grammar, SamplingParams
from server import BUNDLED_MODEL
from server.engine import AsyncEngine, EngineConfig, LLMEngine
from server.errors import InvalidRequestError, OverloadedError, RequestTimeoutError

WORDS = [
    *("one", "two", "three", "little", "red", "fox", "bird", "tree", "house", "ran", "saw", "said"),
    *("happy", "sad", "big", "small", "day", "night", "sun", "moon"),
]


def main(
    requests: Annotated[int, typer.Option(min=1)] = 10_000,
    clients: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 76,
    seed: int = 0,
) -> None:
    asyncio.run(soak(requests, clients, random.Random(seed)))


async def soak(n_requests: int, n_clients: int, chance: random.Random) -> None:
    model, tokenizer = load_checkpoint(BUNDLED_MODEL)
    inner = LLMEngine(model, tokenizer, EngineConfig(max_queue_length=40, prefix_cache_bytes=2**26))
    engine = AsyncEngine(inner)
    engine.start()
    outcomes: Counter[str] = Counter()
    numbers = iter(range(n_requests))
    memory: dict[int, int] = {}

    async def client() -> None:
        for number in numbers:
            outcomes[await one_request(engine, random.Random(chance.random()), outcomes)] += 1
            done = number + 1
            if done % 1000 == 0:
                memory[done] = resident_bytes()
                print(f"{done:6} requests: {memory[done] / 2**20:.1f} MiB resident, {dict(outcomes)}", flush=True)

    await asyncio.gather(*(client() for _ in range(n_clients)))
    await engine.drain(60)
    engine.stop()
    accounted = outcomes.total() - outcomes["told to come back"] == n_requests and engine.num_requests == 0
    clean = inner.scheduler.n_free_slots == inner.pool.n_slots and not inner.has_work and not len(inner.pool)
    growth = resident_bytes() / memory.get(1000, resident_bytes()) - 1
    print(f"{n_requests} requests: {dict(outcomes)}; all accounted for: {accounted}; no slot left: {clean}")
    print(f"resident memory against that after 1,000 requests: {100 * growth:+.2f} %")


async def one_request(engine: AsyncEngine, chance: random.Random, outcomes: Counter[str]) -> str:
    kind = chance.choice(["plain"] * 6 + ["left", "late", "bad", "several", "grammar", "stop", "logprobs"])
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 150)))
    if chance.random() < 0.3:
        text = " ".join(WORDS * chance.randint(1, 7))  # seen before
    params = SamplingParams(
        max_tokens=chance.randint(1, 40),
        temperature=chance.choice([0.0, 0.8, 1.2]),
        top_k=chance.choice([None, 50]),
        top_p=chance.choice([1.0, 0.9]),
        seed=chance.getrandbits(64),
        n=chance.randint(2, 5) if kind == "several" else 1,
        grammar=Grammar("regex", f"[a-z ]{{{15 * chance.randint(1, 20)}}}") if kind == "grammar" else None,
        stop=(chance.choice([" the", ".", "zzz"]),) if kind == "stop" else (),
        logprobs=5 if kind == "logprobs" else None,
        prompt_logprobs=1 if kind == "logprobs" else None,
        banned_token_ids=(10**6,) if kind == "bad" else (),
    )
    while True:
        try:
            stream = await engine.submit(text, params, timeout=0.001 if kind == "late" else None)
            break
        except OverloadedError:
            outcomes["told to come back"] += 1
            await asyncio.sleep(0.2)
        except (InvalidRequestError, ModelError):
            return "refused"
    try:
        n_outputs = 0
        async for _ in stream:
            n_outputs += 1
            if kind == "left" and n_outputs == 3:
                return "left"
        return "done"
    except RequestTimeoutError:
        return "late"
    finally:
        stream.close()


def resident_bytes() -> int:
    """Of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    typer.run(main)
