"""`aft generate`: a text on the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from model.sampling import SamplingParams
from server.assemble import load_llm
from server.config import ServerConfig
from server.errors import ConfigurationError
from server.options import make, options_of


@options_of(ServerConfig, only=("model", "device", "threads", "quantize"))
def generate(
    prompt: Annotated[str, typer.Argument(help="What the text goes on from.")] = "",
    *,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely tokens.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the fewest likely tokens whose probabilities reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    **options: Any,
) -> None:
    """Write a text on the terminal, without a server."""
    if sys.stdout is None:
        raise ConfigurationError("Standard output is closed, so there is nowhere to write a text.")
    llm = load_llm(make(ServerConfig, {**options, "max_num_seqs": 1}))
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sys.stdout.write(prompt)
    for token in llm.tokens(prompt, params):
        if not token.special:
            sys.stdout.write(token.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
