"""Sessions and their SQLite store."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from model import Tokenizer
from server.engine import AsyncEngine, LLMEngine, SamplingParams
from server.errors import (
    BusySessionError,
    ConfigurationError,
    InvalidConversationError,
    NotFoundError,
    QuotaError,
)
from server.sessions import Session, Sessions, SessionsConfig, SQLiteStore
from tests.conftest import random_model, tiny_config

N_KILLS = 10


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "sessions.sqlite")
    yield store
    store.close()


def session(name: str, turn: int = 0, owner: str = "", expires_at: float = 100.0) -> Session:
    return Session(name, owner, turn, 7 * turn, 1.0, 2.0 + turn, expires_at)


def test_a_store_gives_back_what_it_was_given(store: SQLiteStore) -> None:
    assert store.create(session("a"), b"", 9)
    assert store.load("a", "", 50) == (session("a"), b"")
    assert store.commit(session("a", 1), b"one")
    assert store.load("a", "", 50) == (Session("a", "", 1, 7, 1.0, 3.0, 100.0), b"one")
    assert not store.commit(session("a", 1), b"the same turn by another server")
    assert not store.commit(session("a", 3), b"a turn too far")
    assert not store.commit(session("b", 1), b"nobody")
    assert store.load("a", "", 50) == (Session("a", "", 1, 7, 1.0, 3.0, 100.0), b"one")
    assert store.delete("a", "")
    assert not store.delete("a", "")
    assert store.load("a", "", 50) is None


def test_owners_do_not_see_each_other_and_have_quotas(store: SQLiteStore) -> None:
    assert store.create(session("a", owner="x"), b"", 2)
    assert store.create(session("b", owner="x"), b"", 2)
    assert not store.create(session("c", owner="x"), b"", 2)
    assert store.create(session("d", owner="y"), b"", 2)
    assert store.load("a", "y", 50) is None
    assert not store.delete("a", "y")
    assert not store.commit(session("a", 1, owner="y"), b"")
    assert {found.session_id for found in store.list("x", 50)} == {"a", "b"}


def test_sessions_end_with_their_time(store: SQLiteStore) -> None:
    store.create(session("a", expires_at=10), b"", 9)
    store.create(session("b", expires_at=20), b"", 9)
    assert store.load("a", "", 10) is None
    assert [found.session_id for found in store.list("", 15)] == ["b"]
    assert store.remove_expired(15) == 1
    assert store.load("b", "", 15) is not None


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database" * 100)
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        SQLiteStore(tmp_path / "text")


WRITER = """
import sys
from server.sessions import Session, SQLiteStore
store = SQLiteStore(sys.argv[1])
found = store.load("a", "", 0.0)
turn = found[0].turn if found else 0
if not found:
    store.create(Session("a", "", 0, 0, 0.0, 0.0, 1e12), b"", 9)
while True:
    turn += 1
    assert store.commit(Session("a", "", turn, turn, 0.0, 0.0, 1e12), bytes([turn % 256]) * 200_000)
    print(turn, flush=True)
