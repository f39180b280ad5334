"""Calls of the kernels that models of every family are made of.

Shapes: B rows, C features of each. Tensors are contiguous float32 but where said.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.activation import Activation
from model.kernel import Kernel, pointers, real, whole


class Embed(Kernel):
    function = "embed"
    _fields_ = (*pointers("ids", "positions", "table", "added", "out"), *whole("width", "is_bfloat16"))

    def __init__(self, ids: Tensor, table: Tensor, positions: Tensor, added: Tensor | None, out: Tensor) -> None:
        """out [B, C] = rows of table [V, C], float32 or bfloat16, at ids [B] int64, plus those of added [positions, C],
        if there is one, at positions [B] int64.
        """
        is_bfloat16 = table.dtype == torch.bfloat16
        assert is_bfloat16 or table.dtype == torch.float32
        _check(ids, positions, table, added, out)
        super().__init__(
            ids=ids,
            positions=positions,
            table=table,
            added=added,
            out=out,
            width=table.shape[1],
            is_bfloat16=is_bfloat16,
        )


class Norm(Kernel):
    function = "norm"
    _fields_ = (*pointers("x", "weight", "bias", "out"), *whole("width", "stride"), *real("eps"))

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
        """out [B, C] = layer norm of x [B, C], which may be columns of a wider tensor, by weight and bias [C]."""
        _check(weight, bias, out, rows=[x])
        super().__init__(x=x, weight=weight, bias=bias, out=out, width=x.shape[1], stride=x.stride(0), eps=eps)


class Linear(Kernel):
    """Of a matrix as a `Format` has packed it; each format has a kernel of its own, linear_<name>."""

    _fields_ = (
        *pointers("x", "panels", "scale", "bias", "out"),
        *whole("n", "k", "stride", "out_stride", "activation", "adds"),
    )

    def __init__(
        self,
        x: Tensor,
        panels: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        *,
        format_name: str,
        activation: Activation = Activation.NONE,
        adds: bool = False,
    ) -> None:
        """out [B, N] = activation(x [B, K] W^T * scale [N] + bias [N]), or that added to it; W [N, K].

        x and out may be columns of wider tensors.
        """
        self.function = f"linear_{format_name}"
        _check(panels, scale, bias, rows=[x, out])
        super().__init__(
            x=x,
            panels=panels,
            scale=scale,
            bias=bias,
            out=out,
            n=out.shape[1],
            k=x.shape[1],
            stride=x.stride(0),
            out_stride=out.stride(0),
            activation=activation,
            adds=adds,
        )


class TokenShift(Kernel):
    function = "token_shift"
    _fields_ = (
        *pointers("x", "mix", "last", "out"),
        *whole("width", "n_mixes", "capacity", "last_stride", "one_sequence"),
    )

    def __init__(self, x: Tensor, mix: Tensor, last: Tensor, out: Tensor, *, one_sequence: bool) -> None:
        """out [M, B, C] = mix * x + (1 - mix) * what came one token before x [B, C], for M mixes, mix [M, C].

        That comes from last [sequences, C], where the last of x replaces it; it may be rows of a longer tensor.
        one_sequence: the rows are successive tokens of one sequence, not one token of each of B.
        """
        _check(x, mix, out, rows=[last])
        super().__init__(
            x=x,
            mix=mix,
            last=last,
            out=out,
            width=x.shape[1],
            n_mixes=len(mix),
            capacity=out.shape[1],
            last_stride=last.stride(0),
            one_sequence=one_sequence,
        )


class AddGated(Kernel):
    function = "add_gated"
    _fields_ = (*pointers("gate", "x", "out"), *whole("width"))

    def __init__(self, gate: Tensor, x: Tensor, out: Tensor) -> None:
        """out [B, C] += sigmoid(gate [B, C]) * x [B, C]"""
        _check(gate, x, out)
        super().__init__(gate=gate, x=x, out=out, width=x.shape[1])


def _check(*tensors: Tensor | None, rows: Sequence[Tensor] = ()) -> None:
    """That tensors are contiguous, and rows each for itself."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.stride(1) == 1 for tensor in rows)
