"""Preallocated states of the sequences being decoded."""

from __future__ import annotations

from model.state import State


class StatePool:
    """`n_slots` states in one block of memory each. Rows 0 .. len(pool)-1 are in use, so a batch is a view.

    Who uses a row keeps its own list in the same order: `append` adds at the end, and `remove` moves the last row
    into the one that it frees.
    """

    def __init__(self, empty: State, n_slots: int) -> None:
        """empty: the state of one sequence before its first token."""
        self.n_slots, self._empty = n_slots, empty
        self.states = State.concatenate([empty] * n_slots)
        self._n_used = 0

    def __len__(self) -> int:
        return self._n_used

    @property
    def nbytes(self) -> int:
        return self.states.nbytes

    def append(self, state: State) -> int:
        """Copy the state of one sequence in; returns its row."""
        assert self._n_used < self.n_slots, "a sequence was admitted without a slot"
        row = self._n_used
        self.write(state, row)
        self._n_used += 1
        return row

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its place, and the first free row is empty again."""
        last = self._n_used - 1
        assert 0 <= row <= last
        if row != last:
            self.write(self.states.select(slice(last, last + 1)), row)
        self.write(self._empty, last)
        self._n_used = last

    def write(self, states: State, row: int = 0) -> None:
        """Overwrite the rows from `row` on with a batch of states."""
        self.states.select(slice(row, row + states.batch_size)).copy_(states)

    def snapshot(self, row: int) -> State:
        """A copy of one row."""
        return self.states.select(slice(row, row + 1)).clone()
