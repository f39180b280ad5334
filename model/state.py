"""The recurrent state of a batch of sequences: what decoding carries from token to token.

Shapes: B sequences, H keys per token, D features per key (H * D = d_model), W = window - 1 tokens.
Everything is float32, whatever the dtype of the weights, and the size never depends on how many tokens were read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.recurrences.limits import EMPTY_REFERENCE

EMPTY_KEY = float("-inf")  # exp(EMPTY_KEY + bias) is 0: a slot of the window that no token has filled yet


@dataclass(frozen=True)
class RunningSums:
    """Sums over every token that has left the window, where its bias is 0 for ever, or falls with every token.

    The value of a token is extended by a constant 1, so one tensor holds both sums of the paper's formula:
    numerator sum exp(k - reference) v in [..., :D], denominator sum exp(k - reference) in [..., D].

    reference    [B, H]      in nats; follows the largest key, see `ops.absorb`
    sums         [B, H, D+1]
    compensation [B, H, D+1] what rounding has taken from `sums` so far (Neumaier), to be added back on reading
    """

    reference: Tensor
    sums: Tensor
    compensation: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.reference, self.sums, self.compensation

    @staticmethod
    def empty(batch_size: int, n_key: int, d_key: int, device: torch.device) -> RunningSums:
        zeros = torch.zeros(batch_size, n_key, d_key + 1, device=device)
        reference = torch.full((batch_size, n_key), EMPTY_REFERENCE, device=device)
        return RunningSums(reference, zeros, zeros.clone())


@dataclass(frozen=True)
class LayerState:
    """State of one layer: the running sums, the window of tokens that still have a bias, and inputs to be mixed in.

    The window is a ring, so that a token is written once: that of position t is in slot t mod W.

    keys    [B, W, H]
    values  [B, W, H, D]
    shifted [B, S, C]    what S parts of the layer got for the last token; S is 2 for RWKV-4, otherwise 0
    """

    N_TENSORS: ClassVar[int] = 6

    running: RunningSums
    keys: Tensor
    values: Tensor
    shifted: Tensor

    @staticmethod
    def empty(
        batch_size: int, n_key: int, d_key: int, n_window: int, device: torch.device, *, n_shifted: int = 0
    ) -> LayerState:
        keys = torch.full((batch_size, n_window, n_key), EMPTY_KEY, device=device)
        values = torch.zeros(batch_size, n_window, n_key, d_key, device=device)
        shifted = torch.zeros(batch_size, n_shifted, n_key * d_key, device=device)
        return LayerState(RunningSums.empty(batch_size, n_key, d_key, device), keys, values, shifted)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.running.tensors(), self.keys, self.values, self.shifted

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor]) -> LayerState:
        reference, sums, compensation, *others = tensors
        return LayerState(RunningSums(reference, sums, compensation), *others)


@dataclass(frozen=True)
class AFTState:
    """State of a batch. Only `step_` modifies one; `forward` and `step` return a new one, so keeping theirs is a fork.

    position [B] int64, tokens read so far
    """

    position: Tensor
    layers: tuple[LayerState, ...]

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held for the whole batch."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, in a fixed order; the first dimension of each is the batch."""
        return (self.position, *(tensor for layer in self.layers for tensor in layer.tensors()))

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor]) -> AFTState:
        """The inverse of `tensors`."""
        n = LayerState.N_TENSORS
        layers = tuple(LayerState.from_tensors(tensors[i : i + n]) for i in range(1, len(tensors), n))
        return AFTState(tensors[0], layers)

    def select(self, rows: slice) -> AFTState:
        """The sequences at `rows`, as views."""
        return AFTState.from_tensors([tensor[rows] for tensor in self.tensors()])

    def copy_(self, source: AFTState) -> None:
        """Overwrite every row; a source of one sequence goes to all of them."""
        for slot, tensor in zip(self.tensors(), source.tensors(), strict=True):
            slot.copy_(tensor)

    def clone(self) -> AFTState:
        """A copy that shares no memory and holds no more than its size, in one block: kept by the thousand, states in
        many small pieces would fragment the heap.
        """
        position, *parts = self.tensors()
        block = torch.cat([part.flatten() for part in parts])
        pieces = torch.split(block, [part.numel() for part in parts])
        copies = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return AFTState.from_tensors([position.clone(), *copies])

    @staticmethod
    def concatenate(states: Sequence[AFTState]) -> AFTState:
        """One batch of all sequences of `states`, in order."""
        return AFTState.from_tensors([torch.cat(parts) for parts in zip(*(s.tensors() for s in states), strict=True)])
