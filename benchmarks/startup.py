"""`python -m benchmarks.startup`: seconds from the command `aft serve` to the first token, and where they go.

Cold means that the page cache is dropped first, which needs root, and that no compiled kernels are kept.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx2
import typer


def main(rounds: int = 3, cold: Annotated[bool, typer.Option(help="Drop the page cache before each.")] = False) -> None:
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            if cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            environment = {**os.environ, "XDG_CACHE_HOME": cache} if cold else dict(os.environ)
            imports = seconds_of([sys.executable, "-c", "import server.cli"]) if not cold else None
            first_token, open_after = serve_and_ask(environment)
        parts = f", of which imports alone take {imports:.2f}" if imports else ""
        print(f"first token after {first_token:.2f} s; the port is open after {open_after:.2f} s{parts}")


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def serve_and_ask(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first token of a stream, and until the port was open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "server", "serve", "--port", f"{port}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.005)
            open_after = time.perf_counter() - started
            body = {"inputs": "Once upon a time", "stream": True, "parameters": {"max_new_tokens": 3}}
            with httpx2.stream("POST", f"http://127.0.0.1:{port}/generate", json=body) as answer:
                lines = answer.iter_lines()
                next(line for line in lines if line.startswith("data:"))
            return time.perf_counter() - started, open_after
        finally:
            server.terminate()


if __name__ == "__main__":
    typer.run(main)
