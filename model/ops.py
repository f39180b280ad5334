"""The verbs that a block is described by, and PyTorch's implementation of them.

A family describes each of its blocks once, over these verbs; a backend is an implementation of them. PyTorch's, here,
runs at once and is differentiable; the native backend's writes a list of kernels. Neither knows the families.

Shapes: B sequences, T tokens, C = d_model. X is the backend's own form of rows of tokens: here a tensor [B, T, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import Activation
from model.kernel import Program, Rows

X = TypeVar("X")
Matrix = nn.Linear | nn.Embedding  # y = x W^T + bias; an embedding has none


class Recurrence(nn.Module):
    """What lies between two matrix products of a block and carries a state; a family's own, with its parameters.

    rows: what `Ops.recur` was given; layer: the state, a NamedTuple of the family; position [B] of the first token.
    """

    functions: tuple[str, ...] = ()  # the C functions that `write` calls; none if only PyTorch runs it

    def parallel(self, rows: Sequence[Tensor], layer: Any, position: Tensor, starts: bool) -> tuple[Tensor, Any]:
        """rows [B, T, ...] -> y [B, T, C] and the layer after it, which may share nothing that was given.

        starts: no token came before, the layer is empty, and position [1] is every sequence's.
        """
        raise NotImplementedError

    def step_(self, rows: Sequence[Tensor], layer: Any, position: Tensor) -> Tensor:
        """One token: rows [B, ...] -> y [B, C]; the layer becomes that after it, in place."""
        raise NotImplementedError

    def write(self, rows: Sequence[Rows], layer: Any, program: Program) -> Rows:
        """Add the kernels that do the same to a program; the layer is stepped in place."""
        raise NotImplementedError


class Ops(Protocol[X]):
    def embed(self, table: nn.Embedding, positions: nn.Embedding | None = None) -> X:
        """The embeddings of the tokens, and those of their positions, if there are some."""

    def norm(self, x: X, norm: nn.LayerNorm) -> X:
        """Layer norm."""

    def linear(self, x: X, matrix: Matrix, activation: Activation = Activation.NONE, *, adds_to: X | None = None) -> X:
        """activation(x W^T + bias), or that added to `adds_to`, whose place it takes."""

    def split(self, x: X, widths: Sequence[int]) -> Sequence[X]:
        """The columns of x in parts."""

    def beside(self, *pairs: tuple[X, Matrix]) -> Sequence[X]:
        """The product of each pair, side by side, as a recurrence wants them."""

    def shift(self, x: X, mix: Tensor, shifted: Tensor, part: int) -> tuple[Sequence[X], Tensor]:
        """m x_t + (1 - m) x_{t-1} for each row m of mix [M, C], and `shifted` after it.

        shifted [B, S, C] holds in row `part` what x was for the last token.
        """

    def add_gated(self, x: X, gate: X, y: X) -> X:
        """x + sigmoid(gate) y"""

    def recur(self, recurrence: Recurrence, *rows: X, layer: Any) -> tuple[X, Any]:
        """What the recurrence gives for the rows, and the layer after them."""


class EagerOps:
    """PyTorch, at once.

    token_ids [B, T] at position [B]; starts: no token came before; in_place: T is 1, and the layers that are given
    become those after it.
    """

    def __init__(self, token_ids: Tensor, position: Tensor, *, starts: bool = False, in_place: bool = False) -> None:
        self.token_ids, self.position, self.starts, self.in_place = token_ids, position, starts, in_place

    def embed(self, table: nn.Embedding, positions: nn.Embedding | None = None) -> Tensor:
        x: Tensor = table(self.token_ids)
        if positions is None:
            return x
        n_tokens = self.token_ids.shape[1]
        added: Tensor = positions(self.position[:, None] + torch.arange(n_tokens, device=x.device))
        return x + added

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        y: Tensor = norm(x)
        return y

    def linear(
        self, x: Tensor, matrix: Matrix, activation: Activation = Activation.NONE, *, adds_to: Tensor | None = None
    ) -> Tensor:
        y = F.linear(x, matrix.weight, matrix.bias if isinstance(matrix, nn.Linear) else None)
        if activation is Activation.GELU:
            y = F.gelu(y)
        elif activation is Activation.RELU_SQUARED:
            y = torch.relu(y).square()
        return y if adds_to is None else adds_to + y

    def split(self, x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(widths), -1)

    def beside(self, *pairs: tuple[Tensor, Matrix]) -> Sequence[Tensor]:
        return [self.linear(x, matrix) for x, matrix in pairs]

    def shift(self, x: Tensor, mix: Tensor, shifted: Tensor, part: int) -> tuple[Sequence[Tensor], Tensor]:
        before = torch.cat([shifted[:, part].to(x.dtype).unsqueeze(1), x[:, :-1]], 1)
        shifted = shifted if self.in_place else shifted.clone()
        shifted[:, part] = x[:, -1]
        return [x * m + before * (1 - m) for m in mix], shifted

    def add_gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return x + torch.sigmoid(gate) * y

    def recur(self, recurrence: Recurrence, *rows: Tensor, layer: Any) -> tuple[Tensor, Any]:
        if self.in_place:
            return self.step_(recurrence, [row[:, 0] for row in rows], layer).unsqueeze(1), layer
        # From the start, every sequence is at position 0, and what depends on that serves the whole batch.
        position = self.position[:1] if self.starts else self.position
        return recurrence.parallel(rows, layer, position, self.starts)

    def step_(self, recurrence: Recurrence, rows: Sequence[Tensor], layer: Any) -> Tensor:
        """For backends that have a faster one."""
        return recurrence.step_(rows, layer, self.position)
