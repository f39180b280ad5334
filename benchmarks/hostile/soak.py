"""The run: server, clients, attacker, what is measured, and what is asked of it."""

from __future__ import annotations

import math
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.hostile import attacking, ordinary
from benchmarks.hostile.attacker import LeakError, UnansweredError, WeaknessError
from benchmarks.hostile.attacking import Attempt
from benchmarks.hostile.ordinary import Seen
from benchmarks.servers import AFT, Serving, serving

KEYS = ("ordinary-key", "hostile-key")
OPTIONS = ("--max-sessions", "200", "--max-queue-length", "64", "--prefix-cache", "64")
LONGEST_GAP, MOST_GROWTH = 0.5, 0.02  # seconds; of memory
WARM_UP = 0.2  # of the time
SAMPLED = 0.5  # seconds between two looks at the memory


@dataclass
class Report:
    """memory: (time, bytes) of the server and the processes that it started."""

    seen: Seen
    attempts: list[Attempt]
    memory: list[tuple[float, int]]
    deaths: list[str] = field(default_factory=list)
    left_behind: str = ""

    def of(self, kind: str) -> list[str]:
        """The attacks that raised it, each with what it found, once."""
        return list(dict.fromkeys(f"{one.name}: {one.outcome}" for one in self.attempts if one.kind == kind))

    @property
    def longest_gap(self) -> float:
        return max((gap for _, gap in self.seen.gaps), default=0.0)

    @property
    def longest_calm_gap(self) -> float:
        """Before the first attack: what the machine itself does to a stream."""
        first = min((one.begun for one in self.attempts), default=math.inf)
        return max((gap for end, gap in self.seen.gaps if end < first), default=0.0)

    @property
    def growth(self) -> float | None:
        """Of the median memory from the first fifth after the warm-up to the last; None where a run was too short."""
        if len(self.memory) < 10 * 60 / SAMPLED:
            return None
        sizes = [size for _, size in self.memory]
        fifth = int(len(sizes) * WARM_UP)
        return statistics.median(sizes[-fifth:]) / statistics.median(sizes[fifth : 2 * fifth]) - 1

    def as_json(self) -> dict[str, Any]:
        attempts = [asdict(one) for one in self.attempts]
        return {"targets": self.targets(), "seen": vars(self.seen), "attempts": attempts, "memory": self.memory}

    def targets(self) -> list[tuple[str, str, bool]]:
        """(what, found, met)."""
        seen, growth = self.seen, self.growth
        isolation = [*self.of(LeakError.__name__), *seen.differences]
        counts = {
            "deaths of the server": self.deaths,
            "isolation broken": isolation,
            "requests without an answer": self.of(UnansweredError.__name__),
            "attacks neither refused nor bounded": self.of(WeaknessError.__name__),
            "ordinary requests that failed": seen.failures,
            "left running at the end": [self.left_behind] if self.left_behind else [],
        }
        gap = (
            f"{self.longest_gap:.3f} s of {len(seen.gaps)} (before the first attack {self.longest_calm_gap:.3f} s, "
            f"by the clients themselves {seen.own_delay:.3f} s)"
        )
        return [
            (f"longest gap of ordinary streams < {LONGEST_GAP} s", gap, self.longest_gap < LONGEST_GAP),
            (
                f"memory flat within {MOST_GROWTH:.0%}",
                "too short a run" if growth is None else f"{growth:+.2%}",
                growth is None or abs(growth) <= MOST_GROWTH,
            ),
            *((what, f"{len(found)}", not found) for what, found in counts.items()),
        ]


def soak(
    seconds: float,
    workers: int,
    names: list[str],
    options: list[str],
    *,
    rounds: int | None = None,
    calm: float = 0.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """names: of attacks, each of which comes once in a round. calm: seconds before the first.

    `say` is told how it goes.
    """
    context = multiprocessing.get_context("spawn")
    news: Queue[tuple[str, str]] = context.Queue()
    ready, stop = context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        key_file = Path(folder) / "keys"
        key_file.write_text("\n".join(KEYS))
        store = f"{folder}/store.sqlite"
        command = (*AFT, *OPTIONS, "--api-key-file", str(key_file), "--store", store, *options)
        with serving(command, log=log) as server:
            ours, theirs = context.Pipe()
            seen = context.Process(target=ordinary.run, args=(server.url, KEYS[0], news, ready, stop, theirs))
            hostile_ours, hostile_theirs = context.Pipe()
            arguments = (server.url, KEYS[1], workers, names, rounds, calm, seed, news, ready, stop, hostile_theirs)
            hostile = context.Process(target=attacking.run, args=arguments)
            for process, end in ((seen, theirs), (hostile, hostile_theirs)):
                process.start()
                end.close()  # so that its death is seen
            while not ready.wait(0.2):
                if not (server.process.poll() is None and seen.is_alive()):
                    raise RuntimeError("the server or its clients ended before there was an attack")
            memory, deaths = list(watch(server, (seen, hostile), stop, seconds, say)), []
            stop.set()
            report = Report(ours.recv(), hostile_ours.recv(), memory)
            for process in (seen, hostile):
                process.join()
            if server.process.poll() is None:
                report.left_behind = left_behind(server.url)
                server.process.terminate()
            status = server.process.wait(60)
            written = tail(log)
            if status != 0:
                under_way = [one.name for one in report.attempts if one.ended >= memory[-1][0] - 2]
                deaths.append(f"status {status}, under {sorted(set(under_way))}: {written}")
            report.deaths = deaths + [f"in the log: {line}" for line in tracebacks(log)]
    return report


def watch(
    server: Serving, clients: Sequence[BaseProcess], stop: Event, seconds: float, say: Callable[[str], None]
) -> Iterator[tuple[float, int]]:
    """Samples of the server's memory until the time or the attacks are over, or one of the processes is dead."""
    end, told = time.monotonic() + seconds, 0.0
    while time.monotonic() < end and server.process.poll() is None and not stop.is_set():
        if not all(client.is_alive() for client in clients):
            return
        now, size = time.monotonic(), resident_bytes(server.process.pid)
        yield now, size
        if now - told > 60:
            told = now
            say(f"{end - now:6.0f} s to go, {size / 2**20:.0f} MiB resident")
        time.sleep(SAMPLED)


def resident_bytes(pid: int) -> int:
    """Of a process and of those that it started (Linux)."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        own = sum(int(kib) * 1024 for kib in re.findall(r"VmRSS:\s+(\d+) kB", status))
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
        return own + sum(resident_bytes(int(child)) for child in children.split())
    return 0


def left_behind(url: str) -> str:
    """Requests that the engine still has a while after all clients are gone."""
    text = ""
    for _ in range(60):
        metrics = httpx2.get(f"{url}/metrics", timeout=60).text
        pattern = r"^vllm:num_requests_(\w+)\{?.*?\}? ([0-9.e+]+)$"
        text = ", ".join(f"{n} {what}" for what, n in re.findall(pattern, metrics, re.M) if float(n))
        if not text:
            break
        time.sleep(1)
    return text


def tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-1000:].decode(errors="replace"))


def tracebacks(log: Any) -> list[str]:
    log.seek(0)
    text = log.read().decode(errors="replace")
    return list(dict.fromkeys(re.findall(r"Traceback \(most recent call last\):\n(?:[ +|].*\n)*(\S.*)", text)))
