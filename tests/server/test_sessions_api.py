"""Sessions over HTTP, on both contracts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from model import LanguageModel, Tokenizer
from server.api.app import create_app
from server.api.config import APIConfig
from server.engine import LLMEngine
from server.sessions import SessionsConfig
from server.stores import SQLiteSessionStore, open_store
from tests.conftest import VARIANTS, Variant, random_model, tiny_config
from tests.redis_server import RedisServer, needs_redis
from tests.server.test_sessions import damage

PARAMETERS = {"max_new_tokens": 6, "details": True}


@pytest.fixture
def session(client: TestClient) -> Iterator[str]:
    name = new(client)
    yield name
    client.delete(f"/sessions/{name}")


def new(client: TestClient) -> str:
    created = client.post("/sessions")
    assert created.status_code == 201
    name: str = created.json()["session_id"]
    return name


def turn(client: TestClient, session: str, inputs: str, path: str = "/generate", **body: Any) -> str:
    """The text of a turn by any of the routes."""
    if path == "/generate":
        sent = {"inputs": inputs, "parameters": PARAMETERS, "session_id": session, **body}
    elif path == "/v1/completions":
        sent = {"prompt": inputs, "max_tokens": 6, "temperature": 0, "session_id": session, **body}
    else:
        messages = [{"role": "user", "content": inputs}]
        sent = {"messages": messages, "max_tokens": 6, "temperature": 0, "session_id": session, **body}
    response = client.post(path, json=sent)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        events = [json.loads(part.removeprefix("data:")) for part in response.text.split("\n\n") if "{" in part]
        if path == "/generate":
            return str(events[-1]["generated_text"])
        return "".join(event["choices"][0]["text"] for event in events)
    content = response.json()
    if path == "/generate":
        return str(content["generated_text"])
    choice = content["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_conversation_is_one_long_request(
    path: str, client: TestClient, session: str, tokenizer: Tokenizer, network: LanguageModel
) -> None:
    engine = client.app.state.context.engine._engine  # type: ignore[attr-defined]
    ids = [tokenizer.end_of_text_id]
    for i, said in enumerate(["The fox", " and the bird", " sat", ""][: 3 if "chat" in path else 4]):
        text = turn(client, session, said, path)
        ids += tokenizer.encode(said)
        whole = client.post(
            "/v1/completions", json={"prompt": ids, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        ).json()["choices"][0]
        assert text == whole["text"]
        ids += [token_id for token_id in whole["token_ids"] if token_id != tokenizer.end_of_text_id]
        card = client.get(f"/sessions/{session}").json()
        assert (card["turns"], card["num_tokens"]) == (i + 1, len(ids))
    assert engine.scheduler.n_free_slots == engine.pool.n_slots


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_streams_commit_before_they_end(path: str, client: TestClient, session: str) -> None:
    other = new(client)
    for said in ("The fox", " and"):
        assert turn(client, session, said, path, stream=True) == turn(client, other, said)
        assert client.get(f"/sessions/{session}").json()["num_tokens"] > 0


def test_a_fork_goes_its_own_way(client: TestClient, session: str) -> None:
    turn(client, session, "The fox")
    forks = client.post(f"/sessions/{session}/fork", json={"n": 2}).json()["sessions"]
    texts = [turn(client, fork["session_id"], " and") for fork in forks]
    assert texts[0] == texts[1] == turn(client, session, " and")
    assert client.get(f"/sessions/{forks[0]['session_id']}").json()["turns"] == 2


def test_sessions_are_listed_page_by_page(network: LanguageModel, tokenizer: Tokenizer) -> None:
    with TestClient(create_app(LLMEngine(network, tokenizer))) as client:
        name = new(client)
        turn(client, name, "The fox")
        client.post(f"/sessions/{name}/fork", json={"n": 6})
        turn(client, name, " and")
        pages: list[dict[str, Any]] = []
        after = ""
        while not pages or pages[-1]["has_more"]:
            pages.append(client.get(f"/sessions?limit=3{after}").json())
            after = f"&after={pages[-1]['sessions'][-1]['session_id']}"
        assert [len(page["sessions"]) for page in pages] == [3, 3, 1]
        assert pages[0]["sessions"][0]["session_id"] == name
        assert client.get("/sessions").json() == {
            "sessions": [found for page in pages for found in page["sessions"]],
            "has_more": False,
        }
        assert client.get("/sessions?limit=7").json()["has_more"] is False
        for refused, status, sentence in (
            ("limit=0", 422, "limit: Input should be greater than or equal to 1, not"),
            ("limit=1001", 422, "limit: Input should be less than or equal to 1000, not"),
            ("after=x", 422, "after: must be the id of a session"),
            (f"after={'0' * 32}", 404, "There is no session"),
        ):
            answer = client.get(f"/sessions?{refused}")
            assert answer.status_code == status
            assert answer.json()["error"].startswith(sentence)


def test_forks_over_the_quota_leave_nothing(network: LanguageModel, tokenizer: Tokenizer) -> None:
    app = create_app(LLMEngine(network, tokenizer), sessions_config=SessionsConfig(max_sessions=5))
    with TestClient(app) as client:
        name = new(client)
        turn(client, name, "The fox")
        refused = client.post(f"/sessions/{name}/fork", json={"n": 10})
        assert refused.status_code == 429
        assert [found["session_id"] for found in client.get("/sessions").json()["sessions"]] == [name]
        assert len(client.post(f"/sessions/{name}/fork", json={"n": 4}).json()["sessions"]) == 4
        assert len(client.get("/sessions").json()["sessions"]) == 5


def test_export_and_import(client: TestClient, session: str, network: LanguageModel, tokenizer: Tokenizer) -> None:
    turn(client, session, "The fox")
    exported = client.get(f"/sessions/{session}/export")
    assert exported.headers["content-type"] == "application/octet-stream"
    with TestClient(create_app(LLMEngine(network, tokenizer))) as elsewhere:
        imported = elsewhere.post("/sessions/import", content=exported.content)
        assert imported.status_code == 201
        copy = imported.json()
        assert copy["num_tokens"] == client.get(f"/sessions/{session}").json()["num_tokens"]
        body = {"inputs": " and", "parameters": PARAMETERS}
        here = client.post("/generate", json={**body, "session_id": session}).json()
        there = elsewhere.post("/generate", json={**body, "session_id": copy["session_id"]}).json()
        del there["details"]["cached_tokens"], here["details"]["cached_tokens"]  # another test may have read it
        assert there == here  # log-probabilities included
    damaged = client.post("/sessions/import", content=exported.content[:-3])
    assert damaged.status_code == 422
    assert damaged.json()["error"].startswith("The conversation is damaged")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_exported_can_come_back_whatever_the_limit(variant: Variant, tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(variant, n_layer=6))
    with TestClient(create_app(LLMEngine(model, tokenizer), APIConfig(max_body_size=200))) as client:
        name = new(client)
        turn(client, name, "The fox")
        exported = client.get(f"/sessions/{name}/export").content
        assert client.post("/sessions/import", content=exported).status_code == 201
        larger = client.post("/sessions/import", content=exported * 3)
        assert larger.status_code == 413
        most = client.app.state.context.engine.info.file_bytes  # type: ignore[attr-defined]
        assert larger.json()["error"] == f"The body must have at most {most} bytes."
        assert client.post("/generate", json={"inputs": "a" * 200}).status_code == 413


def test_refusals(client: TestClient, session: str) -> None:
    body: dict[str, Any] = {"inputs": "The fox", "parameters": {"max_new_tokens": 2}}
    unknown = client.post("/generate", json={**body, "session_id": "0" * 32})
    assert unknown.status_code == 404
    assert unknown.json()["error"] == f"There is no session '{'0' * 32}'."
    completion = {"prompt": "a", "max_tokens": 2, "session_id": session}
    assert client.post("/v1/completions", json={**completion, "session_id": "0" * 32}).status_code == 404
    for wrong in ({"n": 2}, {"prompt": ["a", "b"]}):
        several = client.post("/v1/completions", json={**completion, **wrong})
        assert several.status_code == 400
        assert several.json()["error"]["message"] == "A turn of a session has one prompt and one text."
    empty = client.post("/generate", json={**body, "inputs": "", "session_id": new(client)})
    assert empty.status_code == 200  # after the token that starts every text
    assert client.get(f"/sessions/{session}/export").status_code == 404
    sentence = "session_id: must be the id of a session, 32 digits from 0 to 9 and a to f."
    for refused in (
        client.get("/sessions/nonsense"),
        client.get(f"/sessions/{session}%0a"),
        client.post("/generate", json={**body, "session_id": "nonsense"}),
    ):
        assert (refused.status_code, refused.json()["error"]) == (422, sentence)
    assert client.delete(f"/sessions/{session}").status_code == 204
    assert client.delete(f"/sessions/{session}").status_code == 404


def test_a_second_turn_at_a_time_gets_409(client: TestClient, session: str) -> None:
    context = client.app.state.context  # type: ignore[attr-defined]
    assert client.portal is not None
    first = client.portal.call(context.sessions.begin_turn, session, "")
    body = {"inputs": "The fox", "session_id": session}
    second = client.post("/generate", json=body)
    assert second.status_code == 409
    assert second.json()["error"] == f"Session {session} has a turn under way."
    assert client.post("/v1/completions", json={"prompt": "a", "session_id": session}).status_code == 409
    first.release()
    assert client.post("/generate", json=body).status_code == 200


def test_a_refused_turn_leaves_the_session_free_and_as_it_was(client: TestClient, session: str) -> None:
    turn(client, session, "The fox")
    before = client.get(f"/sessions/{session}").json()
    grammar = {"type": "regex", "value": "("}
    bad = {"inputs": " and", "parameters": {"grammar": grammar}, "session_id": session}
    assert client.post("/generate", json=bad).status_code == 422
    costly = {"prompt": "a", "structured_outputs": {"regex": "(a{1000}){1000}"}, "session_id": session}
    assert client.post("/v1/completions", json=costly).status_code == 424
    assert client.get(f"/sessions/{session}").json() == before
    turn(client, session, " and")


def test_keys_have_their_own_sessions_and_quotas(network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = SQLiteSessionStore(tmp_path / "sessions.sqlite")
    app = create_app(
        LLMEngine(network, tokenizer), APIConfig(api_keys=("one", "two")), None, store, SessionsConfig(max_sessions=1)
    )
    with TestClient(app) as client:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        name = client.post("/sessions", headers=one).json()["session_id"]
        full = client.post("/sessions", headers=one)
        assert full.status_code == 429
        assert client.post("/sessions", headers=two).status_code == 201
        assert client.get(f"/sessions/{name}", headers=two).status_code == 404
        assert client.post("/generate", json={"inputs": "a", "session_id": name}, headers=two).status_code == 404
        assert client.post("/generate", json={"inputs": "a", "session_id": name}, headers=one).status_code == 200
        assert len(client.get("/sessions", headers=one).json()["sessions"]) == 1


@needs_redis
def test_without_redis_sessions_get_503_and_others_are_served(
    network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as redis:
        app = create_app(LLMEngine(network, tokenizer), store=open_store(redis.url))
        with TestClient(app) as client:
            name = new(client)
            turn(client, name, "The fox")
            redis.kill()
            lost = [client.post("/sessions"), client.post("/generate", json={"inputs": " and", "session_id": name})]
            for answer in lost:
                assert (answer.status_code, answer.json()["error_type"]) == (503, "overloaded")
                assert answer.json()["error"].startswith("The store of sessions does not answer")
                assert "retry-after" in answer.headers
            completion = client.post("/v1/completions", json={"prompt": "a", "session_id": name})
            assert completion.status_code == 503
            assert completion.json()["error"]["code"] == "store_unavailable"
            assert client.post("/generate", json={"inputs": "The fox"}).status_code == 200
            redis.start()
            turn(client, name, " and")
            assert client.get(f"/sessions/{name}").json()["turns"] == 2


def test_a_damaged_store_gives_503_and_others_are_served(
    network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "sessions.sqlite"
    with TestClient(create_app(LLMEngine(network, tokenizer), store=SQLiteSessionStore(path))) as client:
        name = new(client)
    damage(path)
    with TestClient(create_app(LLMEngine(network, tokenizer), store=SQLiteSessionStore(path))) as client:
        for answer in (
            client.get("/sessions"),
            client.get(f"/sessions/{name}"),
            client.post("/sessions"),
            client.post("/generate", json={"inputs": "The fox", "session_id": name}),
        ):
            assert (answer.status_code, answer.json()["error_type"]) == (503, "overloaded")
        assert client.post("/generate", json={"inputs": "The fox"}).status_code == 200


def test_sessions_survive_the_server(network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts, name = [], ""
    for _ in range(2):
        store = SQLiteSessionStore(tmp_path / "sessions.sqlite")
        with TestClient(create_app(LLMEngine(network, tokenizer), store=store)) as client:
            name = name or new(client)
            texts.append(turn(client, name, "The fox"))
            assert client.get(f"/sessions/{name}").json()["turns"] == len(texts)


def test_a_turn_without_a_prompt_tells_of_no_prompt(client: TestClient, session: str, tokenizer: Tokenizer) -> None:
    """The turn before ended with the end of text, so that nothing is left to be read."""
    end = {str(tokenizer.end_of_text_id): 100}
    assert turn(client, session, "The fox", "/v1/completions", logit_bias=end) == ""
    forks = client.post(f"/sessions/{session}/fork", json={"n": 3}).json()["sessions"]
    first, second, third = (fork["session_id"] for fork in forks)
    body = {"inputs": "", "parameters": {**PARAMETERS, "decoder_input_details": True}, "session_id": first}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200
    assert answer.json()["details"]["prefill"] == []
    echoed = {"prompt": "", "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 1}
    answer = client.post("/v1/completions", json={**echoed, "session_id": second})
    assert answer.status_code == 200
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == answer.json()["usage"]["completion_tokens"]
    assert turn(client, third, "", "/v1/completions", echo=True, logprobs=1, stream=True)
