"""The process of the attacker."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

from benchmarks.hostile import generation, keys, wire
from benchmarks.hostile.attacker import ATTACKS, Attacker, LeakError, UnansweredError, WeaknessError

MODULES = (generation, keys, wire)  # what they have is in ATTACKS


@dataclass(frozen=True)
class Attempt:
    """One attack, on the machine's monotonic clock. kind: "met", or the error that it raised."""

    name: str
    begun: float
    ended: float
    outcome: str
    kind: str = "met"


def run(
    url: str,
    key: str,
    workers: int,
    names: list[str],
    rounds: int | None,
    calm: float,
    seed: int,
    news: Queue[tuple[str, str]],
    ready: Event,
    stop: Event,
    results: Any,
) -> None:
    """The attacker's process, which does nothing for the first `calm` seconds.

    It gives way to the others, since an attacker has a machine of his own.
    """
    os.nice(10)
    ready.wait()
    stop.wait(calm)
    attacker = Attacker(url, key, seed)
    results.send(asyncio.run(_attack(attacker, workers, deck(names, rounds, attacker.chance), news, stop)))


def deck(names: list[str], rounds: int | None, chance: random.Random) -> Iterator[str]:
    """Each attack once in a round, in an order by chance."""
    for _ in itertools.count() if rounds is None else range(rounds):
        yield from chance.sample(names, len(names))


async def _attack(
    attacker: Attacker, workers: int, names: Iterator[str], news: Queue[tuple[str, str]], stop: Event
) -> list[Attempt]:
    """`workers` attacks at a time, until there are no more, which stops the others, or until it is told to stop."""
    attempts: list[Attempt] = []

    async def work() -> None:
        for name in names:
            await attempt(attacker, name, attempts)

    tasks = [asyncio.create_task(work()) for _ in range(workers)]
    while not stop.is_set():
        with suppress(queue.Empty):
            while True:
                kind, what = news.get_nowait()
                (attacker.secrets if kind == "secret" else attacker.sessions).append(what)
        done, running = await asyncio.wait(tasks, timeout=0.1)
        for task in done:
            task.result()  # raises what is a mistake of the attack
        if not running:
            stop.set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return attempts


async def attempt(attacker: Attacker, name: str, attempts: list[Attempt]) -> None:
    """Adds what came of it. What is under way at the end of the time is not judged."""
    begun, kind, outcome = time.monotonic(), "met", "cut off by the end"
    try:
        outcome = await ATTACKS[name](attacker)
    except (LeakError, UnansweredError, WeaknessError) as error:
        outcome, kind = str(error), type(error).__name__
    except OSError as error:  # no connection or session: the server's limits, or its end, which is noticed elsewhere
        outcome = type(error).__name__
    finally:
        attempts.append(Attempt(name, begun, time.monotonic(), outcome, kind))
