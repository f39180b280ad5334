"""`aft batch in.jsonl out.jsonl`: generate for every line of a file.

An input line is a body of POST /generate, `{"inputs": text, "parameters": {...}}`, with "id" if you like. An output
line is `{"id": ..., "generated_text": ..., "details": {...}}` or `{"id": ..., "error": sentence}`; a line without an
id is known by its number, from 0. Lines are written as they are done. A run that was stopped goes on when the same
command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from model.errors import ModelError
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from server import BUNDLED_MODEL
from server.api.tgi.protocol import parse_generate_request
from server.api.tgi.serving import details, sampling_params
from server.engine import EngineConfig
from server.engine.llm import LLM, Result
from server.errors import InvalidRequestError

Item = tuple[Any, str, SamplingParams, str]  # id, prompt, parameters, text to put before the answer


def main(
    source: Annotated[Path, typer.Argument(help="JSONL file of requests.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of answers; lines already there are not done again.")],
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded at a time.")] = 32,
) -> None:
    """Generate for every line of a file, in batches."""
    done = finished_ids(target)
    with target.open("a", encoding="utf-8") as out:
        items: list[Item] = []
        for item_id, fields in requests(source):
            if json.dumps(item_id) in done:
                continue
            try:
                items.append(parse(item_id, fields))
            except (InvalidRequestError, ModelError) as error:
                write(out, {"id": item_id, "error": str(error)})
        llm = LLM(model, EngineConfig(max_num_seqs=max_num_seqs), device=device)
        results = llm.stream([prompt for _, prompt, _, _ in items], [params for _, _, params, _ in items])
        for i, result in track(results, "generating", total=len(items), console=Console(stderr=True)):
            item_id, _, params, prefix = items[i]
            write(out, {"id": item_id, **answer(result, params, prefix, llm.tokenizer)})


def requests(source: Path) -> Iterator[tuple[Any, object]]:
    """(id, JSON value) of every line that is not empty; the value is an InvalidRequestError if it is not JSON."""
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                fields = InvalidRequestError(f"The line is not JSON: {error}.")
            yield fields.pop("id", number) if isinstance(fields, dict) else number, fields


def parse(item_id: Any, fields: object) -> Item:
    """Raises InvalidRequestError for what is not a request, SamplingError for parameters out of range."""
    if isinstance(fields, InvalidRequestError):
        raise fields
    body = parse_generate_request(fields)
    if body.stream or body.given.truncate is not None:
        raise InvalidRequestError("stream and truncate have no meaning in a batch file; leave them out.")
    return item_id, body.inputs, sampling_params(body.given), body.prefix


def answer(result: Result, params: SamplingParams, prefix: str, tokenizer: Tokenizer) -> dict[str, Any]:
    if result.error is not None:
        return {"error": str(result.error)}
    (completion,) = result.completions
    told = details(completion, params, result.num_cached_tokens, tokenizer)
    kept = {"finish_reason", "generated_tokens", "seed", "cached_tokens"}
    return {"generated_text": prefix + completion.text, "details": told.model_dump(include=kept)}


def finished_ids(target: Path) -> set[str]:
    """Ids, as JSON, of the lines in `target`. Cuts off a last line that a stopped run left incomplete."""
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        target.write_bytes(whole)
    return {json.dumps(json.loads(line)["id"]) for line in whole.splitlines()}


def write(out: Any, fields: dict[str, Any]) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()
