"""What a client sees of SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import Server

N_STREAMS = 16
ENDLESS_GRAMMAR = {"type": "regex", "value": "[a-z]{900000}"}


def events(url: str, started: threading.Barrier, **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": "The fox", "parameters": parameters, "stream": True}
    with httpx2.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        received = [next(lines)]
        started.wait()
        received += lines
    return [json.loads(line.removeprefix("data:")) for line in received]


def read_until(left: threading.Event, url: str, started: threading.Barrier) -> None:
    """A stream without an end, until its client leaves."""
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 10**6, "grammar": ENDLESS_GRAMMAR}}
    with httpx2.stream("POST", f"{url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        started.wait()
        for _ in lines:
            if left.is_set():
                return
    raise AssertionError("the stream has ended")


@pytest.fixture
def server(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server("--model", str(checkpoint), "--drain-timeout", request.param) as server:
        yield server


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_it_serves_a_server_can_be_stopped(number: signal.Signals, checkpoint: Path) -> None:
    """Also as the first process of a container, for which no signal has a default; without a word."""
    command = [sys.executable, "-m", "server", "serve", "--model", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not handles(process.pid, signal.SIGTERM):  # the last one that it takes
        assert time.monotonic() < deadline
    process.send_signal(number)
    assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 128 + number)


@pytest.mark.parametrize("server", ["600"], indirect=True)
def test_running_streams_end_and_new_requests_get_503(server: Server) -> None:
    started, left = threading.Barrier(N_STREAMS + 2), threading.Event()
    parameters = {"max_new_tokens": 1500, "grammar": ENDLESS_GRAMMAR}
    with ThreadPoolExecutor(N_STREAMS + 1) as pool:
        streams = [pool.submit(events, server.url, started, **parameters) for _ in range(N_STREAMS)]
        last = pool.submit(read_until, left, server.url, started)  # until it has left, the server cannot end
        try:
            started.wait()
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 60
            while httpx2.get(f"{server.url}/ready", timeout=60).status_code == 200:
                assert time.monotonic() < deadline
            refused = httpx2.post(f"{server.url}/generate", json={"inputs": "The fox"}, timeout=60)
            assert refused.status_code == 503
            assert refused.json() == {"error": "The server is shutting down.", "error_type": "overloaded"}
            assert "retry-after" in refused.headers
        finally:
            left.set()
        last.result()
        for stream in streams:
            assert len(stream.result()) == 1500
    assert server.process.wait(timeout=60) == 0


@pytest.mark.parametrize("server", ["0.5"], indirect=True)
def test_past_the_deadline_each_stream_ends_with_an_error_event(server: Server) -> None:
    started = threading.Barrier(N_STREAMS + 1)
    parameters = {"max_new_tokens": 10**6, "grammar": ENDLESS_GRAMMAR}
    with ThreadPoolExecutor(N_STREAMS) as pool:
        streams = [pool.submit(events, server.url, started, **parameters) for _ in range(N_STREAMS)]
        started.wait()
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            *tokens, last = stream.result()
            assert all("token" in event for event in tokens)
            assert last == {"error": "The server is shutting down.", "error_type": "overloaded"}
    assert server.process.wait(timeout=60) == 0


HANGS_IN_ITS_SECOND_STEP = """
import threading
from server.commands.main import main
from server.engine import LLMEngine
LLMEngine._decode = lambda self: threading.Event().wait()
main()
"""


def test_a_step_that_hangs_shows_and_holds_up_neither_time_outs_nor_the_end(checkpoint: Path) -> None:
    arguments = ["--model", str(checkpoint), "--request-timeout", "1", "--step-timeout", "0.5", "--drain-timeout", "1"]
    server = Server(*arguments)
    server._command[1:3] = ["-c", HANGS_IN_ITS_SECOND_STEP]
    with server, ThreadPoolExecutor(5) as pool:
        asked = [
            pool.submit(httpx2.post, f"{server.url}/generate", json={"inputs": "The fox"}, timeout=60) for _ in range(5)
        ]
        # 503 is for who came when it hung already.
        assert {answer.result().status_code for answer in asked} | {503} == {504, 503}
        for path in ("/health", "/ready"):
            answer = httpx2.get(f"{server.url}{path}", timeout=60)
            assert (answer.status_code, answer.text) == (503, "The engine has not ended its step in 0.5 seconds.")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
