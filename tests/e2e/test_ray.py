"""Two replicas under Ray Serve, one store. The tests share them; the one of SIGTERM is the last that can."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from fastapi.testclient import TestClient

from model import load_checkpoint
from server import BUNDLED_MODEL
from server.api.app import create_app
from server.engine import EngineConfig, LLMEngine
from tests.e2e.conftest import Server
from tests.redis_server import RedisServer, needs_redis

pytestmark = [needs_redis, pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")]

N_SESSIONS = 16
SAID = ["The fox", " and the bird", " sat in the sun", " and then", " One day", " The end"]
DRAIN_SECONDS = 15.0  # within which the test must see that they drain
ENDLESS = {"max_new_tokens": 10**6, "grammar": {"type": "regex", "value": "[a-z]{900000}"}}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--ray", "--replicas", "2", "--model", str(checkpoint), "--threads", "1", "--batch-invariant"]
    arguments += ["--max-num-seqs", "4", "--max-queue-length", "4", "--drain-timeout", str(DRAIN_SECONDS)]
    with (
        RedisServer(tmp_path_factory.mktemp("redis")) as redis,
        Server(*arguments, "--store", redis.url, RAY_ADDRESS="local") as server,
    ):
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[str]]:
    """The texts of each session's turns by one engine."""
    engine = LLMEngine(*load_checkpoint(checkpoint), EngineConfig(max_num_seqs=4, batch_invariant=True))
    with TestClient(create_app(engine)) as client:
        sessions = [new_session(client) for _ in range(N_SESSIONS)]
        return [
            [str(turn(client, name, i, j).json()["generated_text"]) for j in range(len(SAID))]
            for i, name in enumerate(sessions)
        ]


def new_session(client: httpx2.Client | TestClient) -> str:
    name: str = client.post("/sessions").json()["session_id"]
    return name


def turn(client: httpx2.Client | TestClient, session: str, i: int, j: int) -> Any:
    """The answer to turn j of the session of that number: half of them are sampled."""
    chosen = {"temperature": 1.0, "seed": 100 * i + j} if i % 2 else {}
    body = {"inputs": SAID[j], "parameters": {"max_new_tokens": 10 + i, **chosen}, "session_id": session}
    return client.post("/generate", json=body)


def test_sessions_go_on_at_any_replica(client: httpx2.Client, expected: list[list[str]]) -> None:
    sessions = [new_session(client) for _ in range(N_SESSIONS)]

    def converse(i: int) -> tuple[list[str], list[str]]:
        answers = [turn(client, sessions[i], i, j) for j in range(len(SAID))]
        return [str(a.json()["generated_text"]) for a in answers], [a.headers["x-replica-id"] for a in answers]

    with ThreadPoolExecutor(8) as pool:
        texts, replicas = zip(*pool.map(converse, range(N_SESSIONS)), strict=True)
    assert list(texts) == expected
    assert len({name for served in replicas for name in served}) == 2
    n_moved = sum(len(set(served)) == 2 for served in replicas)
    assert n_moved >= N_SESSIONS // 2  # by chance it is all but one in 32


def test_a_session_header_keeps_to_a_replica(client: httpx2.Client) -> None:
    replicas = [{replica_of(client, f"s{i}") for _ in range(5)} for i in range(16)]
    assert all(len(names) == 1 for names in replicas)
    assert len(set.union(*replicas)) == 2


def replica_of(client: httpx2.Client, header: str) -> str:
    name: str = client.get("/health", headers={"x-session-id": header}).headers["x-replica-id"]
    return name


def headers_of_two_replicas(client: httpx2.Client) -> list[str]:
    return list({replica_of(client, f"s{i}"): f"s{i}" for i in range(16)}.values())


def test_of_two_turns_at_two_replicas_the_first_to_end_is_kept(client: httpx2.Client) -> None:
    session = new_session(client)
    here, there = headers_of_two_replicas(client)
    body = {"inputs": "The fox", "parameters": {**ENDLESS, "max_new_tokens": 4000}, "session_id": session}
    with client.stream("POST", "/generate_stream", json=body, headers={"x-session-id": here}) as slow:
        events = (json.loads(line.removeprefix("data:")) for line in slow.iter_lines() if line)
        assert "token" in next(events)
        quick = client.post(
            "/generate",
            json={"inputs": "The bird", "parameters": {"max_new_tokens": 3, "details": True}, "session_id": session},
            headers={"x-session-id": there},
        )
        assert quick.status_code == 200
        *_, last = events
    assert "was changed or deleted during this turn" in last["error"]
    assert client.get(f"/sessions/{session}").json()["turns"] == 1


def test_more_than_the_replicas_take_is_refused(server: Server, client: httpx2.Client) -> None:
    body = {"inputs": "The fox", "parameters": {**ENDLESS, "max_new_tokens": 1000}}
    with ThreadPoolExecutor(60) as pool, httpx2.Client(base_url=server.url, timeout=600) as many:
        answers = list(pool.map(lambda _: many.post("/generate", json=body), range(60)))
    n_answers = Counter(answer.status_code for answer in answers)
    assert set(n_answers) == {200, 429}
    assert n_answers[200] >= 16  # both replicas full
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
    assert client.post("/generate", json={"inputs": "The fox"}).status_code == 200


