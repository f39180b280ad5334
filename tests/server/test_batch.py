"""`aft batch`, as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server.api.batch import Target, read
from server.commands.main import main
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
    json.dumps({"id": "u", "inputs": "the fox", "parameters": {"truncate": 2, "max_new_tokens": 2}}),
    json.dumps({"id": "d", "inputs": "the fox", "parameters": {"decoder_input_details": True}}),
    '{"id": "not UTF-8", "inputs": "\udcff"}',
    '{"id": NaN, "inputs": "the fox"}',
    '{"id": 1e999, "inputs": "the fox"}',
    json.dumps({"id": "half a character", "inputs": "\ud800"}),
]


def aft(checkpoint: Path, *files: Path | str) -> tuple[int, str]:
    """Status, and the last line on standard error, of `aft batch`, run in this process."""
    arguments = ["aft", "batch", *map(str, files), "--model", str(checkpoint)]
    told = io.StringIO()
    with contextlib.ExitStack() as stack, contextlib.redirect_stderr(told):
        # All tests share these.
        for name in ("server.assemble.configure_logging", "sys.setswitchinterval", "torch.set_num_threads"):
            stack.enter_context(mock.patch(name))
        stack.enter_context(mock.patch("sys.argv", arguments))
        ended = stack.enter_context(pytest.raises(SystemExit))
        main()
    code = ended.value.code
    if isinstance(code, str):  # the interpreter's way
        return 1, code
    return int(code or 0), told.getvalue().splitlines()[-1]


def by_id(path: Path) -> dict[Any, dict[str, Any]]:
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({json.dumps(answer["id"]) for answer in answers}) == len(answers)
    return {answer["id"]: answer for answer in answers}


def openai(custom_id: object, url: str, body: object, **more: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    path.write_bytes("\n".join(LINES).encode(errors="surrogateescape"))
    return path


@pytest.fixture(scope="module")
def target(checkpoint: Path, source: Path) -> Path:
    path = source.with_name("out.jsonl")
    assert aft(checkpoint, source, path) == (1, f"4 written, 13 failed, see {path}")
    return path


def test_every_line_is_answered(target: Path) -> None:
    answers = by_id(target)
    assert set(answers) == {0, "mine", 3, 4, 5, "x", 7, "y", 9, *"stud", 14, 15, 16, "half a character"}
    assert answers[0]["details"]["generated_tokens"] == 5
    assert answers[0]["details"]["seed"] is None
    assert answers["mine"]["generated_text"].startswith("a bird")
    assert answers[7]["details"]["seed"] == 3
    assert answers["u"]["details"]["generated_tokens"] == 2
    assert answers[3]["error"].startswith("parameters.max_new_tokens: Input should be greater than or equal to 1")
    assert answers[4]["error"].startswith("The line is not JSON")
    assert answers[5]["error"].startswith("The body: Input should be a valid dictionary")
    assert answers["y"]["error"].startswith("repetition_penalty must be above 0")
    assert answers[9]["error"].startswith("The line is not JSON")
    assert answers[14]["error"].startswith("The line is not JSON: 'utf-8' codec can't decode byte 0xff")
    assert answers[15]["error"] == "The line is not JSON: NaN is not finite."
    assert answers[16]["error"] == "The line is not JSON: 1e999 is not finite."
    refused = {"x": "stream", "s": "session_id", "t": "top_n_tokens", "d": "decoder_input_details"}
    for item_id, field in refused.items():
        assert answers[item_id]["error"] == f"{field} has no meaning in a batch file; leave it out."


ANSWER = b'{"id": 0, "generated_text": "the fox"}\n'
THEIRS = (
    b'{"id": "batch_req_1", "custom_id": "c", "response": {"status_code": 200, "request_id": "1", "body": {}}, '
    b'"error": null}\n'
)
FAILED = [
    b'{"id": 1, "error": "no"}\n',
    b'{"id": "batch_req_2", "custom_id": 1, "response": {"status_code": 400, "body": {}}, "error": null}\n',
    b'{"id": "batch_req", "custom_id": 1, "response": null, "error": {"code": "x", "message": "no"}}\n',
]


@pytest.mark.parametrize(
    "content",
    [
        b"a story\nof two lines, the second without an end",
        b"one line without an end",
        b'{"inputs": "the fox"}',
        b'{"id": 3, "inputs": "the fox"}\n',
        b'{"id": 3, "inputs": "the fox"}',
        b'{"id": 3, "inputs": "the f',
        b'{"id": [3',
        b'{"generated_text": "the fox"}\n',
        b'{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n',
        b'{"id": 1, "custom_id": "c"}\n',
        b"[]\n",
        b"\n",
        ANSWER + b"\n",
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        ANSWER + b"more",
        ANSWER + b'{"inputs": "the fox"}\n{"id"',
    ],
)
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    if content == b'{"id": [3':  # which an id might be
        assert Target(path, tmp_path / "in.jsonl").done == set()
    else:
        with pytest.raises(InvalidRequestError, match="must hold answers and nothing else"):
            Target(path, tmp_path / "in.jsonl")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"{",
        b'{"id": ',
        b'{"id": "mi',
        b'{"id": 1',
        b'{"id": "mine", "gen',
        b'{"id": 1, "generated_text": "", "details": {}',
        b'{"id": 1, "error": "wh',
        b'{"id": "batch_req_1", "custom_id": "c", "resp',
    ],
)
def test_the_beginning_of_an_answer_is_cut_off(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ANSWER + THEIRS + rest)
    path.chmod(0o640)
    target = Target(path, tmp_path / "in.jsonl")
    assert target.done == {"0", '"c"'}
    assert path.read_bytes() == ANSWER + THEIRS + rest, "before it is opened"
    target.open(set()).close()
    assert path.read_bytes() == ANSWER + THEIRS
    assert (path.stat().st_mode & 0o777, list(tmp_path.iterdir())) == (0o640, [path])


@pytest.mark.parametrize("last", [ANSWER, THEIRS, *FAILED])
def test_an_answer_that_lacks_its_line_end_only_is_whole(last: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(last[:-1])
    with Target(path, tmp_path / "in.jsonl").open(set()) as out:
        out.write("x\n")
    assert path.read_bytes() == last + b"x\n"


@pytest.mark.parametrize("failed", FAILED)
def test_failures_make_room_for_the_answers_of_lines_that_are_tried_again(failed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ANSWER + failed + THEIRS)
    target = Target(path, tmp_path / "in.jsonl")
    assert target.done == {"0", '"c"'}
    target.open({"5"}).close()
    assert path.read_bytes() == ANSWER + failed + THEIRS, "a line that is no more in the source"
    target.open({"1", "5"}).close()
    assert path.read_bytes() == ANSWER + THEIRS


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"id": "a"}', "", '{"id": "a", "inputs": "x"}'], 'has the id "a" twice, in lines 1 and 3'),
        (["garbage", '{"id": 0, "inputs": "Once"}'], "has the id 0 twice, in lines 1 and 2; a line without an id has"),
        (["{}", "{}", '{"id": "b"}', '{"id": 1}'], "has the id 1 twice, in lines 2 and 4"),
        (['{"id": {"x": 1, "y": 2}}', '{"id": {"y": 2, "x": 1}}'], 'has the id {"x": 1, "y": 2} twice'),
        (['{"custom_id": "c"}', '{"custom_id": "c"}'], 'has the id "c" twice'),
    ],
)
def test_ids_that_come_twice_are_refused(lines: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidRequestError) as error:
        read(tmp_path / "in.jsonl")
    assert sentence in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "inputs": "x"}\r\n\xff\n{"id": "b"}')
    assert [line.line_id for line in read(tmp_path / "in.jsonl")] == ["a", 1, "b"]


def test_the_source_is_no_target(tmp_path: Path) -> None:
    source, link = tmp_path / "in.jsonl", tmp_path / "link.jsonl"
    source.write_text(ANSWER.decode())
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(InvalidRequestError, match="is the source, too"):
            Target(target, source)
    assert source.read_bytes() == ANSWER


def test_a_target_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="must be in a folder that exists"):
        Target(tmp_path / "none" / "out.jsonl", tmp_path / "in.jsonl")


@pytest.mark.parametrize("mistake", ["model", "source", "target"])
def test_nothing_is_made_or_changed_by_a_mistake(mistake: str, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    if mistake == "target":
        target.write_text("my notes")
    model = tmp_path if mistake == "model" else checkpoint
    status, told = aft(model, tmp_path / "none" if mistake == "source" else source, target)
    assert (status, told[:7]) == (1, "error: ")
    assert [path.read_text() for path in tmp_path.iterdir()] == (["my notes"] if mistake == "target" else [])


def test_openai_lines_are_answered_as_openai_does(checkpoint: Path, tmp_path: Path) -> None:
    """What is in "body" is what the server would say; lines that failed are done again once they are mended."""
    source, target, model = tmp_path / "in.jsonl", tmp_path / "out.jsonl", checkpoint.name
    completion = {"model": model, "prompt": "The fox", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "n": 2, "seed": 1}
    lines = [
        openai("text", "/v1/completions", completion),
        openai("chat", "/v1/chat/completions", chat),
        openai("other model", "/v1/completions", {**completion, "model": "gpt"}),
        openai("stream", "/v1/completions", {**completion, "stream": True}),
        openai("route", "/v1/embeddings", {"input": "x"}),
        openai("no", "/v1/completions", completion, method="GET"),
        json.dumps({"url": "/v1/completions", "method": "POST", "body": completion}),
        json.dumps({"id": "own", "inputs": "The fox", "parameters": {"max_new_tokens": 4}}),
    ]
    source.write_text("\n".join(lines))
    assert aft(checkpoint, source, target) == (1, f"3 written, 5 failed, see {target}")
    told = [json.loads(line) for line in target.read_text().splitlines()]
    answers: dict[object, Any] = {answer.get("custom_id", answer["id"]): answer for answer in told}
    for custom_id, kind, n_choices in (("text", "text_completion", 1), ("chat", "chat.completion", 2)):
        answer = answers[custom_id]
        assert answer.keys() == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert (body["object"], len(body["choices"]), body["model"]) == (kind, n_choices, model)
        assert answer["response"]["request_id"] in answer["id"]
    assert answers["text"]["response"]["body"]["choices"][0]["text"] == answers["own"]["generated_text"]
    assert answers["other model"]["response"]["status_code"] == 404
    assert "There is no model 'gpt' here" in answers["other model"]["response"]["body"]["error"]["message"]
    for refused, sentence in (
        ("stream", "stream has no meaning in a batch file; leave it out."),
        ("route", "url: Input should be '/v1/completions' or '/v1/chat/completions', not \"/v1/embeddings\"."),
        ("no", "method: Input should be 'POST', not \"GET\"."),
        (6, "custom_id: Field required"),
    ):
        assert answers[refused]["response"] is None
        assert answers[refused]["error"]["code"] == "invalid_request_error"
        assert answers[refused]["error"]["message"].startswith(sentence)

    source.write_text("\n".join([*lines[:2], openai("stream", "/v1/completions", completion)]))
    assert aft(checkpoint, source, target) == (0, f"1 written, 0 failed, see {target}")
    again = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer for answer in told if answer.get("custom_id") != "stream"] == again[:-1]
    choices = [answer["response"]["body"]["choices"] for answer in (again[-1], answers["text"])]
    assert choices[0] == choices[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's devices")
def test_what_is_no_regular_file_is_written_to_and_not_read(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(LINES[0])
    assert aft(checkpoint, source, "/dev/full") == (1, "error: No space left on device")
    command = [sys.executable, "-m", "server", "batch", str(source), "/dev/stdout", "--model", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    assert json.loads(done.stdout)["details"]["generated_tokens"] == 5


def test_a_stopped_run_goes_on(checkpoint: Path, source: Path, target: Path, tmp_path: Path) -> None:
    """Lines that are there stay as they are, a half line is done again, the others are added."""
    whole = target.read_text().splitlines(keepends=True)
    marked = json.dumps({"id": 0, "generated_text": "done before"}) + "\n"
    partial = tmp_path / "out.jsonl"
    partial.write_text(marked + next(line for line in whole if '"mine"' in line)[:-9])
    assert aft(checkpoint, source, partial) == (1, f"3 written, 13 failed, see {partial}")
    assert partial.read_text().startswith(marked)
    before, answers = by_id(target), by_id(partial)
    for told in (before["mine"], before[7], answers["mine"], answers[7]):
        del told["details"]["cached_tokens"]  # of a prompt that two lines have: whichever came first
    assert answers == {**before, 0: json.loads(marked)}
