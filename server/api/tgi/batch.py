"""Requests of text-generation-inference's contract from a file, without HTTP.

An input line is a body of POST /generate, `{"inputs": text, "parameters": {...}}`, with "id" if you like. An output
line is `{"id": ..., "generated_text": ..., "details": {...}}` or `{"id": ..., "error": sentence}`; a line without an
id is known by its number, from 0. Lines are written as they are done. A run that was stopped goes on when the same
command is given again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from model.errors import ModelError
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from server.api.tgi.protocol import parse_generate_request
from server.api.tgi.serving import sampling_params, sequence
from server.engine import LLM
from server.engine.llm import Result
from server.errors import InvalidRequestError

# A line has one text, of which an answer tells the end, and no tokens.
MEANINGFUL = frozenset(
    {
        *("inputs", "parameters"),
        *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p", "seed", "stop", "best_of"),
        *("repetition_penalty", "frequency_penalty", "grammar", "watermark", "return_full_text", "details"),
    }
)
FIRST_BYTES = b'{"id": '  # of every answer


@dataclass(frozen=True)
class Item:
    """A request. prefix: text to put before the answer's."""

    item_id: Any
    prompt: str
    params: SamplingParams
    prefix: str


def read(source: Path, done: Collection[str]) -> tuple[list[Item], list[dict[str, Any]]]:
    """The requests of the lines whose ids, as JSON, are not in `done`, and an answer to each that is none."""
    items: list[Item] = []
    refused: list[dict[str, Any]] = []
    for item_id, fields in _lines(source):
        if json.dumps(item_id) in done:
            continue
        try:
            items.append(_parse(item_id, fields))
        except (InvalidRequestError, ModelError) as error:
            refused.append({"id": item_id, "error": str(error)})
    return items, refused


def answers(llm: LLM, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """An answer to each as it is done."""
    for i, result in llm.stream([item.prompt for item in items], [item.params for item in items]):
        yield {"id": items[i].item_id, **_answer(result, items[i], llm.tokenizer)}


def finished_ids(target: Path) -> set[str]:
    """Ids, as JSON, of the lines in `target`. Cuts off a last line that a stopped run left incomplete.

    Raises InvalidRequestError, and leaves it as it is, for a file of anything else.
    """
    if not target.exists():
        return set()
    content = target.read_bytes()
    end = content.rfind(b"\n") + 1
    done: set[str] = set()
    for number, line in enumerate(content[:end].splitlines(), 1):
        answer = _parsed(line)
        if not _is_answer(answer):
            raise InvalidRequestError(f"{target} must hold answers and nothing else, but its line {number} is none.")
        done.add(json.dumps(answer["id"]))
    if rest := content[end:]:
        whole = _parsed(rest)
        if not rest.startswith(FIRST_BYTES[: len(rest)]) or not (whole is None or _is_answer(whole)):
            raise InvalidRequestError(f"{target} must hold answers and nothing else, but ends with something else.")
        os.truncate(target, end)
    return done


def _parsed(line: bytes) -> Any:
    """None for what is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_answer(value: Any) -> bool:
    return isinstance(value, dict) and "id" in value and bool(value.keys() & {"generated_text", "error"})


def write(out: TextIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def _lines(source: Path) -> Iterator[tuple[Any, object]]:
    """(id, JSON value) of every line that is not empty; the value is an InvalidRequestError if it is not JSON."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode(), parse_float=_finite, parse_constant=_finite)
            except (ValueError, RecursionError) as error:
                fields = InvalidRequestError(f"The line is not JSON: {error}.")
            yield fields.pop("id", number) if isinstance(fields, dict) else number, fields


def _finite(number: str) -> float:
    """Raises ValueError for NaN and infinity, which Python reads and JSON does not have."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not finite")
    return value


def _parse(item_id: Any, fields: object) -> Item:
    """Raises InvalidRequestError for what is not a request, SamplingError for parameters out of range."""
    if isinstance(fields, InvalidRequestError):
        raise fields
    body = parse_generate_request(fields)
    given = {**body.model_dump(exclude_none=True), **(body.given.model_dump(exclude_none=True))}
    if asked := [name for name, value in given.items() if value and name not in MEANINGFUL]:
        raise InvalidRequestError(f"{asked[0]} has no meaning in a batch file; leave it out.")
    return Item(item_id, body.inputs, sampling_params(body.given), body.prefix)


def _answer(result: Result, item: Item, tokenizer: Tokenizer) -> dict[str, Any]:
    if result.error is not None:
        return {"error": str(result.error)}
    (completion,) = result.completions
    told = {**sequence(completion, item.params, tokenizer), "cached_tokens": result.num_cached_tokens}
    kept = ("finish_reason", "generated_tokens", "seed", "cached_tokens")
    return {"generated_text": item.prefix + completion.text, "details": {name: told[name] for name in kept}}
