"""What sessions cost, by a real server.

python -m benchmarks.sessions turns     200 turns: time and bytes of the last against the first, and one long request
python -m benchmarks.sessions forks     64 branches from a context of 16,000 tokens, beside a key-value cache's bytes
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import torch
import typer

from benchmarks.servers import AFT, serving
from model import load_checkpoint
from server import BUNDLED_MODEL
from server.engine import EngineConfig, LLMEngine, Request, SamplingParams

app = typer.Typer(help=__doc__, no_args_is_help=True)
TOKENS_PER_TURN = 16


class Client:
    """Turns of token ids, so that a conversation can be compared with one request over the same tokens."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=60)

    def session(self) -> str:
        return str(self.http.post("/sessions").json()["session_id"])

    def turn(self, prompt: list[int], session_id: str | None = None, max_tokens: int = TOKENS_PER_TURN) -> list[int]:
        body: dict[str, Any] = {
            "model": BUNDLED_MODEL.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if session_id:
            body["session_id"] = session_id
        answer = self.http.post("/v1/completions", json=body).raise_for_status().json()
        return list(answer["choices"][0]["token_ids"])

    def exported(self, session_id: str) -> bytes:
        return self.http.get(f"/sessions/{session_id}/export").raise_for_status().content


def inputs(turn: int) -> list[int]:
    """Ordinary token ids, others in each turn."""
    return [300 + (7 * turn + 3 * i) % 1000 for i in range(TOKENS_PER_TURN)]


@app.command()
def turns(n_turns: int = 200) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving([*AFT, "--max-num-seqs", "4", "--store", Path(folder) / "store.sqlite"]) as server,
    ):
        client = Client(server.url)
        for _ in range(5):  # whatever is done once
            client.turn(inputs(0), client.session())
        session_id, said, seconds, sizes = client.session(), list[int](), list[float](), list[int]()
        for turn in range(n_turns):
            started = time.perf_counter()
            reply = client.turn(inputs(turn), session_id)
            seconds.append(time.perf_counter() - started)
            sizes.append(len(client.exported(session_id)))
            last_prompt, said = [*said, *inputs(turn)], [*said, *inputs(turn), *reply]
        alone = client.turn(last_prompt)
    n = n_turns // 10
    first, last = statistics.median(seconds[:n]), statistics.median(seconds[-n:])
    print(
        f"{n_turns} turns, {len(said):,} tokens: a turn takes {1e3 * first:.2f} ms at first, {1e3 * last:.2f} at last"
    )
    print(f"time of the last {n} turns / of the first {n}: {last / first:.3f}; bytes {sizes[-1] / sizes[0]:.4f}")
    print(f"the last reply is that of one request over the same {len(last_prompt):,} tokens: {reply == alone}")


@app.command()
def forks(n_forks: int = 64, n_tokens: int = 16_000, rounds: int = 10) -> None:
    model, tokenizer = load_checkpoint(BUNDLED_MODEL)
    engine = LLMEngine(model, tokenizer, EngineConfig(max_num_seqs=n_forks))
    prompt = [300 + 7 * i % 1000 for i in range(n_tokens)]
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add_request(Request("", prompt, params, keep_conversation=True))
    while engine.has_work:
        outputs = engine.step()
    (conversation,) = [output.conversation for output in outputs if output.conversation]
    state = conversation.snapshot.state
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(n_forks):
            engine.pool.append(state)
        seconds.append((time.perf_counter() - started) / n_forks)
        for row in reversed(range(n_forks)):
            engine.pool.remove(row)
    config = model.config
    cache = 2 * 2 * config.n_layer * config.d_model * n_tokens
    print(f"in the engine: {1e6 * statistics.median(seconds):.0f} us and {state.nbytes:,} bytes for each branch")
    print(f"a key-value cache of this shape has {cache:,} bytes in 16 bits, {cache / state.nbytes:.0f} times as many")
    with torch.inference_mode(), serving([*AFT, "--max-num-seqs", "4"]) as server:
        client = Client(server.url)
        session_id = client.session()
        client.turn(prompt, session_id)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            client.http.post(f"/sessions/{session_id}/fork", json={"n": n_forks}).raise_for_status()
            seconds.append((time.perf_counter() - started) / n_forks)
    print(f"over HTTP, each stored as a session: {1e6 * statistics.median(seconds):.0f} us for each branch")


if __name__ == "__main__":
    app()
