"""`aft`, the command."""

from __future__ import annotations

import torch
import typer

from model.errors import ModelError
from server.commands.batch import batch
from server.commands.bench import bench
from server.commands.convert import convert
from server.commands.generate import generate
from server.commands.serve import serve
from server.commands.train import train
from server.errors import ServerError
from server.options import BY_ENVIRONMENT

app = typer.Typer(
    name="aft",
    help="Text generation with Attention Free Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, generate, convert, train, bench, batch):
    app.command(context_settings=BY_ENVIRONMENT)(command)


NO_MEMORY = (
    "There is not enough memory. A server's depends on the model, --max-num-seqs, --state-memory and --prefix-cache, a "
    "training's on the model, --batch-size and --context."
)


def main() -> None:
    """What goes wrong in a way that somebody thought of is a sentence, and status 1."""
    try:
        app()
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise SystemExit(f"error: {sentence}") from error


def sentence_of(error: Exception) -> str | None:
    """None for a mistake of ours."""
    if isinstance(error, ModelError | ServerError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        character = error.object[error.start]
        return f"Standard output is in {error.encoding}, which has no {character!a}; PYTHONIOENCODING=utf-8 helps."
    # PyTorch has its own class for GPUs only.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return NO_MEMORY
    return None
