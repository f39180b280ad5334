"""What a contract owns, and that another one needs nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

from model import LanguageModel, Tokenizer
from server.api import app, bodies
from server.api.config import APIConfig
from server.api.contracts import Contract, Contracts
from server.api.errors import STATUSES, Problem
from server.api.openai import OPENAI
from server.api.openai.errors import FINISH_REASONS as OPENAI_FINISH_REASONS
from server.api.openai.errors import NAMES
from server.api.tgi import TGI
from server.api.tgi.errors import FINISH_REASONS, TYPES
from server.api.validation import Body
from server.engine import FinishReason, LLMEngine
from server.errors import InvalidRequestError, OverloadedError
from tests.test_layers import imported

API = Path(app.__file__).parent
JSON_TYPE = {"content-type": "application/json"}
router = APIRouter(prefix="/v1/messages")


class Poem(Body):
    lines: int


@router.post("")
def write(poem: Poem) -> str:
    if poem.lines > 100:
        raise OverloadedError("Too long.")
    return "roses" * poem.lines


def body(problem: Problem) -> dict[str, Any]:
    return {"type": "error", "kind": problem.kind.__name__, "about": problem.field, "says": problem.sentence}


POETRY = Contract(
    router=router, prefixes=("/v1/messages",), error_body=body, statuses={OverloadedError: 529}, responses={400: {}}
)


def test_a_new_contract_is_one_entry(
    network: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "CONTRACTS", (*app.CONTRACTS, POETRY))
    made = app.create_app(LLMEngine(network, tokenizer), APIConfig(api_keys=("key",), max_body_size=100))
    with TestClient(made, headers={"Authorization": "Bearer key"}) as client:
        assert client.post("/v1/messages", json={"lines": 1}).json() == "roses"
        assert "422" not in client.get("/openapi.json").json()["paths"]["/v1/messages"]["post"]["responses"]
        for sent, path, status, kind, field in (
            ({"lines": "a"}, "/v1/messages", 422, "RequestValidationError", "lines"),
            ({"lines": 101}, "/v1/messages", 529, "OverloadedError", None),
            ({"lines": 1}, "/v1/messages/none", 404, InvalidRequestError.__name__, None),
            ({"lines": "a" * 100}, "/v1/messages", 413, "PayloadTooLargeError", None),
        ):
            answer = client.post(path, json=sent)
            assert answer.status_code == status
            assert answer.json().keys() == {"type", "kind", "about", "says"}
            assert (answer.json()["kind"], answer.json()["about"]) == (kind, field)
        nobody = client.post("/v1/messages", json={"lines": 1}, headers={"Authorization": "Bearer lock"})
        assert (nobody.status_code, nobody.json()["kind"]) == (401, "UnauthorizedError")
        assert set(client.get("/v1/none").json()["error"]) == {"message", "type", "param", "code"}
        assert set(client.get("/none").json()) == {"error", "error_type"}


def test_a_path_is_of_the_contract_with_its_longest_prefix() -> None:
    contracts = Contracts((POETRY, *app.CONTRACTS))
    for path, contract in (("/v1/messages/x", POETRY), ("/v1/models", OPENAI), ("/v1", TGI), ("/x", TGI), ("*", TGI)):
        assert contracts.of(path) is contract


def test_each_contract_has_a_name_for_everything() -> None:
    assert set(TYPES) == set(STATUSES) <= set(NAMES)
    assert set(FINISH_REASONS) == set(OPENAI_FINISH_REASONS) == set(FinishReason)


def test_contracts_depend_on_no_other_and_nothing_else_on_them() -> None:
    contracts = {folder.parent.name for folder in API.glob("*/__init__.py")}
    assert len(contracts) == len(app.CONTRACTS)
    for path in API.rglob("*.py"):
        if path not in (API / "app.py", API / "batch.py"):  # which reads files in the forms of both
            others = contracts - set(path.relative_to(API).parts)
            assert not [name for name in imported(path) for other in others if name.startswith(f"server.api.{other}")]


def test_large_bodies_are_read_beside_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """And mean what small ones do."""
    contents = [
        *(b'{"inputs": "The f\\u00f6x", "parameters": {"max_new_tokens": 1}}', b'{"inputs": "a", "x": [1, 2.5, -1e3]}'),
        *(
            b'{"inputs": "a"',
            b'{"inputs": "a"} b',
            b'{"inputs": NaN}',
            b"\xff",
            b"[" * 10**4,
            b'\xef\xbb\xbf{"inputs": "a"}',
        ),
    ]
    read: list[str] = []

    def loads(body: bytes) -> Any:
        read.append(threading.current_thread().name)
        return loads_patiently(body)

    def answers() -> list[tuple[int, str]]:
        given = [client.post("/generate", content=body, headers=JSON_TYPE) for body in contents]
        return [(answer.status_code, answer.text) for answer in given if answer.status_code != 200]

    loads_patiently = bodies._loads
    small = answers()
    monkeypatch.setattr(bodies, "_loads", loads)
    monkeypatch.setattr(bodies, "LARGE", 0)
    assert answers() == small
    assert len(read) == len(contents)
    assert all(name.startswith("json") for name in read)
