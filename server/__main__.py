"""`python -m server`: serve a checkpoint over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from model.checkpoint import load_checkpoint
from model.errors import ModelError
from server import BUNDLED_MODEL
from server.api.app import create_app
from server.draining import DrainingServer
from server.engine import EngineConfig, LLMEngine
from server.errors import ConfigurationError

MIB = 2**20


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded at a time.")] = 32,
    state_memory: Annotated[int, typer.Option(help="MiB for their states; a bound on --max-num-seqs.")] = 1024,
    max_queue_length: Annotated[int, typer.Option(help="Requests that may wait; beyond it, 429.")] = 256,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a prompt read at a time, between tokens of others.")] = 256,
    prefix_cache: Annotated[int, typer.Option(help="MiB of states after prompts that may come again.")] = 256,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds after which a request fails.")] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    batch_invariant: Annotated[bool, typer.Option(help="Bitwise the same text in any batch; slower.")] = False,
) -> None:
    """Serve a checkpoint: POST /generate, GET /health."""
    network, tokenizer = load_checkpoint(model, device)
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        state_memory=state_memory * MIB,
        max_queue_length=max_queue_length,
        chunk_size=chunk_size,
        prefix_cache_bytes=prefix_cache * MIB,
        batch_invariant=batch_invariant,
    )
    engine = LLMEngine(network, tokenizer, config)
    app = create_app(engine, request_timeout=request_timeout)
    DrainingServer(uvicorn.Config(app, host=host, port=port), app.state.engine, drain_timeout).run()


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ModelError, ConfigurationError) as error:
        raise SystemExit(f"error: {error}") from error