def test_a_killed_replica_loses_no_turn(
    server: Server, client: httpx2.Client, expected: list[list[str]], record_property: Any
) -> None:
    sessions = [new_session(client) for _ in range(N_SESSIONS)]
    failed: list[str] = []
    begun, killed = threading.Semaphore(0), threading.Event()

    def converse(i: int) -> None:
        """Retries as a client should: it asks first whether the turn was kept."""
        for j, text in enumerate(expected[i]):
            if j == len(SAID) - 1:
                assert killed.wait(600)
            if j > 0:
                begun.release()
            while True:
                try:
                    answer = turn(client, sessions[i], i, j)
                    if answer.status_code == 200:
                        assert answer.json()["generated_text"] == text
                        break
                    failed.append(f"{answer.status_code} {answer.text}")
                    card = client.get(f"/sessions/{sessions[i]}")
                    if card.status_code == 200 and card.json()["turns"] == j + 1:
                        break
                except httpx2.TransportError as error:
                    failed.append(repr(error))
                time.sleep(0.1)

    with ThreadPoolExecutor(N_SESSIONS) as pool:
        conversations = [pool.submit(converse, i) for i in range(N_SESSIONS)]
        for _ in range(N_SESSIONS + 1):  # all sent their second turn, or some have even got an answer to it
            assert begun.acquire(timeout=600)
        os.kill(pid_of_a_replica(server), signal.SIGKILL)
        killed.set()
        for conversation in conversations:
            conversation.result()
    assert failed  # those that the replica was at
    record_property("failed_requests", failed)
    print(f"{len(failed)} requests failed: {Counter(failed)}")
    turns = [client.get(f"/sessions/{name}").json()["turns"] for name in sessions]
    assert turns == [len(SAID)] * N_SESSIONS
    deadline = time.monotonic() + 600
    while len({replica_of(client, f"s{i}") for i in range(16)}) < 2:  # until Ray has replaced it
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pid_of_a_replica(server: Server) -> int:
    return int(re.findall(r"Replica pid=(\d+)", server.read_log())[-1])


def test_sigterm_drains_every_replica(server: Server, client: httpx2.Client) -> None:
    body = {"inputs": "The fox", "parameters": ENDLESS}
    started, refused = threading.Barrier(3), threading.Event()

    def last_event(header: str) -> tuple[dict[str, Any], int]:
        """And how many tokens came after new requests were refused."""
        n_after = 0
        with client.stream("POST", "/generate_stream", json=body, headers={"x-session-id": header}) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert '"token"' in next(lines)
            started.wait()
            for last in lines:
                n_after += refused.is_set() and '"token"' in last
        return json.loads(last.removeprefix("data:")), n_after

    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(last_event, header) for header in headers_of_two_replicas(client)]
        started.wait()
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while client.get("/ready").status_code == 200:
            assert time.monotonic() < deadline
        assert client.post("/generate", json={"inputs": "The fox"}).status_code == 503
        refused.set()
        for stream in streams:
            event, n_after = stream.result()
            assert event["error"] == "The server is shutting down."
            assert n_after > 0
    assert server.process.wait(timeout=60) == 0


def test_replicas_that_do_not_start_say_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--ray", "--port", "0", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": "local"})
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: The replicas do not start: ")
    assert line.endswith(f"Checkpoint folder {tmp_path} has no file config.json.")


def built(folder: Path, **variables: str) -> Any:
    """The deployment that Ray makes of AFT_* variables."""
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "server.deploy.ray_serve:app"]
    subprocess.run([*command, "-o", str(folder / "serve.yaml")], check=True, env={**os.environ, **variables})
    (replica,) = yaml.safe_load((folder / "serve.yaml").read_text())["applications"][0]["deployments"]
    return replica


def test_serve_run_has_the_options_as_variables(tmp_path: Path) -> None:
    variables = {"AFT_REPLICAS": "2", "AFT_MAX_REPLICAS": "4", "AFT_STORE": "redis://host", "AFT_DEVICE": "cuda"}
    variables |= {"AFT_MAX_NUM_SEQS": "7", "AFT_MAX_QUEUE_LENGTH": "20", "AFT_DRAIN_TIMEOUT": "60", "AFT_THREADS": "3"}
    replica = built(tmp_path, **variables)
    assert replica["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 7}
    assert replica["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1}
    assert (replica["max_ongoing_requests"], replica["max_queued_requests"]) == (27, 27)
    assert replica["graceful_shutdown_timeout_s"] > 60


def test_a_replica_is_sent_what_it_has_memory_for(tmp_path: Path) -> None:
    """And no more, which it would refuse; the state of the bundled model is under a fifth of a MiB."""
    variables = {"AFT_MAX_NUM_SEQS": "7", "AFT_MAX_QUEUE_LENGTH": "20", "AFT_STATE_MEMORY": "1"}
    several = {"AFT_MAX_REPLICAS": "2", "AFT_STORE": "redis://host"}
    model, tokenizer = load_checkpoint(BUNDLED_MODEL)
    engine = LLMEngine(model, tokenizer, EngineConfig(max_num_seqs=7, max_queue_length=20, state_memory=2**20))
    with TestClient(create_app(engine)) as client:
        taken = client.get("/info").json()["max_concurrent_requests"]
    replica = built(tmp_path, **variables, **several)
    assert replica["max_ongoing_requests"] == taken == 25
    assert replica["autoscaling_config"]["target_ongoing_requests"] == 5