"""


def test_kill_9_loses_no_committed_turn(tmp_path: Path) -> None:
    """What the writer said it had committed is there, whole; at most the turn under way is there besides."""
    path = tmp_path / "sessions.sqlite"
    for _ in range(N_KILLS):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = int(writer.stdout.readline())
            time.sleep(0.05)
            os.kill(writer.pid, signal.SIGKILL)
            said = max([said, *map(int, writer.stdout.read().split())])
        store = SQLiteStore(path)
        found = store.load("a", "", 0.0)
        store.close()
        assert found is not None
        assert found[0].turn in (said, said + 1)
        assert found[1] == bytes([found[0].turn % 256]) * 200_000


def in_sessions(
    store: SQLiteStore,
    tokenizer: Tokenizer,
    main: Callable[[Sessions, AsyncEngine], Coroutine[Any, Any, None]],
    clock: Callable[[], float] = time.time,
    **options: Any,
) -> None:
    engine = LLMEngine(random_model(tiny_config()), tokenizer)

    async def run() -> None:
        front = AsyncEngine(engine)
        front.start()
        await main(Sessions(store, engine, SessionsConfig(**options), clock=clock), front)
        await asyncio.to_thread(front.stop)

    asyncio.run(run())


async def take_turn(sessions: Sessions, engine: AsyncEngine, name: str, ids: list[int], n: int = 5) -> list[int]:
    """A turn as the HTTP side takes it: committed before its end is told."""
    turn = await sessions.begin_turn(name, "me")
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    stream = await engine.submit(ids, params, start=turn.start, keep_conversation=True)
    stream.before_end, stream.on_close = turn.commit, turn.release
    try:
        return [output.token.token_id async for output in stream if output.token]
    finally:
        stream.close()


def test_turns_give_the_text_of_one_request(store: SQLiteStore, tokenizer: Tokenizer) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        seen: list[int] = []
        for i in range(6):
            ids = [1, 5 + i] if i == 0 else [5 + i, 9]
            text = await take_turn(sessions, engine, name, ids)
            seen += ids
            params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            alone = await engine.submit(seen, params)
            assert text == [output.token.token_id async for output in alone if output.token]
            alone.close()
            seen += text
            found = await sessions.get(name, "me")
            assert (found.turn, found.num_tokens) == (i + 1, len(seen))

    in_sessions(store, tokenizer, main)


def test_one_turn_at_a_time_and_an_abandoned_one_leaves_nothing(store: SQLiteStore, tokenizer: Tokenizer) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        await take_turn(sessions, engine, name, [1, 5])
        before = await sessions.export(name, "me")
        turn = await sessions.begin_turn(name, "me")
        with pytest.raises(BusySessionError, match="has a turn under way"):
            await sessions.begin_turn(name, "me")
        params = SamplingParams(temperature=0, max_tokens=10**5, ignore_eos=True)
        stream = await engine.submit([7], params, start=turn.start, keep_conversation=True)
        stream.before_end, stream.on_close = turn.commit, turn.release
        await stream.read()
        stream.close()
        assert await sessions.export(name, "me") == before
        assert len(await take_turn(sessions, engine, name, [7])) == 5
        with pytest.raises(NotFoundError, match="There is no session"):
            await sessions.begin_turn(name, "another")

    in_sessions(store, tokenizer, main)


def test_another_servers_turn_wins_if_it_was_first(store: SQLiteStore, tokenizer: Tokenizer) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        other = Sessions(store, engine.engine)
        turn = await sessions.begin_turn(name, "me")
        await take_turn(other, engine, name, [1, 5])
        stored = await other.export(name, "me")
        params = SamplingParams(temperature=0, max_tokens=5)
        stream = await engine.submit([1, 6], params, start=turn.start, keep_conversation=True)
        stream.before_end = turn.commit
        with pytest.raises(BusySessionError, match="changed or deleted during this turn"):
            [output async for output in stream]
        stream.close()
        assert await sessions.export(name, "me") == stored

    in_sessions(store, tokenizer, main)


def test_forks_exports_and_imports(store: SQLiteStore, tokenizer: Tokenizer) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        with pytest.raises(NotFoundError, match="has no turn yet"):
            await sessions.export(name, "me")
        await take_turn(sessions, engine, name, [1, 5, 6])
        data = await sessions.export(name, "me")
        fork = (await sessions.fork(name, "me")).session_id
        copy = (await sessions.import_(data, "me")).session_id
        texts = [await take_turn(sessions, engine, which, [8]) for which in (name, fork, copy)]
        assert texts[0] == texts[1] == texts[2]
        with pytest.raises(InvalidConversationError):
            await sessions.import_(data[:-1], "me")
        assert len(await sessions.list("me")) == 3
        await sessions.delete(fork, "me")
        with pytest.raises(NotFoundError):
            await sessions.delete(fork, "me")

    in_sessions(store, tokenizer, main)


def test_quotas_and_expiry(store: SQLiteStore, tokenizer: Tokenizer) -> None:
    now = [1000.0]

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        first = (await sessions.create("me")).session_id
        await sessions.create("me")
        with pytest.raises(QuotaError, match="There are 2 sessions already"):
            await sessions.create("me")
        await sessions.create("another")
        now[0] += 50
        await take_turn(sessions, engine, first, [1, 5])  # which renews it
        now[0] += 60
        assert [found.session_id for found in await sessions.list("me")] == [first]
        await sessions.create("me")

    in_sessions(store, tokenizer, main, clock=lambda: now[0], session_ttl=100, max_sessions=2)
