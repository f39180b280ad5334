"""Real server processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """`python -m server ARGUMENTS` on a free port; yields its URL once it is healthy, and ends it with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "--port", str(port), *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(timeout=30)
    assert exit_code == 0


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended by itself"
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise TimeoutError(f"{url}/health gave no 200 within a minute")


@pytest.fixture(scope="session")
def url(checkpoint: Path) -> Iterator[str]:
    """A server on a tiny model of random weights."""
    with serving("--model", str(checkpoint)) as url:
        yield url


@pytest.fixture(scope="session")
def bundled_url() -> Iterator[str]:
    """A server as a user starts it, on the bundled weights."""
    with serving() as url:
        yield url
