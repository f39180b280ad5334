"""`python -m server`: serve a checkpoint over HTTP."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from model.checkpoint import load_checkpoint
from model.errors import ModelError
from server.api.app import create_app
from server.engine import LLMEngine

BUNDLED_MODEL = Path(__file__).parent.parent / "weights" / "aft-conv-stories"


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that share a decoding step.")] = 32,
    max_queue_length: Annotated[int, typer.Option(min=1, help="Requests that may wait; beyond it, 429.")] = 256,
) -> None:
    """Serve a checkpoint: POST /generate, GET /health."""
    network, tokenizer = load_checkpoint(model, device)
    engine = LLMEngine(network, tokenizer, max_num_seqs=max_num_seqs, max_queue_length=max_queue_length)
    # uvicorn drains on SIGTERM, then raises the signal again; an orderly end is exit status 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(create_app(engine, tokenizer), host=host, port=port)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ModelError as error:
        raise SystemExit(f"error: {error}") from error
