"""What was answered survives SIGKILL, of the server and of Redis, at any moment.

    python -m pytest tests/e2e/test_crashes.py --kills 50 -s

SIGKILL loses no power: what the kernel has, the disk will have.
"""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from safetensors.torch import load

from tests.e2e.conftest import Server
from tests.redis_server import RedisServer, needs_redis

N_CLIENTS = 4
WORDS = ("fox", "bird", "house", "sea", "cat", "dog", "sun", "tree")


@dataclass
class Talk:
    """A client's session: `file` is its conversation after turn `turns`; of the turn after that, what is known."""

    session_id: str
    turns: int = 0
    file: bytes | None = None
    inputs: str | None = None  # that were sent
    answer: str | None = None  # that came


def take_turn(client: httpx2.Client, session_id: str, inputs: str) -> httpx2.Response:
    parameters = {"max_new_tokens": 4, "details": True}
    return client.post("/generate", json={"inputs": inputs, "parameters": parameters, "session_id": session_id})


def export(client: httpx2.Client, session_id: str) -> bytes:
    return client.get(f"/sessions/{session_id}/export").raise_for_status().content


def talk_until_it_fails(url: str, talk: Talk, seed: int, answered: threading.Event) -> int:
    """Turn after turn; returns how many were answered, and tells of the first at once."""
    chance, n_answered = random.Random(seed), 0
    with httpx2.Client(base_url=url, timeout=60) as client:
        while True:
            talk.inputs, talk.answer = " " + " ".join(chance.choices(WORDS, k=chance.randint(1, 5))), None
            try:
                response = take_turn(client, talk.session_id, talk.inputs)
                assert response.status_code in (200, 503), response.text
                talk.answer = response.raise_for_status().json()["generated_text"]
                n_answered += 1
                answered.set()
                talk.file = export(client, talk.session_id)
            except httpx2.HTTPError:
                return n_answered
            talk.turns, talk.inputs, talk.answer = talk.turns + 1, None, None


def check(client: httpx2.Client, talk: Talk) -> bool:
    """The session is where its last answered turn left it, or, bit for bit, one turn on: returns whether that is so."""
    card = client.get(f"/sessions/{talk.session_id}").raise_for_status().json()
    went_on = bool(card["turns"] == talk.turns + 1)
    assert went_on or (card["turns"] == talk.turns and talk.answer is None)
    expected = replay(client, talk) if went_on else talk.file
    if card["turns"]:
        file = export(client, talk.session_id)
        tensors = load(file)
        assert int(tensors["position"]) + len(tensors["unread_ids"]) == card["num_tokens"]
        assert expected is not None
        assert parts(file) == parts(expected)
        talk.turns, talk.file = card["turns"], file
    return went_on and talk.answer is None


def parts(file: bytes) -> tuple[dict[str, object], bytes]:
    """The header and the bytes of the tensors: the order of the header's fields is by chance."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def replay(client: httpx2.Client, talk: Talk) -> bytes:
    """The conversation after the same turn, from the same point, in another session."""
    copying = client.post("/sessions/import", content=talk.file) if talk.file else client.post("/sessions")
    copy = copying.raise_for_status().json()["session_id"]
    answer = take_turn(client, copy, talk.inputs or "").raise_for_status().json()["generated_text"]
    assert talk.answer in (None, answer)
    file = export(client, copy)
    client.delete(f"/sessions/{copy}").raise_for_status()
    return file


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=needs_redis)])
def test_kill_9_loses_no_answered_turn(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    n_kills, chance = request.config.getoption("kills"), random.Random(kind)
    n_answered = n_unanswered = 0
    with RedisServer(tmp_path) if kind == "redis" else nullcontext() as redis:
        store = redis.url if redis else str(tmp_path / "store.sqlite")
        # Batch-invariant, so that a turn that is taken again gives the same bits.
        options = ["--store", store, "--batch-invariant", "--max-num-seqs", str(N_CLIENTS)]
        with Server(*options) as server, ThreadPoolExecutor(N_CLIENTS) as pool, httpx2.Client(timeout=60) as client:
            client.base_url = httpx2.URL(server.url)
            talks = [Talk(client.post("/sessions").json()["session_id"]) for _ in range(N_CLIENTS)]
            killed: list[list[Server | RedisServer]] = [[server], [redis], [server, redis]] if redis else [[server]]
            for i in range(n_kills):
                answered = threading.Event()
                seeds = [chance.getrandbits(32) for _ in talks]
                running = [
                    pool.submit(talk_until_it_fails, server.url, talk, seed, answered)
                    for talk, seed in zip(talks, seeds, strict=True)
                ]
                assert answered.wait(60), "no turn was answered within a minute"
                time.sleep(chance.uniform(0, 1.5))
                for victim in killed[i % len(killed)]:
                    victim.kill()
                n_answered += sum(talking.result() for talking in running)
                for victim in reversed(killed[i % len(killed)]):
                    victim.start()
                n_unanswered += sum([check(client, talk) for talk in talks])
    assert n_answered >= n_kills
    print(f"\n{kind}: {n_kills} kills, {n_answered} turns answered, none lost; {n_unanswered} stored and not answered")
