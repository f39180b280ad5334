"""What AFT replaces, to be compared with: multi-head attention and linear attention behind the same interface.

Shapes: B sequences, T new tokens, S tokens in all, C = d_model, H heads, D = C / H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.families.aft import AFTConfig, AFTForCausalLM
from model.ops import Recurrence
from model.state import State

Kind = Literal["attention", "linear"]


class KeyValueCache(NamedTuple):
    """keys, values [B, H, S, D]: grows with every token."""

    keys: Tensor
    values: Tensor


class LinearState(NamedTuple):
    """sums [B, H, D, D] of outer products of keys and values, keys [B, H, D] their sum."""

    sums: Tensor
    keys: Tensor


class MultiHeadAttention(Recurrence):
    """softmax(q k / sqrt(D)) v (Vaswani et al. 2017), of rows q, k, v [B, T, C]."""

    def __init__(self, n_head: int, d_head: int) -> None:
        super().__init__()
        self.n_head, self.d_head = n_head, d_head

    def parallel(self, rows: Sequence[Tensor], layer: Any, position: Tensor, starts: bool) -> tuple[Tensor, Any]:
        query, keys, values = (self.by_head(row) for row in rows)
        keys, values = torch.cat((layer.keys, keys), 2), torch.cat((layer.values, values), 2)
        n_before = keys.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(n_before)
        y = F.scaled_dot_product_attention(query, keys, values, mask if n_before else None, is_causal=not n_before)
        return y.transpose(1, 2).flatten(2), KeyValueCache(keys, values)

    def by_head(self, row: Tensor) -> Tensor:
        """[B, T, C] -> [B, H, T, D]"""
        return row.view(*row.shape[:2], self.n_head, self.d_head).transpose(1, 2)

    def empty(self, batch_size: int, device: torch.device) -> KeyValueCache | LinearState:
        empty = torch.zeros(batch_size, self.n_head, 0, self.d_head, device=device)
        return KeyValueCache(empty, empty)


class LinearAttention(MultiHeadAttention):
    """f(q) sum f(k) v / f(q) sum f(k), with f = elu + 1 (Katharopoulos et al. 2020)."""

    def parallel(self, rows: Sequence[Tensor], layer: Any, position: Tensor, starts: bool) -> tuple[Tensor, Any]:
        query, keys, values = (self.by_head(row) for row in rows)
        query, keys = F.elu(query.float()) + 1, F.elu(keys.float()) + 1
        weights = (query @ keys.transpose(-1, -2)).tril()
        numerator = weights @ values + query @ layer.sums
        denominator = weights.sum(-1, keepdim=True) + query @ layer.keys.unsqueeze(-1)
        after = LinearState(layer.sums + keys.transpose(-1, -2) @ values, layer.keys + keys.sum(-2))
        return (numerator / denominator).to(rows[0].dtype).transpose(1, 2).flatten(2), after

    def empty(self, batch_size: int, device: torch.device) -> LinearState:
        sums = torch.zeros(batch_size, self.n_head, self.d_head, self.d_head, device=device)
        return LinearState(sums, torch.zeros(batch_size, self.n_head, self.d_head, device=device))


KINDS: dict[Kind, type[MultiHeadAttention]] = {"attention": MultiHeadAttention, "linear": LinearAttention}


class Baseline(AFTForCausalLM):
    """AFT-simple's model, with another recurrence in the place of AFT."""

    def __init__(self, config: AFTConfig, kind: Kind, n_head: int) -> None:
        """Of the variant of config that has as many keys as a token has features."""
        super().__init__(dataclasses.replace(config, variant="simple"))
        self.recurrence = KINDS[kind](n_head, config.d_model // n_head)
        for block in self.blocks:
            block.attention.bias = self.recurrence  # type: ignore[union-attr]

    def empty_layer(self, batch_size: int, device: torch.device) -> KeyValueCache | LinearState:  # type: ignore[override]
        return self.recurrence.empty(batch_size, device)

    def step(self, token_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """A key-value cache grows, so no state is stepped in place."""
        return self.prefill(token_ids.unsqueeze(1), state)
