"""`aft generate`: a text on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from server.config import ServerConfig
from server.engine import LLM, EngineConfig, SamplingParams
from server.options import options_of
from server.threads import use_threads


@options_of(ServerConfig)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the text goes on from.")] = "",
    *,
    model: Path,
    device: str,
    threads: int | None,
    quantize: str | None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely tokens.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the fewest likely tokens whose probabilities reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Write a text on the terminal, without a server."""
    use_threads(threads)
    llm = LLM(model, EngineConfig(max_num_seqs=1, quantize=quantize), device=device)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sys.stdout.write(prompt)
    for token in llm.tokens(prompt, params):
        if not token.special:
            sys.stdout.write(token.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
