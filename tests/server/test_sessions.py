"""Sessions and their stores."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from model import LanguageModel, Tokenizer
from server.api.turns import TurnStream
from server.engine import AsyncEngine, LLMEngine, RequestOutput, SamplingParams, StoredPrefixes
from server.errors import (
    BusySessionError,
    ConfigurationError,
    InvalidConversationError,
    NotFoundError,
    QuotaError,
    StoreFullError,
    StoreUnavailableError,
)
from server.sessions import Sessions, SessionsConfig
from server.sessions.sessions import STORE_THREADS
from server.stores import (
    GRACE_SECONDS,
    Session,
    SessionStore,
    SQLiteSessionStore,
    open_prefix_store,
    open_store,
    sqlite,
)
from tests.redis_server import RedisServer, needs_redis


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionStore]:
    with RedisServer(tmp_path) if request.param == "redis" else nullcontext() as redis:
        store = open_store(redis.url if redis else str(tmp_path / "sessions.sqlite"))
        yield store
        store.close()


NOW = time.time() + 3600  # later than Redis' own clock, by which it forgets, will be while these tests run


def session(name: str, turn: int = 0, owner: str = "", expires_in: float = 100.0) -> Session:
    return Session(name, owner, turn, 7 * turn, NOW, NOW + turn, NOW + expires_in)


def test_a_store_gives_back_what_it_was_given(store: SessionStore) -> None:
    assert store.create([session("a")], b"", 9)
    assert store.load("a", "", NOW) == (session("a"), b"")
    assert store.commit(session("a", 1), b"one")
    assert store.load("a", "", NOW) == (session("a", 1), b"one")
    assert not store.commit(session("a", 1), b"the same turn by another server")
    assert not store.commit(session("a", 3), b"a turn too far")
    assert not store.commit(session("b", 1), b"nobody")
    assert store.load("a", "", NOW) == (session("a", 1), b"one")
    assert store.delete("a", "")
    assert not store.delete("a", "")
    assert store.load("a", "", NOW) is None


def test_owners_do_not_see_each_other_and_have_quotas(store: SessionStore) -> None:
    assert store.create([session("a", owner="x")], b"", 2)
    assert store.create([session("b", owner="x")], b"", 2)
    assert not store.create([session("c", owner="x")], b"", 2)
    assert store.create([session("d", owner="y")], b"", 2)
    assert store.load("a", "y", NOW) is None
    assert not store.delete("a", "y")
    assert not store.commit(session("a", 1, owner="y"), b"")
    assert {found.session_id for found in store.list("x", NOW, 9)} == {"a", "b"}


def test_several_are_created_all_or_none(store: SessionStore) -> None:
    assert store.create([session("a")], b"", 5)
    assert store.create([session(name, owner="y") for name in "xyz"], b"", 5)
    assert not store.create([session(name) for name in "bcdef"], b"one", 5)
    assert [found.session_id for found in store.list("", NOW, 9)] == ["a"]
    assert store.create([session(name, turn=1) for name in "bcde"], b"one", 5)
    assert {found.session_id for found in store.list("", NOW, 9)} == set("abcde")
    for name in "bcde":
        assert store.load(name, "", NOW) == (session(name, 1), b"one")
    assert not store.create([session("f")], b"", 5)


def test_sessions_end_with_their_time(store: SessionStore) -> None:
    assert store.create([session("a", expires_in=10)], b"", 2)
    assert store.create([session("b", expires_in=20)], b"", 2)
    assert store.load("a", "", NOW + 10) is None
    assert [found.session_id for found in store.list("", NOW + 15, 9)] == ["b"]
    store.remove_expired(NOW + 15)
    assert store.load("b", "", NOW + 15) is not None
    assert store.create([replace(session("c"), created_at=NOW + 15)], b"", 2)
    assert not store.create([replace(session("d"), created_at=NOW + 15)], b"", 2)


def test_what_has_ended_makes_room_for_its_owner_only_where_it_must(store: SessionStore) -> None:
    """What ended first goes first: the clock may have been wrong, and what is not in the way comes back with it."""
    for i, name in enumerate("abc"):
        assert store.create([session(name, expires_in=10 + i)], b"", 4)
    assert store.create([session("z", owner="y", expires_in=5)], b"", 4)
    later = NOW + 50

    def kept() -> set[str]:
        return {found.session_id for found in store.list("", NOW, 9)}

    assert store.create([replace(session("d"), created_at=later)], b"", 4)
    assert kept() == set("abcd")
    assert store.create([replace(session(name), created_at=later) for name in "ef"], b"", 4)
    assert kept() == set("cdef")
    assert not store.create([replace(session(name), created_at=later) for name in "gh"], b"", 4)
    assert kept() >= set("def")
    assert store.load("z", "y", NOW)


def test_a_list_is_read_page_by_page(store: SessionStore) -> None:
    """Those that end last first; of those that end together, some order that stays."""
    for i in range(7):
        assert store.create([session(f"{i}", expires_in=100 - i // 2)], b"", 9)
    assert store.create([session("another's", owner="y")], b"", 9)
    pages, after = [], None
    while page := [found.session_id for found in store.list("", NOW, 2, after)]:
        pages.append(page)
        after = page[-1]
    assert [sorted(page) for page in pages] == [["0", "1"], ["2", "3"], ["4", "5"], ["6"]]
    assert [found.session_id for found in store.list("", NOW, 9)] == [name for page in pages for name in page]


def test_what_has_ended_takes_no_room_in_sqlite(tmp_path: Path) -> None:
    store = SQLiteSessionStore(tmp_path / "sessions.sqlite")
    store.create([session("a", expires_in=10)], b"", 9)
    store.remove_expired(NOW + 15)
    assert store.load("a", "", NOW) is None
    store.close()


@needs_redis
def test_what_has_ended_takes_no_room_in_redis(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        store = open_store(server.url)
        store.create([replace(session("a"), expires_at=time.time() + 0.2 - GRACE_SECONDS)], b"", 9)
        deadline = time.monotonic() + 60
        while client.keys():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        store.create([session("b")], b"", 9)
        assert len(client.keys()) == 2
        store.close()


@needs_redis
def test_the_last_place_goes_to_one_of_several_servers(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        stores = [open_store(server.url) for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda i: stores[i % 4].create([session(f"{i}")], b"", 10), range(40)))
            assert sum(created) == 10
            name = str(created.index(True))
            committed = list(pool.map(lambda i: stores[i % 4].commit(session(name, 1), b"%d" % i), range(40)))
            assert sum(committed) == 1
        assert stores[0].load(name, "", NOW) == (session(name, 1), b"%d" % committed.index(True))
        for store in stores:
            store.close()


@needs_redis
def test_a_lost_redis_fails_one_request_after_another_until_it_is_back(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        store = open_store(server.url)
        store.create([session("a")], b"", 9)
        server.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                store.load("a", "", NOW)
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                store.commit(session("a", 1), b"one")
        server.start()
        assert store.commit(session("a", 1), b"one")
        server.kill()
        server.start()
        assert store.load("a", "", NOW) == (session("a", 1), b"one")
        store.close()


def test_a_locked_file_fails_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    store = SQLiteSessionStore(tmp_path / "sessions.sqlite")
    other = sqlite3.connect(tmp_path / "sessions.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        store.create([session("a")], b"", 9)
    other.close()
    assert store.create([session("a")], b"", 9)
    store.close()


def fill(store: SessionStore) -> list[str]:
    """Add sessions until there is no room; their names."""
    names: list[str] = []
    for i in range(200):
        try:
            store.create([session(f"{i}")], bytes(190_000), 10**6)
        except StoreFullError:
            return names
        names.append(f"{i}")
    raise AssertionError("There was always room.")


def test_memory_is_bounded_and_what_is_deleted_or_has_ended_makes_room() -> None:
    store = SQLiteSessionStore(":memory:", 2**21)
    names = fill(store)
    assert 9 <= len(names) <= 11
    assert store.delete(names[0], "")
    assert store.create([replace(session("a"), expires_at=NOW + 1)], bytes(190_000), 10**6)
    later = replace(session("b", owner="y"), created_at=NOW + 2)
    assert store.create([later], bytes(190_000), 10**6)
    assert store.load("a", "", NOW) is None
    with pytest.raises(StoreFullError):
        store.commit(session(names[1], 1), bytes(10**6))
    assert store.load(names[1], "", NOW) == (session(names[1]), bytes(190_000))
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
    if mount is None or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_on_a_full_disk_sessions_can_be_deleted_and_make_room(small_disk: Path) -> None:
    path = small_disk / "sessions.sqlite"
    store = SQLiteSessionStore(path)
    for _ in range(2):  # a server that starts on a full disk is no worse off
        names = fill(store)
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "another's").write_bytes(bytes(2**20))
        assert all(store.delete(name, "") for name in names[:9])
        for name in names[:8]:
            assert store.create([session(f"new {name}")], bytes(190_000), 10**6)
        assert store.load(names[9], "", NOW) == (session(names[9]), bytes(190_000))
        for found in store.list("", NOW, 10**6):
            assert store.delete(found.session_id, "")
        store.close()
        store = SQLiteSessionStore(path)
    store.close()


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it opens, and has all that would be made there."""
    path = tmp_path / "sessions.sqlite"
    SQLiteSessionStore(path).close()
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options)
    )
    with pytest.raises(ConfigurationError, match="cannot be opened: attempt to write a readonly database"):
        SQLiteSessionStore(path)


