"""States after prefixes that were read before, so that they need not be read again."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.engine.snapshot import SEGMENT, Key, KeyHash, Snapshot


@dataclass(frozen=True)
class Prefix:
    """A snapshot and its key. is_lasting: a later prompt may be looked for at its length, so a store may keep it."""

    key: Key
    snapshot: Snapshot
    is_lasting: bool = True


class PrefixCache:
    """Snapshots by their names, least recently used out first, within a budget of bytes.

    A state cannot be rolled back, so a prefix is found only where a snapshot was taken. Requests find only snapshots
    of their own beginning and salt. on_evict: told of each prefix that the budget puts out.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.on_evict: Callable[[Prefix], None] | None = None
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        # Lengths of prefixes by the segment that they end in: only those are hashed that a prompt may have.
        self._lengths: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        """Least recently used first."""
        return iter(self._prefixes.values())

    def put(self, prefix: Prefix) -> None:
        """Keep a snapshot, unless it alone exceeds the budget. It must not be modified later."""
        key, snapshot = prefix.key, prefix.snapshot
        if snapshot.nbytes > self.max_bytes or not key.length:
            return
        if key.name in self._prefixes and snapshot.logits is None:  # the one there is as good, or better
            self._prefixes.move_to_end(key.name)
            return
        self._drop(key.name)
        self._prefixes[key.name] = prefix
        self._lengths[key.segment][key.length] += 1
        self.nbytes += snapshot.nbytes
        while self.nbytes > self.max_bytes:
            evicted = self._drop(next(iter(self._prefixes)))
            if evicted and self.on_evict:
                self.on_evict(evicted)

    def match(self, token_ids: array[int], beginning: KeyHash, multiple_of: int = 1) -> Prefix | None:
        """The longest prefix from which `token_ids`, read after `beginning`, can go on.

        All of `token_ids` match only a snapshot with logits; shorter prefixes must be a multiple of `multiple_of`.
        """
        n_tokens, key, passed = len(token_ids), beginning.copy(), []
        for start in range(0, n_tokens, SEGMENT):
            if lengths := self._lengths.get(key.name):
                passed.append((start, key.copy(), lengths))
            key.read(token_ids[start : start + SEGMENT])
        for start, key, lengths in reversed(passed):
            found = None
            for length in sorted(lengths):
                if length == n_tokens or (length < n_tokens and length % multiple_of == 0):
                    key.read(token_ids[start:length])
                    start = length
                    found = self._usable(key.name, n_tokens) or found
            if found:
                self._prefixes.move_to_end(found.key.name)
                return found
        return None

    def longer_than_cached(self, token_ids: array[int], beginning: KeyHash, multiple_of: int) -> list[Key]:
        """Keys of prefixes, longest first, down to the first that is here: all of the tokens, and multiples.

        May be called from any thread.
        """
        n_tokens, key = len(token_ids), beginning.copy()
        parts = (token_ids[start : start + multiple_of] for start in range(0, n_tokens, multiple_of))
        keys = [key.read(part).key for part in parts]
        wanted: list[Key] = []
        for candidate in reversed(keys):
            if self._usable(candidate.name, n_tokens):
                break
            wanted.append(candidate)
        return wanted

    def _usable(self, name: bytes, n_tokens: int) -> Prefix | None:
        prefix = self._prefixes.get(name)
        can_go_on = prefix is not None and (prefix.key.length < n_tokens or prefix.snapshot.logits is not None)
        return prefix if can_go_on else None

    def _drop(self, name: bytes) -> Prefix | None:
        prefix = self._prefixes.pop(name, None)
        if prefix is not None:
            self.nbytes -= prefix.snapshot.nbytes
            lengths = self._lengths[prefix.key.segment]
            lengths[prefix.key.length] -= 1
            if not lengths[prefix.key.length]:
                del lengths[prefix.key.length]
            if not lengths:
                del self._lengths[prefix.key.segment]
        return prefix
