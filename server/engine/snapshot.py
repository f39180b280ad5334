"""The state after some tokens, kept to go on from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.state import AFTState


@dataclass(frozen=True)
class Snapshot:
    """The state [1, ...] after a sequence, and the logits [V] of the token that follows, if they were computed."""

    state: AFTState
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (self.logits.nbytes if self.logits is not None else 0)
