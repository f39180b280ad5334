"""What the engine costs, as ratios measured in one run.

python -m benchmarks.engine throughput      engine against the bare model step, at a full batch
python -m benchmarks.engine prefix          first token after a cached prompt of 16,000 tokens against one of 1
python -m benchmarks.engine stall           longest gap between tokens while a prompt of 50,000 tokens is read
python -m benchmarks.engine invariance      price of batch_invariant, and what is bitwise equal without it
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from model import AFTConfig, AFTForCausalLM, LanguageModel, State, Tokenizer, load_checkpoint
from model.backends.choose import make_runner
from server import BUNDLED_MODEL
from server.engine import EngineConfig, LLMEngine, Request, SamplingParams

BATCH = 32
ENDLESS = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)

app = typer.Typer(help=__doc__, no_args_is_help=True)
Large = Annotated[bool, typer.Option("--large", help="A model of 110 M parameters with random weights instead.")]


class ByteTokenizer(Tokenizer):
    """Stands in for a vocabulary of any size: token i is the byte i modulo 256. For measuring only."""

    def __init__(self, vocab_size: int) -> None:
        self.end_of_text_id = 1
        self.token_bytes = [bytes([i % 256]) for i in range(vocab_size)]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def load(large: bool) -> tuple[LanguageModel, Tokenizer]:
    if not large:
        return load_checkpoint(BUNDLED_MODEL)
    torch.manual_seed(0)
    config = AFTConfig(variant="conv", vocab_size=32_000, d_model=768, n_layer=12, n_head=12, window=32)
    return AFTForCausalLM(config).eval().requires_grad_(False), ByteTokenizer(32_000)


def prompt(n_tokens: int, first: int = 0) -> list[int]:
    """Ordinary token ids; another `first` gives another prompt."""
    return [300 + (first + 7 * i) % 1000 for i in range(n_tokens)]


@app.command()
def throughput(large: Large = False, steps: int = 100, rounds: int = 5) -> None:
    """Decoded tokens per second at batch 32: engine and bare step in turns."""
    model, tokenizer = load(large)
    engine = LLMEngine(model, tokenizer, EngineConfig(max_num_seqs=BATCH, prefix_cache_bytes=0))
    for i in range(BATCH):
        engine.add_request(Request(f"{i}", prompt(16, first=i), ENDLESS))
    while engine.num_running < BATCH:
        engine.step()
    bare = BareStep(model)
    ratios, speeds = [], []
    for _ in range(rounds):
        bare_seconds = seconds(bare.step, steps)
        engine_seconds = seconds(engine.step, steps)
        ratios.append(bare_seconds / engine_seconds)
        speeds.append(BATCH * steps / engine_seconds)
    print(f"engine {statistics.median(speeds):,.0f} tokens/s; engine / bare step {describe(ratios)}")


class BareStep:
    """The model alone: a batch of states, one token each."""

    def __init__(self, model: LanguageModel, batch_size: int = BATCH) -> None:
        prompts = torch.tensor([prompt(16, first=i) for i in range(batch_size)])
        with torch.inference_mode():
            _, state = model.prefill(prompts)
        self.runner = make_runner(model, State.concatenate([state]), 256)
        self.token_ids = prompts[:, -1].tolist()

    @torch.inference_mode()
    def step(self) -> None:
        self.runner.step_(self.token_ids)


@app.command()
def prefix(n_tokens: int = 16_000, rounds: int = 20) -> None:
    """Time to first token: a cached prompt against a prompt of one token."""
    model, tokenizer = load(False)
    engine = LLMEngine(model, tokenizer)
    once = SamplingParams(temperature=0, max_tokens=1)

    def first_token(ids: list[int]) -> float:
        request = Request("", ids, once)

        def run() -> None:
            engine.add_request(request)
            finish(engine)

        return seconds(run, 1)

    cold = first_token(prompt(n_tokens))
    hits, ones = [], []
    for i in range(rounds):
        hits.append(first_token(prompt(n_tokens)))
        ones.append(first_token([300 + i]))  # a new token each time, or it would be a hit itself
    extended = [first_token([*prompt(n_tokens), 300 + i]) for i in range(rounds)]
    one = statistics.median(ones)
    print(f"cold {1e3 * cold:.0f} ms; one token {1e3 * one:.2f} ms")
    print(f"hit / one token {statistics.median(hits) / one:.2f} ({1e3 * statistics.median(hits):.2f} ms)")
    print(f"hit and one more token / one token {statistics.median(extended) / one:.2f}")


@app.command()
def stall(n_tokens: int = 50_000, n_streams: int = 8) -> None:
    """Gaps between the tokens of other streams, with and without a long prompt being read."""
    model, tokenizer = load(False)
    engine = LLMEngine(model, tokenizer)
    for i in range(n_streams):
        engine.add_request(Request(f"{i}", prompt(16, first=i), ENDLESS))
    for _ in range(20):
        engine.step()
    before = [seconds(engine.step, 1) for _ in range(200)]
    long = Request("long", prompt(n_tokens), SamplingParams(temperature=0, max_tokens=1))
    engine.add_request(long)
    during: list[float] = []
    while not during or engine.scheduler.num_reading:
        during.append(seconds(engine.step, 1))
    print(f"without: median {1e3 * statistics.median(before):.1f} ms, longest {1e3 * max(before):.1f} ms")
    print(
        f"while {n_tokens:,} tokens are read in {sum(during):.1f} s: median {1e3 * statistics.median(during):.1f} ms, "
    )
    print(f"longest {1e3 * max(during):.1f} ms between the tokens of {n_streams} other streams")


@app.command()
def invariance(large: Large = False, steps: int = 50) -> None:
    """Time of a step with batch_invariant against one without, and how much is bitwise equal without it."""
    model, tokenizer = load(large)
    for n_running in (1, 8, 32):
        times = {}
        for invariant in (False, True):
            config = EngineConfig(max_num_seqs=BATCH, batch_invariant=invariant, prefix_cache_bytes=0)
            engine = LLMEngine(model, tokenizer, config)
            for i in range(n_running):
                engine.add_request(Request(f"{i}", prompt(16, first=i), ENDLESS))
            while engine.num_running < n_running:
                engine.step()
            times[invariant] = statistics.median(seconds(engine.step, steps // 5) for _ in range(5))
        print(f"{n_running:2} running: batch_invariant / default {times[True] / times[False]:.2f} times as long a step")
    for invariant in (False, True):
        alone, together = (logprobs(model, tokenizer, n, invariant) for n in (1, BATCH))
        equal = sum(a == b for a, b in zip(alone, together, strict=True))
        print(
            f"batch_invariant={invariant}: {equal} of {len(alone)} log-probabilities bitwise equal alone and in {BATCH}"
        )


def logprobs(model: LanguageModel, tokenizer: Tokenizer, batch_size: int, invariant: bool) -> list[float]:
    """Of 100 tokens of request 0 in a batch."""
    engine = LLMEngine(model, tokenizer, EngineConfig(max_num_seqs=BATCH, batch_invariant=invariant))
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for i in range(batch_size):
        engine.add_request(Request(f"{i}", prompt(16 + i, first=i), params))
    found = []
    while engine.has_work:
        found += [o.token.logprob for o in engine.step() if o.request_id == "0" and o.token]
    return found


def finish(engine: LLMEngine) -> None:
    while engine.has_work:
        engine.step()


def seconds(function: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        function()
    return time.perf_counter() - start


def describe(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds)"


if __name__ == "__main__":
    app()
