"""AFT as the recurrence of a block: PyTorch's two forms of it, and the calls of its kernels (kernels/aft.c).

Shapes: B sequences or rows, T tokens, C features, H keys per token, D = C / H features per key, Q queries, K keys that
they see, s = W + 1 the window. Tensors of calls are contiguous float32 but where said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.kernel import Kernel, Program, Rows, pointers, whole
from model.ops import Recurrence
from model.recurrences.aft_functions import Sums, Window, decay_factors, forward, step_
from model.recurrences.limits import KEY_BLOCK


class AFT(Recurrence):
    """sigmoid(q) * AFT(k, v), for rows q [.., C], k [.., H], v [.., C]. Its parameters are those of the position bias.

    This base class, with nothing learned, is AFT-simple. A layer has the fields of `Sums` and, for W > 0, of `Window`.
    For a float64 gradient check or a bfloat16 checkpoint alike, the bias has the dtype of its parameters.
    """

    functions: tuple[str, ...] = ("aft",)

    def __init__(self, window: int, n_key: int) -> None:
        """window = W + 1: a token at that distance or more is in the running sums; n_key = H."""
        super().__init__()
        self.window, self.n_key = window, n_key

    @property
    def decay(self) -> Tensor | None:
        """[H], nats per token by which tokens outside the window lose weight; None for 0."""
        return None

    def forward(self, n_queries: int, n_keys: int, position: Tensor) -> Tensor:
        """Bias w_{t,t'} [B or 1, H or 1, Q, K] of the last Q of K tokens; -inf where the key is later than the query.

        position [B]: absolute position of the first query.
        """
        index = torch.arange(n_keys, device=position.device)
        age = index[n_keys - n_queries :, None] - index  # [Q, K]
        bias = torch.where(age < self.window, self.learned(age, position), 0.0)
        return bias.masked_fill(age < 0, float("-inf"))

    def by_distance(self, position: Tensor) -> Tensor:
        """Bias [B or 1, s, H or 1] of the tokens at distance 0 .. s-1 before the one at position [B]."""
        distance = torch.arange(self.window, device=position.device)
        return self.learned(distance.unsqueeze(0), position)[:, :, 0].transpose(1, 2)

    def learned(self, age: Tensor, position: Tensor) -> Tensor:
        """The bias inside the window, [B or 1, H or 1, Q, K]; entries outside may hold anything finite."""
        return torch.zeros(1, 1, 1, 1, device=age.device)

    def parallel(self, rows: Sequence[Tensor], layer: Any, position: Tensor, starts: bool) -> tuple[Tensor, Any]:
        query, keys, values = rows
        running, window = state_of(layer)
        if starts:
            running, window = Sums(*(tensor.clone() for tensor in running)), None
        y, running, window = forward(
            keys,
            self._by_key(values),
            lambda n_queries, n_keys, start: self(n_queries, n_keys, position + start),
            self.window - 1,
            position,
            running,
            window,
            self.decay,
        )
        after = running._asdict() | (window._asdict() if self.window > 1 else {})
        return torch.sigmoid(query) * y.flatten(-2).to(query.dtype), layer._replace(**after)

    def step_(self, rows: Sequence[Tensor], layer: Any, position: Tensor) -> Tensor:
        query, key, value = rows
        running, window = state_of(layer)
        y = step_(key, self._by_key(value), self.by_distance(position), position, running, window, self.decay)
        return (torch.sigmoid(query) * y.flatten(-2)).to(query.dtype)

    def write(self, rows: Sequence[Rows], layer: Any, program: Program) -> Rows:
        query, key, value = (row.tensor for row in rows)
        running, window = state_of(layer)
        bias, decay = self.write_bias(program), self.decay
        scratch = program.memory(program.n_threads, window.keys.shape[1], KEY_BLOCK) if window else None
        out = program.memory(program.n_rows, value.shape[1])
        call = AFTCall(
            query,
            key,
            value,
            program.positions,
            bias.tensor,
            None if decay is None else decay_factors(decay.detach()),
            **running._asdict(),
            keys=window.keys if window else None,
            values=window.values if window else None,
            scratch=scratch.tensor if scratch else None,
            out=out.tensor,
            one_sequence=program.one_sequence,
        )
        program.add(call)
        return out

    def write_bias(self, program: Program) -> Rows:
        """The bias by distance, for all rows or for each: [1 or n_rows, s, H or 1]."""
        return Rows(self.by_distance(torch.zeros(1, dtype=torch.long)).detach().contiguous())

    def _by_key(self, values: Tensor) -> Tensor:
        """[.., C] -> [.., H, D]"""
        return values.reshape(*values.shape[:-1], self.n_key, -1)


def state_of(layer: Any) -> tuple[Sums, Window | None]:
    """What a family's layer holds of this recurrence; no window where W = 0."""
    running = Sums(layer.reference, layer.sums, layer.compensation)
    keys = getattr(layer, "keys", None)
    return running, Window(keys, layer.values) if keys is not None and keys.shape[1] else None


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
