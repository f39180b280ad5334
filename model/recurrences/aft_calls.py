"""Calls of the kernels of the AFT recurrence.

Shapes: B rows, H keys per token, D features per key, W = window - 1 tokens. Tensors are contiguous float32
but where said.
"""

from __future__ import annotations

from torch import Tensor

from model.kernel import Kernel, pointers, whole


class FactorisedBiasCall(Kernel):
    function = "factorised_bias"
    _fields_ = (*pointers("positions", "query", "key", "out"), *whole("window", "rank"))

    def __init__(self, positions: Tensor, query: Tensor, key: Tensor, out: Tensor) -> None:
        """out [B, W + 1]: u_t . v_{t-d} for t = positions [B] int64 and d = 0 .. W; query u, key v [positions, R]."""
        assert all(tensor.is_contiguous() for tensor in (positions, query, key, out))
        super().__init__(positions=positions, query=query, key=key, out=out, window=out.shape[1], rank=query.shape[1])


class AFTCall(Kernel):
    function = "aft"
    _fields_ = (
        *pointers("query", "key", "value", "positions", "bias", "decay_factors"),
        *pointers("reference", "sums", "compensation", "keys", "values", "scratch", "out"),
        *whole("n_key", "d_key", "n_window", "stride", "bias_row_stride", "bias_distance_stride", "one_sequence"),
    )

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        bias: Tensor,
        decay_factors: Tensor | None,
        *,
        reference: Tensor,
        sums: Tensor,
        compensation: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        scratch: Tensor | None,
        out: Tensor,
        one_sequence: bool,
    ) -> None:
        """out [B, H D] = sigmoid(query) AFT(key, value); the state, of one sequence or of B, becomes that after it.

        query [B, H D], key [B, H], value [B, H D] have one stride between rows: they may be columns of one tensor.
        positions [B] int64; bias by distance, [B or 1, W + 1, H or 1]; decay_factors [3, H], where sums decay.
        reference, sums, compensation, keys, values: of the state; scratch [threads, W, KEY_BLOCK]. W = 0 without keys.
        one_sequence: the rows are successive tokens of one sequence, not one token of each of B.
        """
        n_key, n_window = key.shape[1], keys.shape[1] if keys is not None else 0
        assert query.stride() == key.stride() == value.stride() == (query.stride(0), 1)
        others = (positions, bias, decay_factors, reference, sums, compensation, keys, values, scratch, out)
        assert all(tensor is None or tensor.is_contiguous() for tensor in others)
        super().__init__(
            query=query,
            key=key,
            value=value,
            positions=positions,
            bias=bias,
            decay_factors=decay_factors,
            reference=reference,
            sums=sums,
            compensation=compensation,
            keys=keys,
            values=values,
            scratch=scratch,
            out=out,
            n_key=n_key,
            d_key=query.shape[1] // n_key,
            n_window=n_window,
            stride=query.stride(0),
            bias_row_stride=bias.stride(0) if bias.shape[0] > 1 else 0,
            bias_distance_stride=bias.shape[2],
            one_sequence=one_sequence,
        )
