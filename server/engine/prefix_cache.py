"""States after prefixes that were read before, so that they need not be read again."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.engine.snapshot import Snapshot


@dataclass(frozen=True)
class Prefix:
    """A snapshot after `length` tokens; is_generated: the last of them were generated, not given."""

    length: int
    snapshot: Snapshot
    is_generated: bool = False


class PrefixCache:
    """Snapshots by token ids, least recently used out first, within a budget of bytes.

    A state cannot be rolled back, so a prefix is found only where a snapshot was taken. Keys are digests of the token
    ids, of the model's fingerprint and of a salt; requests see only snapshots of their own salt. Long sequences of ids
    are hashed fastest as array("i"). on_evict: told, with its key, of each prefix that the budget puts out.
    """

    def __init__(self, max_bytes: int, fingerprint: bytes = b"") -> None:
        self.max_bytes, self._fingerprint = max_bytes, fingerprint
        self.on_evict: Callable[[bytes, Prefix], None] | None = None
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[tuple[bytes, Prefix]]:
        """Keys and prefixes, least recently used first."""
        return iter(self._prefixes.items())

    def put(self, token_ids: Sequence[int], snapshot: Snapshot, salt: str = "", *, is_generated: bool = False) -> None:
        """Keep the snapshot after `token_ids`, unless it alone exceeds the budget. It must not be modified later."""
        if token_ids:
            (key,) = self._digests(token_ids, [len(token_ids)], salt)
            self.insert(key, Prefix(len(token_ids), snapshot, is_generated))

    def insert(self, key: bytes, prefix: Prefix) -> None:
        """`put`, of a key that `longer_than_cached` gave."""
        if prefix.snapshot.nbytes > self.max_bytes:
            return
        if key in self._prefixes and prefix.snapshot.logits is None:  # the one there is as good, or better
            self._prefixes.move_to_end(key)
            return
        self._drop(key)
        self._prefixes[key] = prefix
        self._lengths[prefix.length] += 1
        self.nbytes += prefix.snapshot.nbytes
        while self.nbytes > self.max_bytes:
            oldest = next(iter(self._prefixes))
            evicted = self._drop(oldest)
            if evicted and self.on_evict:
                self.on_evict(oldest, evicted)

    def match(self, token_ids: Sequence[int], salt: str = "", multiple_of: int = 1) -> tuple[int, Snapshot | None]:
        """The longest prefix with a snapshot from which `token_ids` can go on, as (length, snapshot) or (0, None).

        All of `token_ids` match only a snapshot with logits; shorter prefixes must be a multiple of `multiple_of`.
        """
        n_tokens = len(token_ids)
        lengths = sorted(n for n in self._lengths if n == n_tokens or (n < n_tokens and n % multiple_of == 0))
        for key in reversed(self._digests(token_ids, lengths, salt)):
            prefix = self._prefixes.get(key)
            if prefix is not None and (prefix.length < n_tokens or prefix.snapshot.logits is not None):
                self._prefixes.move_to_end(key)
                return prefix.length, prefix.snapshot
        return 0, None

    def longer_than_cached(self, token_ids: Sequence[int], salt: str, multiple_of: int) -> list[tuple[int, bytes]]:
        """(length, key) of prefixes, longest first, down to the first that is here: all of the tokens, and multiples.

        May be called from any thread.
        """
        n_tokens = len(token_ids)
        lengths = [*range(multiple_of, n_tokens, multiple_of), n_tokens]
        wanted: list[tuple[int, bytes]] = []
        for length, key in zip(reversed(lengths), reversed(self._digests(token_ids, lengths, salt)), strict=True):
            prefix = self._prefixes.get(key)
            if prefix is not None and (length < n_tokens or prefix.snapshot.logits is not None):
                break
            wanted.append((length, key))
        return wanted

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        return self._digests(token_ids, [len(token_ids)], "")[0] in self._prefixes

    def clear(self) -> None:
        self._prefixes.clear()
        self._lengths.clear()
        self.nbytes = 0

    def _drop(self, key: bytes) -> Prefix | None:
        prefix = self._prefixes.pop(key, None)
        if prefix is not None:
            self.nbytes -= prefix.snapshot.nbytes
            self._lengths[prefix.length] -= 1
            if not self._lengths[prefix.length]:
                del self._lengths[prefix.length]
        return prefix

    def _digests(self, token_ids: Sequence[int], lengths: Sequence[int], salt: str) -> list[bytes]:
        """The key of each prefix, for rising lengths; the tokens are hashed once for all of them."""
        ids = memoryview(token_ids if isinstance(token_ids, array) else array("i", token_ids))
        person = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
        running = hashlib.blake2b(self._fingerprint, digest_size=16, person=person)
        keys, start = [], 0
        for length in lengths:
            running.update(ids[start:length])
            keys.append(running.copy().digest())
            start = length
        return keys
