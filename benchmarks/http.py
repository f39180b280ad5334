"""`python -m benchmarks.http`: what the HTTP side costs.

The same requests go through the engine alone and, by as many streaming clients as it has slots, through a server
process. Both have as many threads as the machine has cores, which they share with the clients.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Annotated, Any

import typer

from benchmarks.servers import AFT, serving
from server import BUNDLED_MODEL
from server.commands.bench import run, run_fast
from server.engine import LLM, EngineConfig, SamplingParams

PROMPT = "Once upon a time, in year"


def main(
    clients: Annotated[int, typer.Option(help="Streams at a time, and slots.")] = 32,
    requests: Annotated[int, typer.Option()] = 192,
    max_tokens: Annotated[int, typer.Option()] = 128,
    rounds: Annotated[int, typer.Option(help="Engine and server take turns; the medians count.")] = 3,
) -> None:
    rates: dict[str, list[float]] = {"engine": [], "/generate": [], "/v1/completions": []}
    command = (*AFT, "--max-num-seqs", f"{clients}")
    with serving(command) as server, multiprocessing.get_context("spawn").Pool(1) as pool:
        for _ in range(rounds + 1):
            for path, found in rates.items():
                if path == "engine":
                    found.append(pool.apply(engine_rate, (clients, requests, max_tokens)))
                else:
                    found.append(http_rate(server.url, path, clients, requests, max_tokens))
    rates = {name: found[1:] for name, found in rates.items()}  # the first round warms up
    engine = sorted(rates["engine"])[rounds // 2]
    for name, found in rates.items():
        median = sorted(found)[rounds // 2]
        print(f"{name:16} {median:7,.0f} tokens/s, {median / engine:.2f} of the engine")


def engine_rate(n_slots: int, requests: int, max_tokens: int) -> float:
    """Tokens per second of the engine alone."""
    llm = LLM(BUNDLED_MODEL, EngineConfig(max_num_seqs=n_slots))
    params = [SamplingParams(max_tokens=max_tokens, seed=i) for i in range(requests)]
    started = time.perf_counter()
    results = llm.generate([f"{PROMPT} {i}" for i in range(requests)], params)
    return sum(len(result.completions[0].tokens) for result in results) / (time.perf_counter() - started)


def http_rate(url: str, path: str, clients: int, requests: int, max_tokens: int) -> float:
    """Tokens per second that streaming clients get; each event is a token but for the one that ends a stream."""
    started = time.perf_counter()
    timings = run_fast(run(url, [body(path, i, max_tokens) for i in range(requests)], clients, path=path))
    seconds = time.perf_counter() - started
    n_ends = 1 if path == "/v1/completions" else 0  # [DONE]
    return sum(len(timing.arrivals) - n_ends for timing in timings) / seconds


def body(path: str, i: int, max_tokens: int) -> dict[str, Any]:
    if path == "/generate":
        return {"inputs": f"{PROMPT} {i}", "parameters": {"max_new_tokens": max_tokens, "do_sample": True, "seed": i}}
    return {"prompt": f"{PROMPT} {i}", "max_tokens": max_tokens, "seed": i}


if __name__ == "__main__":
    typer.run(main)
