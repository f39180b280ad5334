"""`aft batch in.jsonl out.jsonl`: a text for every line of a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from server.api.batch import Target, answer_all, name_of, read, write
from server.assemble import assemble
from server.config import server_config
from server.options import options_of

MODEL_OPTIONS = (
    *("model", "served_model_name", "device", "threads", "quantize", "max_model_len", "max_num_seqs", "state_memory"),
    *("chunk_size", "prefix_cache", "batch_invariant", "max_grammar_length", "grammar_timeout"),
)
# Of a server, which others share. A file is one's own, and as large as it is.
UNLIMITED: dict[str, Any] = {"max_queue_length": 2**30, "max_body_size": 2**20}


@options_of(server_config, only=MODEL_OPTIONS)
def batch(
    source: Annotated[
        Path, typer.Argument(help="JSONL file of requests: bodies of /generate, or OpenAI's batch lines.")
    ],
    target: Annotated[Path, typer.Argument(help="JSONL file of answers; those already there are not made again.")],
    **options: Any,
) -> None:
    """Generate for every line of a file, in batches. The status is 1 if a line failed; the next run tries it again."""
    config = server_config(store=None, api_keys=None, **UNLIMITED, **options)
    lines, out = read(source), Target(target, source)
    to_do = [line for line in lines if name_of(line.line_id) not in out.done]
    app = assemble(config, log_level="WARNING")
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    with out.open({name_of(line.line_id) for line in to_do}) as file:
        try:
            with Progress(console=console) as progress:
                task = progress.add_task("generating", total=len(to_do))

                def take(is_text: bool, answer: dict[str, Any]) -> None:
                    write(file, answer)
                    counts["written" if is_text else "failed"] += 1
                    progress.advance(task)

                answer_all(app, to_do, take)
        finally:
            told = f"{counts['written']} written, {counts['failed']} failed"
            more = "; the same command goes on" if counts.total() < len(to_do) else ""
            console.print(f"{told}, see {target}{more}", highlight=False, markup=False, soft_wrap=True)
    if counts["failed"]:
        raise typer.Exit(1)
