"""Blocks of RWKV-4 (Peng et al. 2023): AFT whose bias decays with distance, in layers that see the token before, too.

Shapes as in layers.py; here each feature has a key, H = C.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model import ops
from model.config import AFTConfig
from model.layers import DecayBias, gated_step_
from model.state import LayerState

TIME_MIX, CHANNEL_MIX = range(2)  # rows of LayerState.shifted


class TokenShift(nn.Module):
    """mix * x_t + (1 - mix) * x_{t-1}, for each of n mixes."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(0, 1, width).repeat(n, 1))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """x and what came one token before it, of one shape [..., C]"""
        return tuple((x * mix + before.to(x.dtype) * (1 - mix)) for mix in self.mix)


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """x [B, T, C] one token later; last [B, C] comes first, or 0."""
    first = torch.zeros_like(x[:, :1]) if last is None else last.to(x.dtype).unsqueeze(1)
    return torch.cat([first, x[:, :-1]], 1)


class TimeMix(nn.Module):
    """sigmoid(r) * AFT(k, v), between an input and an output projection."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        width = config.d_model
        self.shift = TokenShift(3, width)
        self.receptance, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.bias = DecayBias(config)

    def forward(self, x: Tensor, position: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x [B, T, C] -> y [B, T, C] and the state after it, with its inputs for the next token left out."""
        receptance, keys, values = self.projected(x, shifted(x, state.shifted[:, TIME_MIX] if state else None))
        bias = self.bias
        y, state = ops.forward(
            keys,
            values.unsqueeze(-1),
            lambda n_queries, n_keys, start: bias(n_queries, n_keys, position),
            0,
            position,
            state,
            bias.decay,
        )
        return self.out(torch.sigmoid(receptance) * y.squeeze(-1).to(x.dtype)), state

    def step_(self, x: Tensor, position: Tensor, state: LayerState) -> Tensor:
        """x [B, C] -> y [B, C]; the state becomes that after it."""
        last = state.shifted[:, TIME_MIX]
        receptance, key, value = self.projected(x, last)
        last.copy_(x)
        bias = self.bias.by_distance(position)
        gated = gated_step_(receptance, key, value.unsqueeze(-1), bias, position, state, self.bias.decay)
        y: Tensor = self.out(gated.to(x.dtype))
        return y

    def projected(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value, receptance = self.shift(x, before)
        return self.receptance(receptance), self.key(key), self.value(value)

    def init_state(self, batch_size: int, device: torch.device) -> LayerState:
        return LayerState.empty(batch_size, self.shift.mix.shape[1], 1, 0, device, n_shifted=2)


class ChannelMix(nn.Module):
    """sigmoid(r) * W_v relu(k)^2"""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.shift = TokenShift(2, config.d_model)
        self.receptance = nn.Linear(config.d_model, config.d_model, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x and what came one token before it, of one shape [..., C]"""
        key, receptance = self.shift(x, before)
        y: Tensor = torch.sigmoid(self.receptance(receptance)) * self.down(torch.relu(self.up(key)).square())
        return y


class RWKV4Block(nn.Module):
    """Pre-norm residual block: x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attention = TimeMix(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = ChannelMix(config)

    def forward(self, x: Tensor, position: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        normed = self.attention_norm(x)
        y, after = self.attention(normed, position, state)
        x = x + y
        fed = self.feed_forward_norm(x)
        x = x + self.feed_forward(fed, shifted(fed, state.shifted[:, CHANNEL_MIX] if state else None))
        return x, replace(after, shifted=torch.stack([normed[:, -1], fed[:, -1]], 1).float())

    def step_(self, x: Tensor, position: Tensor, state: LayerState) -> Tensor:
        x = x + self.attention.step_(self.attention_norm(x), position, state)
        fed, last = self.feed_forward_norm(x), state.shifted[:, CHANNEL_MIX]
        y: Tensor = self.feed_forward(fed, last)
        last.copy_(fed)
        return x + y
