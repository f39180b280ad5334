"""`aft`, the command."""

from __future__ import annotations

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


def main() -> None:
    try:
        app()
    except (ModelError, ServerError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
