"""Servers as processes of this machine, `aft serve` or llama.cpp's, and what clients see of them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
import torch
from sentencepiece import sentencepiece_model_pb2

from benchmarks.engine import prompt
from benchmarks.ports import free_port
from model import SentencePieceTokenizer, save_checkpoint
from model.config import ModelConfig
from model.families import family_of
from server import BUNDLED_MODEL
from server.commands.bench import run, run_fast

AFT = (sys.executable, "-m", "server", "serve")


@dataclass(frozen=True)
class Serving:
    """seconds: from the command until the server was ready."""

    url: str
    process: subprocess.Popen[bytes]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process has held so far."""
        (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(kib) * 1024


@contextmanager
def serving(
    command: Sequence[str | Path],
    *,
    ready: str = "/ready",
    environment: Mapping[str, str] | None = None,
    log: IO[bytes] | int = subprocess.DEVNULL,
) -> Iterator[Serving]:
    """A server, once it is ready. `--port` is added to its command; `log` gets what it writes to its standard error."""
    port = free_port()
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    environment = {**os.environ, **(environment or {})}
    outputs = {"stdout": subprocess.DEVNULL, "stderr": log}
    with subprocess.Popen([*command, "--port", f"{port}"], env=environment, **outputs) as process:  # type: ignore[call-overload]
        try:
            while not _answers(url + ready):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
                time.sleep(0.005)
            yield Serving(url, process, time.perf_counter() - started)
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return bool(httpx2.get(url).status_code == 200)
    except httpx2.TransportError:
        return False


def measure(server: Serving, contexts: Sequence[int], batch_sizes: Sequence[int], **options: Any) -> dict[str, Any]:
    """Seconds to the first token of prompts that no one has sent before, tokens per second for clients that stream,
    with prompts of 128 tokens of which reading is a part, and the most memory that the server held.
    """

    numbers = itertools.count()  # a prompt that began like another would be read already

    def seconds(n_clients: int, n_prompt: int, max_tokens: int) -> tuple[float, float]:
        """To the first token of the first client, and in all."""
        fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}
        bodies = [{"prompt": prompt(n_prompt, first=next(numbers)), **fields} for _ in range(n_clients)]
        started = time.perf_counter()
        timings = run_fast(run(server.url, bodies, n_clients, path="/v1/completions"))
        return timings[0].time_to_first_token, time.perf_counter() - started

    seconds(1, 16, 8)
    first_token = {f"{n}": min(seconds(1, n, 4)[0] for _ in range(3)) for n in contexts}
    speeds = {f"{n}": n * 128 / seconds(n, 128, 128)[1] for n in batch_sizes}
    return {"first_token": first_token, "decode": speeds, "startup": server.seconds, "peak_bytes": server.peak_bytes}


def write_checkpoint(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of random weights; its tokenizer is the bundled one, with pieces without a meaning added."""
    proto = (BUNDLED_MODEL / SentencePieceTokenizer.file_name).read_bytes()
    pieces = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    for i in range(len(pieces.pieces), config.vocab_size):
        pieces.pieces.add(piece=f"t{i}", score=-1e3)
    torch.manual_seed(0)
    save_checkpoint(folder, family_of(config)(config), SentencePieceTokenizer(pieces.SerializeToString()))
    return folder
