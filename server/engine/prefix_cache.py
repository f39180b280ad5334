"""States after prefixes that were read before, so that they need not be read again."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from server.engine.snapshot import Snapshot


class PrefixCache:
    """Snapshots by token ids, least recently used out first, within a budget of bytes.

    A state cannot be rolled back, so a prefix is found only where a snapshot was taken. Keys are digests of the token
    ids, of the model's fingerprint and of a salt; requests see only snapshots of their own salt. Long sequences of ids
    are hashed fastest as array("i").
    """

    def __init__(self, max_bytes: int, fingerprint: bytes = b"") -> None:
        self.max_bytes, self._fingerprint = max_bytes, fingerprint
        self._snapshots: OrderedDict[bytes, tuple[int, Snapshot]] = OrderedDict()  # by digest: length, snapshot
        self._lengths: Counter[int] = Counter()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._snapshots)

    def put(self, token_ids: Sequence[int], snapshot: Snapshot, salt: str = "") -> None:
        """Keep the snapshot after `token_ids`, unless it alone exceeds the budget. It must not be modified later."""
        if snapshot.nbytes > self.max_bytes or not token_ids:
            return
        (key,) = self._digests(token_ids, [len(token_ids)], salt)
        if key in self._snapshots and snapshot.logits is None:  # the one there is as good, or better
            self._snapshots.move_to_end(key)
            return
        self._drop(key)
        self._snapshots[key] = len(token_ids), snapshot
        self._lengths[len(token_ids)] += 1
        self.nbytes += snapshot.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._snapshots)))

    def match(self, token_ids: Sequence[int], salt: str = "", multiple_of: int = 1) -> tuple[int, Snapshot | None]:
        """The longest prefix with a snapshot from which `token_ids` can go on, as (length, snapshot) or (0, None).

        All of `token_ids` match only a snapshot with logits; shorter prefixes must be a multiple of `multiple_of`.
        """
        n_tokens = len(token_ids)
        lengths = sorted(n for n in self._lengths if n == n_tokens or (n < n_tokens and n % multiple_of == 0))
        for key in reversed(self._digests(token_ids, lengths, salt)):
            length, snapshot = self._snapshots.get(key, (0, None))
            if snapshot is not None and (length < n_tokens or snapshot.logits is not None):
                self._snapshots.move_to_end(key)
                return length, snapshot
        return 0, None

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        return self._digests(token_ids, [len(token_ids)], "")[0] in self._snapshots

    def clear(self) -> None:
        self._snapshots.clear()
        self._lengths.clear()
        self.nbytes = 0

    def _drop(self, key: bytes) -> None:
        if key in self._snapshots:
            length, snapshot = self._snapshots.pop(key)
            self.nbytes -= snapshot.nbytes
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]

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
