"""What the prefix cache cannot keep, kept in a store that outlives the process."""

from __future__ import annotations

import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from server.engine.conversation import Conversation
from server.engine.llm_engine import LLMEngine
from server.engine.prefix_cache import Prefix
from server.errors import InvalidConversationError, StoreUnavailableError

logger = logging.getLogger(__name__)

MAX_UNWRITTEN = 64  # prefixes; beyond them, what is evicted is dropped
MAX_CANDIDATES = 4096  # prefixes of a prompt that are looked for
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

    def __init__(self, store: PrefixStore, engine: LLMEngine, on_drop: Callable[[], None] = lambda: None) -> None:
        self._store, self._cache, self._on_drop = store, engine.prefix_cache, on_drop
        self._fingerprint, self._vocab_size = engine.fingerprint, engine.model.config.vocab_size
        self._empty = engine.model.init_state(1)
        config = engine.config
        self._chunk_size = config.chunk_size
        # Other chunks, or states that were decoded in other batches, give other last bits.
        self._settings = f"{config.chunk_size} {config.batch_invariant} ".encode()
        self._unwritten: queue.Queue[tuple[bytes, Prefix] | None] = queue.Queue(MAX_UNWRITTEN)
        self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
        self._paused_until = 0.0

    def start(self) -> None:
        self._cache.on_evict = self._on_evict
        self._writer.start()

    def find(self, token_ids: array[int], salt: str) -> tuple[bytes, Prefix] | None:
        """The longest stored prefix that is longer than what the cache has, and its key there."""
        wanted = [] if self._is_paused else self._cache.longer_than_cached(token_ids, salt, self._chunk_size)
        candidates = [
            (key, length, has_logits)
            for length, key in wanted[:MAX_CANDIDATES]
            for has_logits in (True, False)
            if has_logits or length < len(token_ids)
        ]
        if not candidates:
            return None
        try:
            found = self._store.find([self._name(key, has_logits) for key, _, has_logits in candidates])
        except StoreUnavailableError:
            self._pause()
            return None
        if found is None:
            return None
        key, length, has_logits = candidates[found[0]]
        prefix = self._parse(found[1], length, has_logits)
        return (key, prefix) if prefix else None

    def close(self) -> None:
        """Store what the cache holds, once the engine's thread has ended, and close the store."""
        for key, prefix in self._cache:
            if not prefix.is_generated:
                self._unwritten.put((key, prefix))
        self._unwritten.put(None)
        self._writer.join()
        self._store.close()

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS

    def _name(self, key: bytes, has_logits: bool) -> bytes:
        """A whole prompt goes on only from a snapshot with logits, so one without must not take its place."""
        return self._settings + key + (b"+" if has_logits else b"-")

    def _parse(self, data: bytes, length: int, has_logits: bool) -> Prefix | None:
        try:
            conversation = Conversation.from_bytes(data, self._fingerprint, self._empty, self._vocab_size)
        except InvalidConversationError as error:
            logger.warning("A stored prefix is not used: %s", error)
            return None
        snapshot = conversation.snapshot
        found = (conversation.num_tokens, conversation.unread_ids, snapshot.logits is not None)
        if found != (length, (), has_logits):
            logger.warning("A stored prefix is not used: it is another's.")
            return None
        return Prefix(length, snapshot)

    def _on_evict(self, key: bytes, prefix: Prefix) -> None:
        """In the engine's thread. The end of a text is at no length that a later prompt is looked for at."""
        if prefix.is_generated:
            return
        try:
            self._unwritten.put_nowait((key, prefix))
        except queue.Full:
            self._on_drop()

    def _write_all(self) -> None:
        while item := self._unwritten.get():
            if not self._write(*item):
                self._on_drop()

    def _write(self, key: bytes, prefix: Prefix) -> bool:
        if self._is_paused:
            return False
        try:
            data = Conversation(prefix.snapshot).to_bytes(self._fingerprint)
            self._store.put(self._name(key, prefix.snapshot.logits is not None), data)
        except StoreUnavailableError:
            self._pause()
            return False
        except Exception:  # `close` waits for this thread
            logger.exception("A prefix could not be stored.")
            return False
        return True