@needs_redis
def test_a_full_redis_says_so_and_sessions_can_be_deleted(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        store = open_store(server.url)
        client.config_set("maxmemory", 8 * 2**20)
        names = fill(store)
        assert all(store.delete(name, "") for name in names[:5])
        assert store.create([session("new")], bytes(190_000), 10**6)
        store.close()


def damage(path: Path) -> None:
    """All of an SQLite file but its first page, so that it opens as before."""
    content = bytearray(path.read_bytes())
    assert len(content) > 4096
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def test_a_damaged_file_fails_one_request_after_another(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    store = SQLiteSessionStore(path)
    assert store.create([session("a")], b"", 9)
    store.close()
    damage(path)
    store = SQLiteSessionStore(path)
    works: list[Callable[[], object]] = [
        lambda: store.load("a", "", NOW),
        lambda: store.list("", NOW, 9),
        lambda: store.commit(session("a", 1), b"one"),
        lambda: store.create([session("b")], b"", 9),
        lambda: store.delete("a", ""),
    ]
    for work in works:
        with pytest.raises(StoreUnavailableError, match="does not answer"):
            work()
    store.close()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database" * 100)
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        open_store(str(tmp_path / "text"))


def test_a_url_that_is_no_store_is_refused_without_its_password() -> None:
    for url, sentence in (
        ("redis://:secret@127.0.0.1:1/0", "The store at 127.0.0.1 cannot be opened: .*refused"),
        ("redis://:secret/@127.0.0.1", "store is no URL of a Redis"),
        ("postgres://user:secret@host", "store must be the path of a file, redis:// or rediss://, not postgres://."),
    ):
        with pytest.raises(ConfigurationError, match=sentence) as raised:
            open_store(url)
        assert "secret" not in str(raised.value)


def test_redis_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match="needs a package: pip install redis"):
        open_store("redis://127.0.0.1")


def in_sessions(
    store: SessionStore,
    network: LanguageModel,
    tokenizer: Tokenizer,
    main: Callable[[Sessions, AsyncEngine], Coroutine[Any, Any, None]],
    clock: Callable[[], float] = time.time,
    **options: Any,
) -> None:
    engine = LLMEngine(network, tokenizer)

    async def run() -> None:
        front = AsyncEngine(engine)
        front.start()
        await main(Sessions(store, engine.state_files, SessionsConfig(**options), clock=clock), front)
        await asyncio.to_thread(front.stop)

    asyncio.run(run())


async def read_all(stream: TurnStream) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while some := await stream.read():
        outputs += some
    return outputs


async def take_turn(sessions: Sessions, engine: AsyncEngine, name: str, ids: list[int], n: int = 5) -> list[int]:
    """A turn as the HTTP side takes it: committed before its end is told."""
    turn = await sessions.begin_turn(name, "me")
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    stream = TurnStream(await engine.submit(ids, params, start=turn.start, keep_conversation=True), turn)
    try:
        return [output.token.token_id for output in await read_all(stream) if output.token]
    finally:
        stream.close()


class SlowCommits(SQLiteSessionStore):
    """Commits when it is released."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.is_released, self.is_asked = threading.Event(), threading.Event()

    def commit(self, session: Session, data: bytes) -> bool:
        self.is_asked.set()
        self.is_released.wait()
        return super().commit(session, data)


def test_a_session_is_busy_until_what_its_client_left_is_stored(tokenizer: Tokenizer, network: LanguageModel) -> None:
    store = SlowCommits()

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        leaving = asyncio.create_task(take_turn(sessions, engine, name, [1, 5]))
        await asyncio.to_thread(store.is_asked.wait)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        with pytest.raises(BusySessionError):
            await sessions.begin_turn(name, "me")
        store.is_released.set()
        while sessions._busy:
            await asyncio.sleep(0.01)
        assert (await sessions.get(name, "me")).turn == 1
        await take_turn(sessions, engine, name, [7])
        assert (await sessions.get(name, "me")).turn == 2

    in_sessions(store, network, tokenizer, main)


def test_turns_give_the_text_of_one_request(store: SessionStore, tokenizer: Tokenizer, network: LanguageModel) -> None:
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

    in_sessions(store, network, tokenizer, main)


def test_one_turn_at_a_time_and_an_abandoned_one_leaves_nothing(
    store: SessionStore, tokenizer: Tokenizer, network: LanguageModel
) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        await take_turn(sessions, engine, name, [1, 5])
        before = await sessions.export(name, "me")
        turn = await sessions.begin_turn(name, "me")
        with pytest.raises(BusySessionError, match="has a turn under way"):
            await sessions.begin_turn(name, "me")
        params = SamplingParams(temperature=0, max_tokens=10**5, ignore_eos=True)
        stream = TurnStream(await engine.submit([7], params, start=turn.start, keep_conversation=True), turn)
        await stream.read()
        stream.close()
        assert await sessions.export(name, "me") == before
        assert len(await take_turn(sessions, engine, name, [7])) == 5
        with pytest.raises(NotFoundError, match="There is no session"):
            await sessions.begin_turn(name, "another")

    in_sessions(store, network, tokenizer, main)


def test_another_servers_turn_wins_if_it_was_first(
    store: SessionStore, tokenizer: Tokenizer, network: LanguageModel
) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        other = Sessions(store, sessions._files)
        turn = await sessions.begin_turn(name, "me")
        await take_turn(other, engine, name, [1, 5])
        stored = await other.export(name, "me")
        params = SamplingParams(temperature=0, max_tokens=5)
        stream = TurnStream(await engine.submit([1, 6], params, start=turn.start, keep_conversation=True), turn)
        with pytest.raises(BusySessionError, match="changed or deleted during this turn"):
            await read_all(stream)
        stream.close()
        assert await sessions.export(name, "me") == stored

    in_sessions(store, network, tokenizer, main)


def test_forks_exports_and_imports(store: SessionStore, tokenizer: Tokenizer, network: LanguageModel) -> None:
    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        with pytest.raises(NotFoundError, match="has no turn yet"):
            await sessions.export(name, "me")
        await take_turn(sessions, engine, name, [1, 5, 6])
        data = await sessions.export(name, "me")
        (fork,) = [session.session_id for session in await sessions.fork(name, "me")]
        copy = (await sessions.import_(data, "me")).session_id
        texts = [await take_turn(sessions, engine, which, [8]) for which in (name, fork, copy)]
        assert texts[0] == texts[1] == texts[2]
        with pytest.raises(InvalidConversationError):
            await sessions.import_(data[:-1], "me")
        assert len((await sessions.list("me", 9))[0]) == 3
        await sessions.delete(fork, "me")
        with pytest.raises(NotFoundError):
            await sessions.delete(fork, "me")

    in_sessions(store, network, tokenizer, main)


def test_quotas_and_expiry(store: SessionStore, tokenizer: Tokenizer, network: LanguageModel) -> None:
    now = [time.time()]

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        first = (await sessions.create("me")).session_id
        await sessions.create("me")
        with pytest.raises(QuotaError, match="There are 2 sessions already"):
            await sessions.create("me")
        await sessions.create("another")
        now[0] += 50
        await take_turn(sessions, engine, first, [1, 5])  # which renews it
        now[0] += 60
        assert [found.session_id for found in (await sessions.list("me", 9))[0]] == [first]
        await sessions.create("me")
        with pytest.raises(QuotaError, match="2 more would make more than the 2 sessions"):
            await sessions.fork(first, "me", 2)
        assert len((await sessions.list("me", 9))[0]) == 2

    in_sessions(store, network, tokenizer, main, clock=lambda: now[0], session_ttl=100, max_sessions=2)


def test_a_clock_that_jumps_deletes_nothing(store: SessionStore, tokenizer: Tokenizer, network: LanguageModel) -> None:
    now = [time.time()]

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        await take_turn(sessions, engine, name, [1, 5])
        now[0] += 2 * 86_400
        with pytest.raises(NotFoundError):
            await sessions.get(name, "me")
        await sessions.create("me")
        assert len((await sessions.list("me", 9))[0]) == 1
        now[0] -= 2 * 86_400
        assert (await sessions.get(name, "me")).turn == 1
        await take_turn(sessions, engine, name, [6])
        assert len((await sessions.list("me", 9))[0]) == 2

    in_sessions(store, network, tokenizer, main, clock=lambda: now[0], session_ttl=86_400)


def test_what_has_long_ended_is_deleted(tokenizer: Tokenizer, network: LanguageModel) -> None:
    now, store = [time.time()], SQLiteSessionStore(":memory:")

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        name = (await sessions.create("me")).session_id
        now[0] += 101 + GRACE_SECONDS
        await sessions.create("another")
        now[0] -= 101 + GRACE_SECONDS
        with pytest.raises(NotFoundError):
            await sessions.get(name, "me")

    in_sessions(store, network, tokenizer, main, clock=lambda: now[0], session_ttl=100)


def test_quotas_are_in_bytes_too(tokenizer: Tokenizer, network: LanguageModel) -> None:
    """A session without turns counts as it will after its first one: no quota is passed by turns."""
    files = LLMEngine(network, tokenizer).state_files
    store = SQLiteSessionStore(":memory:")

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        names = [(await sessions.create("me")).session_id for _ in range(3)]
        for refused in (sessions.create("me"), sessions.fork(names[0], "me")):
            with pytest.raises(QuotaError):
                await refused
        for name in names:
            await take_turn(sessions, engine, name, [1, 5])
            assert len(await sessions.export(name, "me")) <= files.max_bytes
        with pytest.raises(QuotaError):
            await sessions.import_(await sessions.export(names[0], "me"), "me")
        await sessions.create("another")

    in_sessions(store, network, tokenizer, main, session_quota=4 * files.max_bytes - 1)
    with pytest.raises(ConfigurationError, match="session_quota must be at least 1 MiB, for the"):
        Sessions(store, files, SessionsConfig(session_quota=files.max_bytes - 1))


class HangingStore(SQLiteSessionStore):
    """Answers when it is released."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.is_released, self.n_asked = threading.Event(), 0

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        self.n_asked += 1
        self.is_released.wait()
        return super().load(session_id, owner, now)


def test_a_store_that_hangs_holds_up_none_without_a_session(
    tokenizer: Tokenizer, network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is answered in a thread does not wait for it, and those who wait for its threads do not wait without end."""
    store = HangingStore()

    async def main(sessions: Sessions, engine: AsyncEngine) -> None:
        turns = [asyncio.create_task(sessions.begin_turn("0" * 32, f"{i}")) for i in range(STORE_THREADS + 50)]
        try:
            async with asyncio.timeout(60):
                while store.n_asked < STORE_THREADS:
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(int)  # as large answers are put together
            assert not any(turn.done() for turn in turns)
            monkeypatch.setattr("server.sessions.sessions.PATIENCE_SECONDS", 0.0)
        finally:
            store.is_released.set()
        answers = await asyncio.gather(*turns, return_exceptions=True)
        assert Counter(map(type, answers)) == {NotFoundError: STORE_THREADS, StoreUnavailableError: 50}

    in_sessions(store, network, tokenizer, main)


@needs_redis
def test_a_redis_that_hangs_holds_up_none_without_a_session(
    tmp_path: Path, tokenizer: Tokenizer, network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.stores.redis.TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr("server.stores.redis.PREFIX_TIMEOUT_SECONDS", 0.2)
    with RedisServer(tmp_path) as server:
        store, prefixes = open_store(server.url), open_prefix_store(server.url, 10**6)
        engine = LLMEngine(network, tokenizer)
        stored = StoredPrefixes(prefixes, engine.prefix_cache, engine.state_files, engine.config)

        async def main() -> None:
            sessions, front = Sessions(store, engine.state_files), AsyncEngine(engine, stored=stored)
            stored.start()
            front.start()
            server.pause()
            turns = [asyncio.create_task(sessions.begin_turn("0" * 32, f"{i}")) for i in range(12)]
            for _ in range(2):
                stream = await front.submit("Once upon a time " * 1000, SamplingParams(max_tokens=1))
                assert await stream.read()
                stream.close()
            await asyncio.wait_for(asyncio.to_thread(int), 30)  # as large answers are put together
            assert not any(turn.done() for turn in turns)
            server.resume()
            assert all(
                isinstance(error, NotFoundError) for error in await asyncio.gather(*turns, return_exceptions=True)
            )
            await asyncio.to_thread(front.stop)
            stored.close()
            sessions.close()

        asyncio.run(main())
