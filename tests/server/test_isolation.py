"""What one API key may not learn of another, nor do to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from model import LanguageModel, Tokenizer
from server.api.app import create_app
from server.api.config import APIConfig
from server.api.middleware import _digest
from server.engine import LLMEngine
from server.errors import NotFoundError
from server.stores import open_prefix_store

ONE, TWO = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
STORY = "Once upon a time there was a red fox"


def make_client(network: LanguageModel, tokenizer: Tokenizer, store: Path | None = None, **options: Any) -> TestClient:
    """Of a server with two keys. store: of the prefixes that leave its memory."""
    prefixes = open_prefix_store(str(store), 10**6) if store else None
    config = APIConfig(api_keys=("one", "two"), **options)
    return TestClient(create_app(LLMEngine(network, tokenizer), config, prefix_store=prefixes))


@pytest.fixture
def client(network: LanguageModel, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with make_client(network, tokenizer) as client:
        yield client


def ask(client: TestClient, key: dict[str, str], prompt: str = STORY, **fields: Any) -> tuple[int, str]:
    """Tokens of the prompt that were cached, and the text."""
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    answer = client.post("/v1/completions", json=body, headers=key).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]


def test_no_key_finds_what_another_has_asked_or_was_answered(client: TestClient) -> None:
    cold, text = ask(client, ONE)
    assert cold == 0
    assert ask(client, TWO) == (0, text)
    assert ask(client, ONE)[0] > 0
    assert ask(client, TWO)[0] > 0
    ask(client, ONE, "A bird")
    assert ask(client, TWO, "A bird" + ask(client, ONE, "A bird")[1])[0] == 0


def test_no_key_finds_it_in_the_store_of_prefixes(network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with make_client(network, tokenizer, tmp_path / "store.sqlite") as client:
        ask(client, ONE)
    for key, is_found in ((TWO, False), (ONE, True)):
        with make_client(network, tokenizer, tmp_path / "store.sqlite") as client:
            assert (ask(client, key)[0] > 0) is is_found


def test_those_who_give_the_same_salt_share_on_purpose(client: TestClient) -> None:
    ask(client, ONE, cache_salt="of the team")
    assert ask(client, TWO)[0] == ask(client, TWO, cache_salt="of one")[0] == 0
    assert ask(client, ONE)[0] == 0
    assert ask(client, TWO, cache_salt="of the team")[0] > 0


def owner_of(key: str) -> str:
    """The name that the server has for it."""
    return _digest(key.encode()).hex()[:16]


def test_no_salt_is_another_keys(client: TestClient) -> None:
    """Not even one made of what the server has for the key."""
    ask(client, ONE)
    for salt in (owner_of("one"), f"of {owner_of('one')}"):
        assert ask(client, TWO, cache_salt=salt)[0] == 0


def test_keys_that_trust_each_other_share_one_cache(network: LanguageModel, tokenizer: Tokenizer) -> None:
    with make_client(network, tokenizer, share_prefix_cache=True) as client:
        ask(client, ONE)
        assert ask(client, TWO)[0] > 0


def test_a_turn_on_anothers_session_is_404_and_disturbs_nobody(client: TestClient) -> None:
    """Whether a turn of its owner is under way, or one of the intruder's is being refused."""
    name = client.post("/sessions", headers=ONE).json()["session_id"]
    sessions = client.app.state.context.sessions  # type: ignore[attr-defined]
    portal, body = client.portal, {"inputs": STORY, "session_id": name}
    assert portal is not None
    turn = portal.call(sessions.begin_turn, name, owner_of("one"))
    assert client.post("/generate", json=body, headers=ONE).status_code == 409
    assert client.post("/generate", json=body, headers=TWO).status_code == 404
    turn.release()
    load, is_asked, may_go_on = sessions._load, threading.Event(), threading.Event()

    async def slow_for_two(session_id: str, owner: str) -> Any:
        if owner == owner_of("two"):
            is_asked.set()
            await asyncio.to_thread(may_go_on.wait)
        return await load(session_id, owner)

    sessions._load = slow_for_two
    intruder = portal.start_task_soon(sessions.begin_turn, name, owner_of("two"))
    is_asked.wait()
    second = portal.start_task_soon(sessions.begin_turn, name, owner_of("two"))
    assert client.post("/generate", json=body, headers=ONE).status_code == 200
    may_go_on.set()
    for refused in (intruder, second):
        with pytest.raises(NotFoundError):
            refused.result()
    assert not sessions._busy
