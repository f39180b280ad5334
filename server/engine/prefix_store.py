"""What the prefix cache cannot keep, kept in a store that outlives the process."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from server.engine.config import EngineConfig
from server.engine.prefix_cache import Prefix, PrefixCache
from server.engine.snapshot import Key, KeyHash, StateFiles
from server.errors import InvalidConversationError, StoreUnavailableError

logger = logging.getLogger(__name__)

MAX_UNWRITTEN = 64  # prefixes; beyond them, what is evicted is dropped
MAX_CANDIDATES = 4096  # prefixes of a prompt that are looked for
FINDERS = 4  # threads
LOOK_UP_SECONDS = 2.0  # more than a store takes to give up by itself
PAUSE_SECONDS = 10.0  # for which a store that failed is left alone


class PrefixStore(Protocol):
    """Bytes by key within a budget, least recently used out first. Called from several threads.

    A store that fails raises StoreUnavailableError.
    """

    def put(self, key: bytes, data: bytes) -> None:
        """Keep data, unless it alone exceeds the budget."""

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        """The first of keys that is there: its index and its data."""

    def close(self) -> None:
        """Let go of files and connections."""


class StoredPrefixes:
    """The second level of an engine's prefix cache, which goes there when it is evicted, and at `close`.

    The engine's thread never waits for the store: a thread writes, and `find` is for the threads of requests. A prompt
    is looked for as a whole and at multiples of chunk_size. on_drop: told of each prefix that could not be stored.
    """

    def __init__(
        self,
        store: PrefixStore,
        cache: PrefixCache,
        files: StateFiles,
        config: EngineConfig,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._cache, self._files, self._on_drop = store, cache, files, on_drop
        self._chunk_size = config.chunk_size
        # Other chunks, or states that were decoded in other batches, give other last bits.
        self._settings = f"{config.chunk_size} {config.batch_invariant} ".encode()
        self._unwritten: queue.Queue[Prefix | None] = queue.Queue(MAX_UNWRITTEN)
        self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
        # A store that hangs must not hold up those who render and tokenise in threads.
        self._finders = ThreadPoolExecutor(FINDERS, thread_name_prefix="prefix-finder")
        self._paused_until = 0.0

    def start(self) -> None:
        self._cache.on_evict = self._on_evict
        self._writer.start()

    async def look_up(self, token_ids: array[int], beginning: KeyHash) -> Prefix | None:
        """As `find`, in a thread of its own, and not for long: reading the prompt would be done meanwhile."""
        finding = asyncio.get_running_loop().run_in_executor(self._finders, self.find, token_ids, beginning)
        try:
            return await asyncio.wait_for(finding, LOOK_UP_SECONDS)
        except TimeoutError:
            self._pause()
            return None

    def find(self, token_ids: array[int], beginning: KeyHash) -> Prefix | None:
        """The longest stored prefix that is longer than what the cache has."""
        wanted = [] if self._is_paused else self._cache.longer_than_cached(token_ids, beginning, self._chunk_size)
        candidates = [
            (key, has_logits)
            for key in wanted[:MAX_CANDIDATES]
            for has_logits in (True, False)
            if has_logits or key.length < len(token_ids)
        ]
        if not candidates:
            return None
        try:
            found = self._store.find([self._name(key, has_logits) for key, has_logits in candidates])
        except StoreUnavailableError:
            self._pause()
            return None
        if found is None:
            return None
        index, data = found
        return self._parse(data, *candidates[index])

    def close(self) -> None:
        """Store what the cache holds, once the engine's thread has ended, and close the store."""
        for prefix in self._cache:
            if prefix.is_lasting:
                self._unwritten.put(prefix)
        self._unwritten.put(None)
        self._writer.join()
        self._finders.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS

    def _name(self, key: Key, has_logits: bool) -> bytes:
        """A whole prompt goes on only from a snapshot with logits, so one without must not take its place."""
        return self._settings + key.name + (b"+" if has_logits else b"-")

    def _parse(self, data: bytes, key: Key, has_logits: bool) -> Prefix | None:
        try:
            snapshot, unread_ids = self._files.read(data, self._name(key, has_logits))
        except InvalidConversationError as error:
            logger.warning("A stored prefix is not used: %s", error)
            return None
        if (int(snapshot.state.position), unread_ids, snapshot.logits is not None) != (key.length, (), has_logits):
            logger.warning("A stored prefix is not used: It is what follows other tokens.")
            return None
        return Prefix(key, replace(snapshot, name=key.name))

    def _on_evict(self, prefix: Prefix) -> None:
        """In the engine's thread."""
        if not prefix.is_lasting:
            return
        try:
            self._unwritten.put_nowait(prefix)
        except queue.Full:
            self._on_drop()

    def _write_all(self) -> None:
        while prefix := self._unwritten.get():
            if not self._write(prefix):
                self._on_drop()

    def _write(self, prefix: Prefix) -> bool:
        if self._is_paused:
            return False
        snapshot = prefix.snapshot
        try:
            name = self._name(prefix.key, snapshot.logits is not None)
            self._store.put(name, self._files.write(snapshot, key=name))
        except StoreUnavailableError:
            self._pause()
            return False
        except Exception:  # `close` waits for this thread
            logger.exception("A prefix could not be stored.")
            return False
        return True
