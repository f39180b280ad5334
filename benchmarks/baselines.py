"""What AFT replaces, to be compared with: multi-head attention and linear attention behind the same interface.

Shapes: B sequences, T new tokens, S tokens in all, C = d_model, H heads, D = C / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import AFTConfig
from model.transformer import AFTForCausalLM

Baseline = Literal["attention", "linear"]


@dataclass
class KeyValueCache:
    """keys, values [B, H, S, D]: grows with every token."""

    keys: Tensor
    values: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values


@dataclass
class LinearState:
    """sums [B, H, D, D] of outer products of keys and values, keys [B, H, D] their sum."""

    sums: Tensor
    keys: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.sums, self.keys


class MultiHeadAttention(nn.Module):
    """softmax(q k / sqrt(D)) v (Vaswani et al. 2017)."""

    def __init__(self, config: AFTConfig, n_head: int) -> None:
        super().__init__()
        self.n_head, self.d_head = n_head, config.d_model // n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, position: Tensor, state: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        query, keys, values = self.heads(x)
        if state is not None:
            keys, values = torch.cat((state.keys, keys), 2), torch.cat((state.values, values), 2)
        n_before = keys.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=x.device).tril(n_before)
        y = F.scaled_dot_product_attention(query, keys, values, mask if n_before else None, is_causal=not n_before)
        return self.out(y.transpose(1, 2).flatten(2)), KeyValueCache(keys, values)

    def step_(self, x: Tensor, position: Tensor, state: KeyValueCache) -> Tensor:
        y, after = self(x.unsqueeze(1), position, state)
        vars(state).update(vars(after))
        return y.squeeze(1)  # type: ignore[no-any-return]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] -> query, keys, values [B, H, T, D]"""
        query, keys, values = self.qkv(x).unflatten(-1, (3, self.n_head, self.d_head)).permute(2, 0, 3, 1, 4)
        return query, keys, values

    def init_state(self, batch_size: int, device: torch.device) -> KeyValueCache:
        empty = torch.zeros(batch_size, self.n_head, 0, self.d_head, device=device)
        return KeyValueCache(empty, empty)


class LinearAttention(MultiHeadAttention):
    """f(q) sum f(k) v / f(q) sum f(k), with f = elu + 1 (Katharopoulos et al. 2020)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, position: Tensor, state: LinearState | None
    ) -> tuple[Tensor, LinearState]:
        query, keys, values = self.heads(x)
        query, keys = F.elu(query.float()) + 1, F.elu(keys.float()) + 1
        state = state or self.init_state(x.shape[0], x.device)
        weights = (query @ keys.transpose(-1, -2)).tril()
        numerator = weights @ values + query @ state.sums
        denominator = weights.sum(-1, keepdim=True) + query @ state.keys.unsqueeze(-1)
        after = LinearState(state.sums + keys.transpose(-1, -2) @ values, state.keys + keys.sum(-2))
        return self.out((numerator / denominator).to(x.dtype).transpose(1, 2).flatten(2)), after

    def init_state(self, batch_size: int, device: torch.device) -> LinearState:  # type: ignore[override]
        sums = torch.zeros(batch_size, self.n_head, self.d_head, self.d_head, device=device)
        return LinearState(sums, torch.zeros(batch_size, self.n_head, self.d_head, device=device))


def with_baseline(config: AFTConfig, kind: Baseline, n_head: int) -> AFTForCausalLM:
    """The model of `config` with another layer in the place of AFT."""
    model = AFTForCausalLM(config)
    layer = {"attention": MultiHeadAttention, "linear": LinearAttention}[kind]
    residual_std = 0.02 / math.sqrt(2 * config.n_layer)
    for block in model.blocks:
        attention = layer(config, n_head)
        for linear, std in ((attention.qkv, 0.02), (attention.out, residual_std)):  # as AFT's own are initialised
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        block.attention = attention
    return model
