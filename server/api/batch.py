"""Requests from a file, answered by the application that serves them over HTTP, in this process.

A line of the source is a body of POST /generate, `{"inputs": text, "parameters": {...}}`, with "id" if you like, and
its answer `{"id": ..., "generated_text": ..., "details": {...}}` or `{"id": ..., "error": sentence}`; a line without an
id is known by its number, from 0. Or it is one of OpenAI's batch files, `{"custom_id", "method", "url", "body"}`, and
its answer is, too. Answers are written as they come. A run that was stopped goes on when the same command is given
again, and lines that failed are tried again.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.types import Message

from server.api.openai.errors import INVALID
from server.api.tgi.protocol import parse_generate_request
from server.api.validation import Body, validation_sentence
from server.errors import InvalidRequestError

# An answer tells a text and its end, but no tokens.
MEANINGLESS = ("stream", "session_id", "top_n_tokens", "decoder_input_details")
TOLD_DETAILS = ("finish_reason", "generated_tokens", "seed", "cached_tokens")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Of every answer: what comes before its id, and what may come after.
BEFORE_ID, AFTER_ID = '{"id": ', (', "generated_text": ', ', "error": ', ', "custom_id": ')


class OpenAILine(Body):
    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the application said. body: JSON."""

    status: int
    request_id: str
    body: Any


@dataclass(frozen=True)
class Line:
    """One of the source. number: from 0; fields: its JSON, or the error that it is none."""

    number: int
    fields: object

    @property
    def line_id(self) -> Any:
        """What its answer has as "custom_id" or as "id"."""
        if not isinstance(self.fields, dict):
            return self.number
        return self.fields.get("custom_id" if self.is_openai else "id", self.number)

    @property
    def is_openai(self) -> bool:
        return isinstance(self.fields, dict) and not self.fields.keys().isdisjoint({"custom_id", "url"})

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body. Raises InvalidRequestError."""
        if isinstance(self.fields, InvalidRequestError):
            raise self.fields
        path, body, meaningless = _openai_request(self.fields) if self.is_openai else _own_request(self.fields)
        if meaningless:
            raise InvalidRequestError(f"{meaningless[0]} has no meaning in a batch file; leave it out.")
        return path, body

    def answer(self, given: Answer | InvalidRequestError) -> dict[str, Any]:
        """As it stands in the target."""
        if self.is_openai:
            return _openai_answer(self.line_id, given)
        if isinstance(given, InvalidRequestError):
            return {"id": self.line_id, "error": str(given)}
        if given.status != 200:
            return {"id": self.line_id, "error": given.body["error"]}
        told = {name: given.body["details"][name] for name in TOLD_DETAILS}
        return {"id": self.line_id, "generated_text": given.body["generated_text"], "details": told}


def _own_request(fields: Any) -> tuple[str, dict[str, Any], list[str]]:
    """Path, body, and the names of those of its fields that would have no effect."""
    fields = {name: value for name, value in fields.items() if name != "id"} if isinstance(fields, dict) else fields
    body = parse_generate_request(fields)
    given = body.given.model_dump(exclude_none=True, by_alias=True)
    request = {"inputs": body.inputs, "parameters": {**given, "details": True}}
    return "/generate", request, _meaningless({**body.model_dump(), **given})


def _openai_request(fields: Any) -> tuple[str, dict[str, Any], list[str]]:
    try:
        line = OpenAILine.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequestError(validation_sentence(error.errors())) from error
    return line.url, line.body, _meaningless(line.body, MEANINGLESS[:2])


def _meaningless(given: Mapping[str, Any], names: Sequence[str] = MEANINGLESS) -> list[str]:
    return [name for name in names if given.get(name)]


def _openai_answer(custom_id: Any, given: Answer | InvalidRequestError) -> dict[str, Any]:
    if isinstance(given, InvalidRequestError):
        error = {"code": INVALID, "message": str(given)}
        return {"id": "batch_req", "custom_id": custom_id, "response": None, "error": error}
    response = {"status_code": given.status, "request_id": given.request_id, "body": given.body}
    return {"id": f"batch_req_{given.request_id}", "custom_id": custom_id, "response": response, "error": None}


def read(source: Path) -> list[Line]:
    """The lines that are not empty. Raises InvalidRequestError for two of the same id: one would be taken for done."""
    lines: list[Line] = []
    first: dict[str, int] = {}
    with source.open("rb") as file:
        for number, content in enumerate(file):
            content = content.removeprefix(BYTE_ORDER_MARK) if number == 0 else content
            if not content.strip():
                continue
            line = Line(number, _parsed(content))
            name = name_of(line.line_id)
            if name in first:
                raise InvalidRequestError(
                    f"{source} has the id {name} twice, in lines {first[name] + 1} and {number + 1}; a line without an "
                    "id has its number, from 0."
                )
            first[name] = number
            lines.append(line)
    return lines


def name_of(line_id: Any) -> str:
    """The same for equal ids of any type."""
    return json.dumps(line_id, sort_keys=True)


def _parsed(content: bytes) -> object:
    try:
        fields = json.loads(content.decode(), parse_float=_finite, parse_constant=_finite)
        json.dumps(fields)  # as deep as it can be written again
    except (ValueError, RecursionError) as error:
        return InvalidRequestError(f"The line is not JSON: {error}.")
    return fields


def _finite(number: str) -> float:
    """Raises ValueError for NaN and infinity, which Python reads and JSON does not have."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not finite")
    return value


