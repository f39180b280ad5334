from __future__ import annotations

import random
from array import array
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine import prefix_cache, snapshot
from server.engine.prefix_cache import Prefix, PrefixCache
from server.engine.snapshot import KeyHash, Snapshot
from tests.conftest import random_model, tiny_config

STATE = random_model(tiny_config(n_layer=1)).init_state(1)
SIZE = STATE.nbytes
BEGINNING = b"a model"


def prefix(
    ids: list[int], *, logits: bool = True, salt: str = "", beginning: bytes = BEGINNING, is_lasting: bool = True
) -> Prefix:
    key = KeyHash(beginning, salt).read(ids).key
    return Prefix(key, Snapshot(STATE, torch.zeros(4) if logits else None, key.name), is_lasting)


def match(
    cache: PrefixCache, ids: list[int], *, salt: str = "", beginning: bytes = BEGINNING, multiple_of: int = 1
) -> Prefix | None:
    return cache.match(array("i", ids), KeyHash(beginning, salt), multiple_of)


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(st.lists(IDS, max_size=12), IDS, st.integers(1, 3), st.sampled_from([1, 2, 3, 256]))
def test_the_longest_usable_prefix_is_found(
    stored: list[list[int]], wanted: list[int], multiple_of: int, segment: int
) -> None:
    """However many segments of the key they go through."""
    with mock.patch.object(snapshot, "SEGMENT", segment), mock.patch.object(prefix_cache, "SEGMENT", segment):
        cache = PrefixCache(10**9)
        prefixes = {tuple(ids): prefix(ids, logits=len(ids) % 2 == 0) for ids in stored}
        for taken in prefixes.values():
            cache.put(taken)
        usable = [
            ids
            for ids, taken in prefixes.items()
            if tuple(wanted[: len(ids)]) == ids
            and (len(ids) < len(wanted) or taken.snapshot.logits is not None)
            and (len(ids) == len(wanted) or len(ids) % multiple_of == 0)
        ]
        expected = max(usable, key=len, default=())
        assert match(cache, wanted, multiple_of=multiple_of) is prefixes.get(expected)


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=40))
def test_the_least_recently_used_go_first_and_bytes_are_kept(operations: list[tuple[bool, list[int]]]) -> None:
    room = 4
    cache, model = PrefixCache(room * (SIZE + 16)), dict[tuple[int, ...], None]()
    for is_put, ids in operations:
        key = tuple(ids)
        if is_put:
            cache.put(prefix(ids))
            model.pop(key, None)
            model[key] = None
            if len(model) > room:
                del model[next(iter(model))]
        else:
            found = match(cache, ids)
            expected = max((k for k in model if key[: len(k)] == k), key=len, default=())
            assert (found.key.length if found else 0) == len(expected)
            if expected:
                del model[expected]
                model[expected] = None
        assert cache.nbytes == len(model) * (SIZE + 16) <= cache.max_bytes
        assert [one.key.name for one in cache] == [prefix(list(key)).key.name for key in model]
        assert len(cache) == len(model)


def test_logits_are_not_lost_to_a_snapshot_without_them() -> None:
    cache = PrefixCache(10**9)
    cache.put(prefix([1, 2]))
    cache.put(prefix([1, 2], logits=False))
    found = match(cache, [1, 2])
    assert found is not None
    assert found.key.length == 2


def test_salts_and_beginnings_do_not_share() -> None:
    cache = PrefixCache(10**9)
    cache.put(prefix([1, 2], salt="a"))
    assert match(cache, [1, 2, 3], salt="b") is None
    assert match(cache, [1, 2, 3]) is None
    assert match(cache, [1, 2, 3], salt="a", beginning=b"another") is None
    found = match(cache, [1, 2, 3], salt="a")
    assert found is not None
    assert found.key.length == 2


def test_what_is_too_large_is_not_kept() -> None:
    cache = PrefixCache(SIZE)
    cache.put(prefix([1]))
    assert len(cache) == 0
    cache.put(prefix([1], logits=False))
    assert cache.nbytes == SIZE
    cache.put(prefix([2], logits=False))
    assert (cache.nbytes, len(cache), match(cache, [1, 2])) == (SIZE, 1, None)


@pytest.mark.parametrize("n_cached", [100, 5_000])
def test_a_prompt_is_hashed_once_however_many_lengths_are_cached(n_cached: int) -> None:
    """Each end of a text is a length of its own; those that the prompt does not go through cost nothing."""
    chance = random.Random(0)
    cache = PrefixCache(10**12)
    for i in range(n_cached):
        cache.put(prefix([i, *chance.choices(range(400), k=chance.randrange(300, 3_000))]))
    wanted = chance.choices(range(400), k=4_000)
    cache.put(prefix(wanted[:1_000]))
    n_hashed = 0

    class Counting(KeyHash):
        def read(self, token_ids: array[int]) -> Counting:  # type: ignore[override]
            nonlocal n_hashed
            n_hashed += len(token_ids)
            return super().read(token_ids)

    found = cache.match(array("i", wanted), Counting(BEGINNING))
    assert found is not None
    assert found.key.length == 1_000
    assert n_hashed <= 4_000 + snapshot.SEGMENT


@given(st.lists(st.integers(0, 399), max_size=600), st.lists(st.integers(1, 599), max_size=4).map(sorted))
def test_a_name_does_not_depend_on_how_the_tokens_were_cut(ids: list[int], cuts: list[int]) -> None:
    parts = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, 600], strict=True)]
    key = KeyHash(BEGINNING)
    for part in parts:
        key.read(part)
    assert key.key == KeyHash(BEGINNING).read(array("i", ids)).key
