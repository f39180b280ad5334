"""The prefix cache's second level: its stores, and engines that go on from what another one left there."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from model import LanguageModel, Tokenizer
from server.engine import AsyncEngine, EngineConfig, LLMEngine, PrefixStore, Request, SamplingParams, StoredPrefixes
from server.engine.snapshot import Snapshot
from server.errors import InvalidConversationError, StoreUnavailableError
from server.stores import open_prefix_store
from tests.conftest import random_model, tiny_config
from tests.redis_server import RedisServer, needs_redis

Opener = Callable[[int], PrefixStore]
PROMPT = [1, *(5 + i % 50 for i in range(40))]
CHUNK = 16


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the same store with a budget."""
    with RedisServer(tmp_path) if request.param == "redis" else nullcontext() as redis:
        yield lambda max_bytes: open_prefix_store(redis.url if redis else str(tmp_path / "store.sqlite"), max_bytes)


def test_the_first_key_that_is_there_is_found(opened: Opener) -> None:
    one, another = opened(10**6), opened(10**6)
    assert one.find([b"a"]) is None
    one.put(b"a", b"1")
    one.put(b"\0b\xff", bytes(range(256)))
    assert another.find([b"c", b"\0b\xff", b"a"]) == (1, bytes(range(256)))
    another.put(b"a", b"2")
    assert one.find([b"a", b"\0b\xff"]) == (0, b"2")
    one.close()
    another.close()


def test_the_least_recently_used_go_first(opened: Opener) -> None:
    store = opened(300)
    for key in (b"a", b"b", b"c"):
        store.put(key, bytes(100))
    store.put(b"b", bytes(100))  # again: it takes no more room
    assert all(store.find([key]) for key in (b"a", b"b", b"c"))
    assert store.find([b"a"])
    store.put(b"d", bytes(150))
    assert [store.find([key]) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, False, True]
    store.put(b"e", bytes(301))
    assert [store.find([key]) is not None for key in (b"a", b"d", b"e")] == [True, True, False]
    smaller = opened(150)
    smaller.put(b"f", b"1")
    assert [store.find([key]) is not None for key in (b"a", b"d", b"f")] == [False, False, True]
    store.close()
    smaller.close()


class Recorder:
    """An observer that counts."""

    def __init__(self) -> None:
        self.look_ups: list[tuple[int, int]] = []
        self.n_dropped = 0

    def on_token(self, *_: object) -> None: ...

    def on_step(self, *_: object) -> None: ...

    def on_close(self, *_: object) -> None: ...

    def on_look_up(self, n_wanted: int, n_found: int) -> None:
        self.look_ups.append((n_wanted, n_found))

    def on_drop(self) -> None:
        self.n_dropped += 1


def generate(
    store: PrefixStore,
    network: LanguageModel,
    tokenizer: Tokenizer,
    *prompts: list[int],
    salt: str = "",
    **options: Any,
) -> tuple[list[tuple[int, list[int]]], Recorder]:
    """(tokens from a cache, text) of each prompt, one after another, in an engine of their own."""
    config = EngineConfig(**{"chunk_size": CHUNK, "max_num_seqs": 2, **options})
    engine, told = LLMEngine(network, tokenizer, config), Recorder()
    stored = StoredPrefixes(store, engine.prefix_cache, engine.state_files, engine.config, told.on_drop)
    front = AsyncEngine(engine, told, stored)

    async def one(prompt: list[int]) -> tuple[int, list[int]]:
        stream = await front.submit(prompt, SamplingParams(temperature=0, max_tokens=5), cache_salt=salt)
        text = [output.token.token_id async for output in stream if output.token]
        stream.close()
        return stream.request.num_cached_tokens, text

    async def main() -> list[tuple[int, list[int]]]:
        stored.start()
        front.start()
        texts = [await one(prompt) for prompt in prompts]
        await asyncio.to_thread(front.stop)
        stored.close()
        return texts

    return asyncio.run(main()), told


def test_a_new_engine_goes_on_from_what_was_stored_at_the_end(
    opened: Opener, tokenizer: Tokenizer, network: LanguageModel
) -> None:
    other = [*PROMPT[:20], 7, 7, 7]
    ((cold, text), (_, other_text)), _ = generate(opened(10**6), network, tokenizer, PROMPT, other)
    again, told = generate(opened(10**6), network, tokenizer, PROMPT, PROMPT[:CHUNK], [*PROMPT, 9])
    assert cold == 0
    assert again[0] == (len(PROMPT), text)
    assert told.look_ups[0] == (len(PROMPT), len(PROMPT))
    assert again[1][0] == 0  # a snapshot without logits is not enough for a whole prompt
    assert again[2][0] == len(PROMPT)  # in memory by now
    assert generate(opened(10**6), network, tokenizer, [*other, 9])[0][0][0] == CHUNK
    assert generate(opened(10**6), network, tokenizer, other)[0] == [(len(other), other_text)]
    assert generate(opened(10**6), network, tokenizer, PROMPT, salt="x")[0] == [(0, text)]
    assert generate(opened(10**6), network, tokenizer, PROMPT, chunk_size=8)[0] == [(0, text)]
    assert generate(opened(10**6), network, tokenizer, PROMPT, batch_invariant=True)[0] == [(0, text)]


