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


@pytest.fixture
def server(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server("--model", str(checkpoint), "--drain-timeout", request.param) as server:
        yield server


def test_before_it_serves_a_server_can_be_stopped(checkpoint: Path) -> None:
    """Also as the first process of a container, for which no signal has a default."""
    process = subprocess.Popen([sys.executable, "-m", "server", "serve", "--model", str(checkpoint), "--port", "0"])
    handled, deadline = re.compile(r"SigCgt:\s*(\w+)"), time.monotonic() + 10
    while time.monotonic() < deadline:
        found = handled.search(Path(f"/proc/{process.pid}/status").read_text())
        assert found is not None
        if int(found[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("server", ["60"], indirect=True)
def test_running_streams_end_and_new_requests_get_503(server: Server) -> None:
    started = threading.Barrier(N_STREAMS + 1)
    parameters = {"max_new_tokens": 1500, "grammar": ENDLESS_GRAMMAR}
    with ThreadPoolExecutor(N_STREAMS) as pool:
        streams = [pool.submit(events, server.url, started, **parameters) for _ in range(N_STREAMS)]
        started.wait()
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while httpx2.get(f"{server.url}/ready").status_code == 200:
            assert time.monotonic() < deadline
        refused = httpx2.post(f"{server.url}/generate", json={"inputs": "The fox"})
        assert refused.status_code == 503
        assert refused.json() == {"error": "The server is shutting down.", "error_type": "overloaded"}
        assert "retry-after" in refused.headers
        for stream in streams:
            assert len(stream.result()) == 1500
    assert server.process.wait(timeout=10) == 0


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
    assert server.process.wait(timeout=10) == 0
