"""The recurrent state of a batch of sequences: what decoding carries from token to token.

What a layer keeps is its family's own: a NamedTuple of tensors, whose first dimension is the batch. Everyone else sees
tensors with a batch in front. All are float32 but the position, whatever the dtype of the weights, and their size never
depends on how many tokens were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

Layer = tuple[Tensor, ...]  # a NamedTuple of a family


@dataclass(frozen=True)
class State:
    """State of a batch. Only `step_` modifies one; `forward` and `step` return a new one, so keeping theirs is a fork.

    position [B] int64, tokens read so far; layers: of each block, [B, ...]
    """

    position: Tensor
    layers: tuple[Layer, ...]

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held for the whole batch."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, in a fixed order; the first dimension of each is the batch."""
        return (self.position, *(tensor for layer in self.layers for tensor in layer))

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in files: "position", and the family's own as "layers.3.sums"."""
        named = {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in zip(layer._fields, layer, strict=True)  # type: ignore[attr-defined]
        }
        return {"position": self.position, **named}

    def like(self, tensors: Iterable[Tensor]) -> State:
        """A state of this form of other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        position = next(rest)
        return State(position, tuple(type(layer)._make(islice(rest, len(layer))) for layer in self.layers))  # type: ignore[attr-defined]

    def select(self, rows: slice) -> State:
        """The sequences at `rows`, as views."""
        return self.like(tensor[rows] for tensor in self.tensors())

    def expand(self, batch_size: int) -> State:
        """The state of one sequence as that of many, as views of one memory: to be read only."""
        return self.like(tensor.expand(batch_size, *tensor.shape[1:]) for tensor in self.tensors())

    def copy_(self, source: State) -> None:
        """Overwrite every row; a source of one sequence goes to all of them."""
        for slot, tensor in zip(self.tensors(), source.tensors(), strict=True):
            slot.copy_(tensor)

    def clone(self) -> State:
        """A copy that shares no memory and holds no more than its size, in one block: kept by the thousand, states in
        many small pieces would fragment the heap.
        """
        position, *parts = self.tensors()
        block = torch.cat([part.flatten() for part in parts])
        pieces = torch.split(block, [part.numel() for part in parts])
        copies = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return self.like([position.clone(), *copies])

    @staticmethod
    def concatenate(states: Sequence[State]) -> State:
        """One batch of all sequences of `states`, in order."""
        return states[0].like([torch.cat(parts) for parts in zip(*(s.tensors() for s in states), strict=True)])