@dataclass(frozen=True)
class Written:
    """A line of the target, with its end."""

    content: bytes
    name: str
    has_failed: bool

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """None if it is no answer."""
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if not isinstance(answer, dict) or "id" not in answer:
            return None
        if answer.keys() >= {"custom_id", "response", "error"}:
            response = answer["response"]
            failed = answer["error"] is not None or not isinstance(response, dict) or response.get("status_code") != 200
            return cls(content, name_of(answer["custom_id"]), failed)
        if answer.keys() & {"generated_text", "error"}:
            return cls(content, name_of(answer["id"]), "error" in answer)
        return None


class Target:
    """The file of answers. Nothing is written before `open`, and what is no regular file is never read."""

    def __init__(self, path: Path, source: Path) -> None:
        """Raises InvalidRequestError for the source itself, a file of anything else, and where there can be none."""
        self.path, self._written, self._content = path, [], b""
        if not path.exists():
            if not path.parent.is_dir():
                raise InvalidRequestError(f"{path} must be in a folder that exists.")
            return
        if source.exists() and path.samefile(source):
            raise InvalidRequestError(f"{path} is the source, too; name another file for the answers.")
        if stat.S_ISREG(path.stat().st_mode):
            self._content = path.read_bytes()
            self._written = _all_written(self._content, path)

    @property
    def done(self) -> set[str]:
        """Names of the lines that need not be done again."""
        return {written.name for written in self._written if not written.has_failed}

    def open(self, again: Collection[str]) -> TextIO:
        """To add answers to. Failures of the lines that are done again go, and so does an incomplete last line."""
        kept = [w.content for w in self._written if not (w.has_failed and w.name in again)]
        if (content := b"".join(kept)) != self._content:
            _replace(self.path.resolve(), content)
        return self.path.open("a", encoding="utf-8")


def _all_written(content: bytes, path: Path) -> list[Written]:
    """Without a last line that a stopped run left incomplete."""
    end = content.rfind(b"\n") + 1
    found: list[Written] = []
    for number, line in enumerate(content[:end].splitlines(keepends=True), 1):
        written = Written.parse(line)
        if written is None:
            raise InvalidRequestError(f"{path} must hold answers and nothing else, but its line {number} is none.")
        found.append(written)
    if rest := content[end:]:
        if written := Written.parse(rest + b"\n"):
            found.append(written)
        elif not _begins_an_answer(rest):
            raise InvalidRequestError(f"{path} must hold answers and nothing else, but ends with something else.")
    return found


def _begins_an_answer(rest: bytes) -> bool:
    """Whether it is the beginning of an answer, and not all of something else."""
    text = rest.decode(errors="replace")
    if len(text) <= len(BEFORE_ID):
        return BEFORE_ID.startswith(text)
    if not text.startswith(BEFORE_ID) or _is_json(text):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(BEFORE_ID))
    except (ValueError, RecursionError):  # within the id
        return True
    return any(after.startswith(text[end:]) or text[end:].startswith(after) for after in AFTER_ID)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    """All at once: a crash leaves the file as it was, or as it is to be."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            shutil.copymode(path, new.name)
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


def write(out: TextIO, answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def answer_all(app: FastAPI, lines: Iterable[Line], take: Callable[[bool, dict[str, Any]], None]) -> None:
    """take(whether it is a text, the answer) is called with each line's as it is done."""
    asyncio.run(_answer_all(app, iter(lines), take))


async def _answer_all(app: FastAPI, lines: Iterator[Line], take: Callable[[bool, dict[str, Any]], None]) -> None:
    at_a_time = 2 * app.state.context.engine.info.n_slots  # as many wait as run, so that the batch stays full
    running: set[asyncio.Task[tuple[bool, dict[str, Any]]]] = set()
    async with app.router.lifespan_context(app):
        try:
            while True:
                running |= {asyncio.create_task(_answer(app, line)) for line in islice(lines, at_a_time - len(running))}
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    take(*task.result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _answer(app: FastAPI, line: Line) -> tuple[bool, dict[str, Any]]:
    try:
        path, body = line.request()
    except InvalidRequestError as error:
        return False, line.answer(error)
    answer = await _post(app, path, body)
    return answer.status == 200, line.answer(answer)


async def _post(app: FastAPI, path: str, body: Mapping[str, Any]) -> Answer:
    """As a client would over HTTP."""
    content = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    request: list[Message] = [{"type": "http.request", "body": content}]
    answered: list[Message] = []

    async def receive() -> Message:
        if not request:
            await asyncio.Event().wait()  # who asks does not leave
        return request.pop()

    async def send(message: Message) -> None:
        answered.append(message)

    await app(scope, receive, send)
    start, *parts = answered
    headers = dict(start["headers"])
    told = json.loads(b"".join(part.get("body", b"") for part in parts))
    return Answer(start["status"], headers[b"x-request-id"].decode(), told)
