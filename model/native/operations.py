"""Operations of kernels.c, one function for each kind. Tensors are contiguous float32 but where said."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from model import ops
from model.native.library import Operation
from model.state import LayerState

BLOCK = 64  # as in kernels.c


class Kind(IntEnum):
    """As in kernels.c."""

    EMBED, NORM, LINEAR, FACTORISED_BIAS, AFT, TOKEN_SHIFT, ADD_GATED = range(7)


class Format(IntEnum):
    """Of a matrix."""

    FLOAT32, INT8, BFLOAT16 = range(3)


FORMATS = {torch.float32: Format.FLOAT32, torch.int8: Format.INT8, torch.bfloat16: Format.BFLOAT16}


class Activation(IntEnum):
    NONE, GELU, RELU_SQUARED = range(3)


def embed(ids: Tensor, table: Tensor, positions: Tensor, position_table: Tensor | None, output: Tensor) -> Operation:
    """output [B, C] = rows of table [V, C], plus those of position_table, if there is one; ids, positions [B] int64."""
    n = [table.shape[1], FORMATS[table.dtype]]
    return _operation(Kind.EMBED, n, output, input=ids, input2=positions, weights=[table, position_table])


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, output: Tensor) -> Operation:
    """Layer norm of x [B, C]."""
    return _operation(Kind.NORM, [x.shape[-1]], output, input=x, weights=[weight, bias], eps=eps)


def linear(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    *,
    activation: Activation = Activation.NONE,
    adds: bool = False,
) -> Operation:
    """output [B, N] = activation(x [B, K] W^T * scale + bias), or that added to it. W as `PackedLinear` has it.

    The output may be columns of a wider tensor.
    """
    n_in = x.shape[-1]
    n = [output.shape[-1], n_in, n_in, output.stride(-2), activation, FORMATS[panels.dtype], adds]
    return _operation(Kind.LINEAR, n, output, input=x, weights=[panels, scale, bias])


def factorised_bias(positions: Tensor, query: Tensor, key: Tensor, output: Tensor) -> Operation:
    """output [B, s]: u_t . v_{t-d} for t = positions [B] int64 and d = 0 .. s-1; query (u), key (v) [positions, R]."""
    return _operation(
        Kind.FACTORISED_BIAS, [output.shape[1], query.shape[1]], output, input=positions, weights=[query, key]
    )


def aft(
    qkv: Tensor,
    positions: Tensor,
    bias: Tensor,
    state: LayerState,
    scratch: Tensor,
    output: Tensor,
    *,
    decay: Tensor | None = None,
    one_sequence: bool = False,
) -> Operation:
    """output [B, C] = sigmoid(q) AFT(k, v), in place of `ops.step_` and the gate.

    qkv [B, C + H + C]; bias by distance, [B or 1, W + 1, H or 1]; scratch [threads, W, BLOCK]; decay [H], of the sums;
    one_sequence: the rows are successive tokens of one sequence, whose state it is, and not one token of each of B.
    """
    _, n_window, n_key, d_key = state.values.shape
    n = [n_key, d_key, n_window, bias.stride(0) if bias.shape[0] > 1 else 0, bias.shape[2], one_sequence]
    *of_sums_and_window, _ = state.tensors()
    weights = [bias, None if decay is None else ops.decay_factors(decay)]
    states = [*of_sums_and_window, scratch]
    return _operation(Kind.AFT, n, output, input=qkv, input2=positions, weights=weights, state=states)


def token_shift(
    x: Tensor, mix: Tensor, state: LayerState, part: int, output: Tensor, *, one_sequence: bool = False
) -> Operation:
    """output [M, B, C] = mix * x + (1 - mix) * what came a token before x [B, C], for M mixes [M, C].

    That comes from the row `part` of the state's `shifted`, where the last of x replaces it. Rows as of `aft`.
    """
    last = state.shifted[:, part]
    n = [x.shape[1], len(mix), output.shape[1], state.shifted.stride(0), one_sequence]
    operation = _operation(Kind.TOKEN_SHIFT, n, output, input=x, weights=[mix])
    operation.state[0] = last.data_ptr()
    operation.keep += [last]
    return operation


def add_gated(gate: Tensor, x: Tensor, output: Tensor) -> Operation:
    """output [B, C] += sigmoid(gate) * x"""
    return _operation(Kind.ADD_GATED, [x.shape[1]], output, input=gate, input2=x, weights=[])


def _operation(
    kind: Kind,
    n: list[int],
    output: Tensor,
    *,
    input: Tensor,  # noqa: A002
    input2: Tensor | None = None,
    weights: list[Tensor | None],
    state: list[Tensor] | None = None,
    eps: float = 0.0,
) -> Operation:
    tensors = [input, input2, *weights, *(state or [])]
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    assert output.stride(-1) == 1
    tensors.append(output)
    operation = Operation(kind=kind, eps=eps, output=output.data_ptr(), input=input.data_ptr())
    operation.n[: len(n)] = n
    operation.input2 = _address(input2)
    for field, values in ((operation.weights, weights), (operation.state, state or [])):
        for i, tensor in enumerate(values):
            field[i] = _address(tensor)
    operation.keep = tensors
    return operation


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
