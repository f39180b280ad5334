"""`aft batch in.jsonl out.jsonl`: a text for every line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from server.api.tgi.batch import answers, finished_ids, read, write
from server.assemble import load_llm
from server.config import ServerConfig
from server.options import make, options_of


@options_of(ServerConfig, only=("model", "device", "threads", "max_num_seqs", "quantize"))
def batch(
    source: Annotated[Path, typer.Argument(help="JSONL file of requests.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of answers; lines already there are not done again.")],
    **options: Any,
) -> None:
    """Generate for every line of a file, in batches."""
    config = make(ServerConfig, options)
    items, refused = read(source, finished_ids(target))
    with target.open("a", encoding="utf-8") as out:
        for answer in refused:
            write(out, answer)
        llm = load_llm(config)
        console = Console(stderr=True)
        for answer in track(answers(llm, items), "generating", total=len(items), console=console):
            write(out, answer)
