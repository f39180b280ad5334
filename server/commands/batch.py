"""`aft batch in.jsonl out.jsonl`: a text for every line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from server.api.tgi.batch import answers, finished_ids, read, write
from server.config import ServerConfig
from server.engine import LLM, EngineConfig
from server.options import options_of
from server.threads import use_threads


@options_of(ServerConfig)
def batch(
    source: Annotated[Path, typer.Argument(help="JSONL file of requests.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of answers; lines already there are not done again.")],
    *,
    model: Path,
    device: str,
    threads: int | None,
    quantize: str | None,
    max_num_seqs: int,
) -> None:
    """Generate for every line of a file, in batches."""
    items, refused = read(source, finished_ids(target))
    with target.open("a", encoding="utf-8") as out:
        for answer in refused:
            write(out, answer)
        use_threads(threads)
        llm = LLM(model, EngineConfig(max_num_seqs=max_num_seqs, quantize=quantize), device=device)
        console = Console(stderr=True)
        for answer in track(answers(llm, items), "generating", total=len(items), console=console):
            write(out, answer)
