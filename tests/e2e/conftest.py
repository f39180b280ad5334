"""Real server processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx2
import pytest

from benchmarks.ports import free_port


class Server:
    """`aft serve ARGUMENTS` on a free port, ready on entry; on exit, ended by SIGTERM with status 0.

    log: what it wrote, complete after the exit.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._environment, self.log = environment, ""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "server", "serve", "--port", str(port), *arguments]

    def __enter__(self) -> Self:
        self._log_file = tempfile.TemporaryFile("w+")
        try:
            self.start()
        except BaseException:
            self.kill()
            self._log_file.close()
            raise
        return self

    def start(self) -> None:
        """Again, after `kill`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self._environment}
        self.process = subprocess.Popen(self._command, env=environment, stderr=self._log_file)
        deadline = time.monotonic() + 600  # Ray takes minutes where cores are shared
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended by itself: {self.read_log()}"
            try:
                if httpx2.get(f"{self.url}/ready", timeout=60).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.05)
        raise TimeoutError(f"{self.url}/ready gave no 200 within ten minutes: {self.read_log()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=60)
        self.log = self.read_log()
        self._log_file.close()
        assert status == 0, self.log
        assert "Traceback" not in self.log, self.log

    def read_log(self) -> str:
        self._log_file.seek(0)
        return self._log_file.read()


@pytest.fixture(scope="session")
def url(checkpoint: Path) -> Iterator[str]:
    """A server on a tiny model of random weights."""
    with Server("--model", str(checkpoint)) as server:
        yield server.url


@pytest.fixture(scope="session")
def bundled_url() -> Iterator[str]:
    """A server as a user starts it, on the bundled weights."""
    with Server() as server:
        yield server.url
