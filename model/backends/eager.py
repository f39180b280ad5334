"""Models run by PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.ops import EagerOps
from model.state import State


class EagerRunner:
    """A `Runner` for any device.

    Matrix products of 1 and of 32 rows add in different orders. pads: every step has as many rows as there are states,
    so that a text gets the same bits in any batch, if its prompt is always cut alike.
    """

    is_batch_invariant = False
    ops: type[EagerOps] = EagerOps

    def __init__(self, model: LanguageModel, states: State, *, pads: bool = False) -> None:
        """states: of all slots, stepped in place."""
        self._model, self._states, self._pads = model, states, pads

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        n_rows = len(token_ids)
        self._model.config.check_context(self._states.position[:n_rows], 1)
        if self._pads:
            token_ids = [*token_ids, *[0] * (self._states.batch_size - n_rows)]
        logits = self._advance(torch.tensor(token_ids, device=self._model.device))
        if self._pads:  # however often free rows are stepped, they stay within any model's reach
            self._states.position[n_rows:] = 0
        return logits[:n_rows]

    def _advance(self, token_ids: Tensor) -> Tensor:
        states = self._states.select(slice(0, len(token_ids)))
        return self._model.advance_(token_ids, states, self.ops)

    def read(self, token_ids: Sequence[int], state: State | None, n_logits: int = 0) -> tuple[Tensor, State]:
        hidden, after = self._model.hidden(torch.tensor([token_ids], device=self._model.device), state)
        rows, logits = hidden[0, len(token_ids) - n_logits :], self._model.logits
        # The last one is computed by itself, so that it does not depend on how many are asked for.
        parts = [logits(rows[:-1]), logits(rows[-1]).unsqueeze(0)] if n_logits else [logits(rows)]
        return torch.cat(parts), after.clone()
