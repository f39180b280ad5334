"""`python -m benchmarks.startup`: seconds from the command `aft serve` to the first token, and where they go.

Cold means that the page cache is dropped first, which needs root, and that no compiled kernels are kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx2
import typer

from benchmarks.servers import AFT, serving


def main(rounds: int = 3, cold: Annotated[bool, typer.Option(help="Drop the page cache before each.")] = False) -> None:
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            if cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            environment = {"XDG_CACHE_HOME": cache} if cold else {}
            imports = seconds_of([sys.executable, "-c", "import server.commands.main"]) if not cold else None
            first_token, ready_after = serve_and_ask(environment)
        parts = f", of which imports alone take {imports:.2f}" if imports else ""
        print(f"first token after {first_token:.2f} s; ready after {ready_after:.2f} s{parts}")


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def serve_and_ask(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first token of a stream, and until the server was ready."""
    started = time.perf_counter()
    with serving(AFT, environment=environment) as server:
        body = {"inputs": "Once upon a time", "stream": True, "parameters": {"max_new_tokens": 3}}
        with httpx2.stream("POST", f"{server.url}/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data:"))
        return time.perf_counter() - started, server.seconds


if __name__ == "__main__":
    typer.run(main)
