from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.prefix_cache import PrefixCache
from server.engine.snapshot import Snapshot
from tests.conftest import random_model, tiny_config

STATE = random_model(tiny_config(n_layer=1)).init_state(1)
SIZE = STATE.nbytes


def snapshot(*, logits: bool = True) -> Snapshot:
    return Snapshot(STATE, torch.zeros(4) if logits else None)


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(st.lists(IDS, max_size=12), IDS, st.integers(1, 3))
def test_the_longest_usable_prefix_is_found(stored: list[list[int]], wanted: list[int], multiple_of: int) -> None:
    cache = PrefixCache(10**9)
    snapshots = {tuple(ids): snapshot(logits=len(ids) % 2 == 0) for ids in stored}
    for ids, taken in snapshots.items():
        cache.put(ids, taken)
    usable = [
        ids
        for ids, taken in snapshots.items()
        if tuple(wanted[: len(ids)]) == ids
        and (len(ids) < len(wanted) or taken.logits is not None)
        and (len(ids) == len(wanted) or len(ids) % multiple_of == 0)
    ]
    expected = max(usable, key=len, default=())
    assert cache.match(wanted, multiple_of=multiple_of) == (len(expected), snapshots.get(expected))


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=40))
def test_the_least_recently_used_go_first_and_bytes_are_kept(operations: list[tuple[bool, list[int]]]) -> None:
    room = 4
    cache, model = PrefixCache(room * (SIZE + 16)), dict[tuple[int, ...], None]()
    for is_put, ids in operations:
        key = tuple(ids)
        if is_put:
            cache.put(ids, snapshot())
            model.pop(key, None)
            model[key] = None
            if len(model) > room:
                del model[next(iter(model))]
        else:
            length, _ = cache.match(ids)
            expected = max((k for k in model if key[: len(k)] == k), key=len, default=())
            assert length == len(expected)
            if expected:
                del model[expected]
                model[expected] = None
        assert cache.nbytes == len(model) * (SIZE + 16) <= cache.max_bytes
        assert len(cache) == len(model)
        assert all(list(key) in cache for key in model)


def test_logits_are_not_lost_to_a_snapshot_without_them() -> None:
    cache = PrefixCache(10**9)
    cache.put([1, 2], snapshot())
    cache.put([1, 2], snapshot(logits=False))
    assert cache.match([1, 2])[0] == 2


def test_salts_and_models_do_not_share() -> None:
    cache = PrefixCache(10**9, b"one model")
    cache.put([1, 2], snapshot(), salt="a")
    assert cache.match([1, 2, 3], salt="b") == (0, None)
    assert cache.match([1, 2, 3]) == (0, None)
    assert cache.match([1, 2, 3], salt="a")[0] == 2
    other = PrefixCache(10**9, b"another")
    other.put([1, 2], snapshot())
    assert not {key for key, _ in other} & {key for key, _ in cache}


def test_what_is_too_large_is_not_kept() -> None:
    cache = PrefixCache(SIZE)
    cache.put([1], snapshot())
    assert len(cache) == 0
    cache.put([1], snapshot(logits=False))
    assert cache.nbytes == SIZE
    cache.clear()
    assert (cache.nbytes, len(cache), cache.match([1, 2])) == (0, 0, (0, None))
