from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model import State
from server.engine.state_pool import StatePool
from tests.conftest import random_model, tiny_config

MODEL = random_model(tiny_config(n_layer=1))
EMPTY = MODEL.init_state(1)


def state_of(value: int) -> State:
    return EMPTY.like(torch.full_like(tensor, value) for tensor in EMPTY.tensors())


def value_of(state: State) -> int:
    (value,) = {float(value) for tensor in state.tensors() for value in tensor.flatten()}
    return int(value)


@given(st.lists(st.none() | st.integers(0, 4), max_size=40))
def test_rows_follow_the_list_of_their_owner(operations: list[int | None]) -> None:
    """None appends; a number removes that row, as the engine does it in its own list."""
    pool = StatePool(EMPTY, 5)
    owners: list[int] = []
    for value, row in enumerate(operations):
        if row is None and len(owners) < 5:
            assert pool.append(state_of(value)) == len(owners)
            owners.append(value)
        elif row is not None and row < len(owners):
            pool.remove(row)
            last = owners.pop()
            if row < len(owners):
                owners[row] = last
        assert len(pool) == len(owners)
        assert [value_of(pool.snapshot(i)) for i in range(len(pool))] == owners


def test_a_view_shares_memory_and_a_snapshot_does_not() -> None:
    pool = StatePool(EMPTY, 3)
    pool.append(state_of(1))
    view, snapshot = pool.states.select(slice(0, 1)), pool.snapshot(0)
    pool.write(state_of(2))
    assert (value_of(view), value_of(snapshot)) == (2, 1)
    assert snapshot.nbytes == EMPTY.nbytes == pool.nbytes // 3


def test_unused_rows_hold_finite_states() -> None:
    """A batch-invariant step decodes them as well."""
    logits, _ = MODEL.step(torch.zeros(3, dtype=torch.long), StatePool(EMPTY, 3).states)
    assert torch.isfinite(logits).all()
