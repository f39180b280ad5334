"""`aft convert`: a checkpoint of a model of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.convert import convert as convert_model


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="RWKV-4, say: a folder of Hugging Face's layout, or a .pth file."),
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or rwkv_vocab_v20230424.txt, if it is not beside the model.")
    ] = None,
) -> None:
    """Make a checkpoint of a model of others. Nothing in its files is executed."""
    model = convert_model(source, out, tokenizer)
    typer.echo(f"{model.num_parameters:,} parameters, {model.config.dtype}, in {out}")
