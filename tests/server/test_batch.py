"""`aft batch`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.api.tgi.batch import finished_ids
from server.errors import InvalidRequestError

LINES = [
    json.dumps({"inputs": "the fox", "parameters": {"max_new_tokens": 5}}),
    json.dumps({"id": "mine", "inputs": "a bird", "parameters": {"max_new_tokens": 3, "return_full_text": True}}),
    "",
    json.dumps({"inputs": "the fox", "parameters": {"max_new_tokens": 0}}),
    "{not json",
    "[]",
    json.dumps({"id": "x", "inputs": "the fox", "stream": True}),
    json.dumps({"inputs": "a bird", "parameters": {"max_new_tokens": 4, "seed": 3, "temperature": 0.5}}),
    json.dumps({"id": "y", "inputs": "the fox", "parameters": {"repetition_penalty": 1e31}}),
    "[" * 100_000,
    json.dumps({"id": "s", "inputs": "the fox", "session_id": "0" * 32}),
    json.dumps({"id": "t", "inputs": "the fox", "parameters": {"top_n_tokens": 2}}),
    json.dumps({"id": "u", "inputs": "the fox", "parameters": {"truncate": 2}}),
    json.dumps({"id": "d", "inputs": "the fox", "parameters": {"decoder_input_details": True}}),
    '{"id": "not UTF-8", "inputs": "\udcff"}',
    '{"id": NaN, "inputs": "the fox"}',
    '{"id": 1e999, "inputs": "the fox"}',
    json.dumps({"id": "half a character", "inputs": "\ud800"}),
]


def run(checkpoint: Path, *files: Path) -> None:
    command = [sys.executable, "-m", "server", "batch", *map(str, files), "--model", str(checkpoint)]
    subprocess.run(command, check=True, timeout=300)


def read(path: Path) -> dict[Any, dict[str, Any]]:
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({json.dumps(answer["id"]) for answer in answers}) == len(answers)
    return {answer["id"]: answer for answer in answers}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    path.write_bytes("\n".join(LINES).encode(errors="surrogateescape"))
    return path


@pytest.fixture(scope="module")
def target(checkpoint: Path, source: Path) -> Path:
    path = source.with_name("out.jsonl")
    run(checkpoint, source, path)
    return path


def test_every_line_is_answered(target: Path) -> None:
    answers = read(target)
    assert set(answers) == {0, "mine", 3, 4, 5, "x", 7, "y", 9, *"stud", 14, 15, 16, "half a character"}
    assert answers[0]["details"]["generated_tokens"] == 5
    assert answers[0]["details"]["seed"] is None
    assert answers["mine"]["generated_text"].startswith("a bird")
    assert answers[7]["details"]["seed"] == 3
    assert answers[3]["error"].startswith("parameters.max_new_tokens: Input should be greater than or equal to 1")
    assert answers[4]["error"].startswith("The line is not JSON")
    assert answers[5]["error"].startswith("The body: Input should be a valid dictionary")
    assert answers["y"]["error"].startswith("repetition_penalty must be above 0")
    assert answers[9]["error"].startswith("The line is not JSON")
    assert answers[14]["error"].startswith("The line is not JSON: 'utf-8' codec can't decode byte 0xff")
    assert answers[15]["error"] == "The line is not JSON: NaN is not finite."
    assert answers[16]["error"] == "The line is not JSON: 1e999 is not finite."
    refused = {"x": "stream", "s": "session_id", "t": "top_n_tokens", "u": "truncate", "d": "decoder_input_details"}
    for item_id, field in refused.items():
        assert answers[item_id]["error"] == f"{field} has no meaning in a batch file; leave it out."


ANSWER = b'{"id": 0, "generated_text": "the fox"}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"a story\nof two lines, the second without an end",
        b"one line without an end",
        b'{"inputs": "the fox"}',
        b'{"id": 3, "inputs": "the fox"}\n',
        b'{"id": 3, "inputs": "the fox"}',
        b'{"generated_text": "the fox"}\n',
        b"[]\n",
        b"\n",
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        ANSWER + b"more",
        ANSWER + b'{"inputs": "the fox"}\n{"id"',
    ],
)
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="must hold answers and nothing else"):
        finished_ids(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"{",
        b'{"id": ',
        b'{"id": "mi',
        ANSWER[:-1],
        b'{"id": 1, "generated_text": "", "details": {}',
        b'{"id": 1, "error": "wh',
    ],
)
def test_the_beginning_of_an_answer_is_cut_off(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ANSWER + rest)
    assert finished_ids(path) == {"0"}
    assert path.read_bytes() == ANSWER


def test_a_stopped_run_goes_on(checkpoint: Path, source: Path, target: Path, tmp_path: Path) -> None:
    """Lines that are there stay as they are, a half line is done again, the others are added."""
    whole = target.read_text().splitlines(keepends=True)
    marked = json.dumps({"id": 0, "generated_text": "done before"}) + "\n"
    partial = tmp_path / "out.jsonl"
    partial.write_text(marked + next(line for line in whole if '"mine"' in line)[:-9])
    run(checkpoint, source, partial)
    answers = read(partial)
    assert partial.read_text().startswith(marked)
    assert answers == {**read(target), 0: json.loads(marked)}
