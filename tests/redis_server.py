"""A Redis of the tests' own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest
from redis import Redis, RedisError

from benchmarks.ports import free_port

REDIS = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(REDIS is None, reason="needs redis-server")


class RedisServer:
    """redis-server on a free port, answering on entry, and again after `kill` and `start`. It syncs each write."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}"
        settings = {"port": port, "dir": folder, "appendonly": "yes", "appendfsync": "always", "save": ""}
        self._command = [str(REDIS), *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        with Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except RedisError:
                    assert self._process.poll() is None, "redis-server has ended"
                    assert time.monotonic() < deadline, "redis-server did not answer within a minute"
                    time.sleep(0.02)

    def pause(self) -> None:
        """It is there, takes connections, and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a loss of power ends it, but for the kernel's buffers."""
        self._process.kill()
        self._process.wait()
