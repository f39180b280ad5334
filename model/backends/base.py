"""What an engine runs a model by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from model.state import State


class Runner(Protocol):
    """Runs one model for the states of a pool.

    is_batch_invariant: whether logits and states are bitwise the same alone, in any batch, and however a text is cut.
    """

    is_batch_invariant: bool

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        """A token for each of the first B states -> logits [B, V], valid until the next call; the states are stepped.

        Raises ContextLengthError, as `read` does.
        """

    def read(self, token_ids: Sequence[int], state: State | None, n_logits: int = 0) -> tuple[Tensor, State]:
        """Tokens of one sequence, chunk_size at most, from a state, None at the start.

        Returns the logits [n_logits, V] that follow the last n_logits of them, and the state after them, which shares
        nothing.
        """