def test_what_is_evicted_is_found_again(opened: Opener, tokenizer: Tokenizer, network: LanguageModel) -> None:
    size = network.init_state(1).nbytes
    others = [[1, 60 + i, 7] for i in range(4)]
    room = 3 * size + 10_000
    texts, told = generate(opened(10**6), network, tokenizer, PROMPT, *others, prefix_cache_bytes=room)
    assert told.n_dropped == 0
    again, told = generate(opened(10**6), network, tokenizer, PROMPT, prefix_cache_bytes=room)  # by now it is written
    assert again == [(len(PROMPT), texts[0][1])]
    assert told.look_ups == [(len(PROMPT), len(PROMPT))]


def test_a_damaged_prefix_is_a_miss_and_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, network: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store.sqlite"
    first, _ = generate(open_prefix_store(str(path), 10**6), network, tokenizer, PROMPT)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE prefixes SET data = CAST(substr(data, 1, length(data) - 1) || x'ff' AS BLOB)")
    file.close()
    again, _ = generate(open_prefix_store(str(path), 10**6), network, tokenizer, PROMPT)
    assert again == first
    (warning,) = caplog.records
    assert warning.getMessage().startswith("A stored prefix is not used: The conversation is damaged")
    with sqlite3.connect(path) as file:  # whole, but of other tokens
        data = file.execute("SELECT data FROM prefixes WHERE substr(key, -1) = x'2d'").fetchall()[0][0]
        file.execute("UPDATE prefixes SET data = ?", (data,))
    file.close()
    assert generate(open_prefix_store(str(path), 10**6), network, tokenizer, PROMPT)[0] == first
    assert caplog.records[-1].getMessage() == "A stored prefix is not used: It is what follows other tokens."


def test_a_prefix_of_other_tokens_is_a_miss_whatever_its_length(
    tmp_path: Path, tokenizer: Tokenizer, network: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Two that were swapped in the store, each of them whole."""
    path, other = tmp_path / "store.sqlite", [1, *(PROMPT[:0:-1])]
    first, _ = generate(open_prefix_store(str(path), 10**6), network, tokenizer, PROMPT[:12], other[:12])
    with sqlite3.connect(path) as file:
        (one, two) = file.execute("SELECT key, data FROM prefixes").fetchall()
        file.executemany("UPDATE prefixes SET data = ? WHERE key = ?", [(two[1], one[0]), (one[1], two[0])])
    file.close()
    assert generate(open_prefix_store(str(path), 10**6), network, tokenizer, PROMPT[:12], other[:12])[0] == first
    assert {record.getMessage() for record in caplog.records} == {
        "A stored prefix is not used: It is what follows other tokens."
    }


def test_a_prefix_that_says_not_of_what_it_is_was_written_before(network: LanguageModel, tokenizer: Tokenizer) -> None:
    """Version 0.2 wrote such, which are read by their length."""
    engine = LLMEngine(network, tokenizer)
    snapshot = Snapshot(network.init_state(1), None, b"")
    for key in (b"", b"a"):
        assert engine.state_files.read(engine.state_files.write(snapshot, key=key), b"a")
    with pytest.raises(InvalidConversationError, match="It is what follows other tokens"):
        engine.state_files.read(engine.state_files.write(snapshot, key=b"b"), b"a")


class FailingStore:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.n_asked = 0

    def put(self, key: bytes, data: bytes) -> None:
        self.n_asked += 1
        raise StoreUnavailableError("No.")

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        self.n_asked += 1
        raise StoreUnavailableError("No.")

    def close(self) -> None: ...


def test_a_store_that_fails_is_left_alone_for_a_while(tokenizer: Tokenizer, network: LanguageModel) -> None:
    store = FailingStore()
    texts, told = generate(store, network, tokenizer, PROMPT, [1, 9, 9])
    assert [len(text) for _, text in texts] == [5, 5]
    assert store.n_asked == 1
    assert told.n_dropped == 4  # PROMPT at 16, 32 and 41 tokens, and [1, 9, 9]


class SlowStore(FailingStore):
    """Writes nothing until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.is_released = threading.Event()

    def put(self, key: bytes, data: bytes) -> None:
        self.is_released.wait()

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        return None


def test_the_engine_does_not_wait_for_a_slow_store(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.prefix_store.MAX_UNWRITTEN", 2)
    engine, told, store = LLMEngine(random_model(tiny_config()), tokenizer), Recorder(), SlowStore()
    stored = StoredPrefixes(store, engine.prefix_cache, engine.state_files, engine.config, told.on_drop)
    stored.start()
    engine.prefix_cache.max_bytes = engine.pool.nbytes // engine.pool.n_slots + 4 * 400  # of logits
    for i in range(10):
        engine.add_request(Request(str(i), [1, 60 + i, 7], SamplingParams(temperature=0, max_tokens=1)))
        while engine.has_work:
            engine.step()
    assert told.n_dropped >= 10 - 1 - 1 - 2  # one is in the cache, one with the writer, two wait
    store.is_released.set()
    stored.close()
