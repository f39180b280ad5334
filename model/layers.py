"""Layers of an AFT decoder.

Shapes: B sequences, T tokens, C = d_model, H keys per token, D = C / H, Q queries, K keys seen by them, W = window - 1.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import ops
from model.config import AFTConfig
from model.state import LayerState

HAS_TRITON = importlib.util.find_spec("triton") is not None


class PositionBias(nn.Module):
    """w_{t,t'}: learned inside the window, 0 outside. This base class, with nothing learned, is AFT-simple.

    For a float64 gradient check or a bfloat16 checkpoint alike, the bias has the dtype of its parameters.
    """

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.window = config.bias_window

    @property
    def decay(self) -> Tensor | None:
        """[H], nats per token by which tokens outside the window lose weight; None for 0."""
        return None

    def forward(self, n_queries: int, n_keys: int, position: Tensor) -> Tensor:
        """Bias [B or 1, H or 1, Q, K] of the last Q of K tokens; -inf where the key is later than the query.

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


class ConvBias(PositionBias):
    """AFT-conv: w^i_{t-t'} per head i, re-parameterised as gamma (w - mean w) / std w + beta (paper, section 3.3)."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.randn(config.n_head, config.window))  # [H, s], by distance
        self.gamma = nn.Parameter(torch.zeros(config.n_head, 1))
        self.beta = nn.Parameter(torch.zeros(config.n_head, 1))

    def learned(self, age: Tensor, position: Tensor) -> Tensor:
        by_distance = self.gamma.float() * F.layer_norm(self.weight.float(), (self.window,)) + self.beta.float()
        return by_distance[:, age.clamp(0, self.window - 1)].unsqueeze(0)


class FactorisedBias(PositionBias):
    """AFT-local and AFT-full: w_{t,t'} = u_t . v_t' (paper, section 3.2); full is local without end."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config)
        self.query = nn.Parameter(torch.empty(config.max_positions, config.d_bias).normal_(std=0.01))
        self.key = nn.Parameter(torch.empty(config.max_positions, config.d_bias).normal_(std=0.01))

    def learned(self, age: Tensor, position: Tensor) -> Tensor:
        query_positions = position[:, None] + torch.arange(age.shape[0], device=age.device)
        key_positions = query_positions[:, -1:] - age[-1]  # negative in slots that no token has filled: any will do
        u = F.embedding(query_positions, self.query).float()
        v = F.embedding(key_positions.clamp(min=0), self.key).float()
        return (u @ v.transpose(1, 2)).unsqueeze(1)


class DecayBias(PositionBias):
    """RWKV-4: w_{t,t'} = -(t - 1 - t') decay with decay = exp(time_decay), and time_first, a bonus, at t' = t."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config)
        self.time_decay = nn.Parameter(torch.linspace(-5, 3, config.n_key))  # from 150 tokens to one
        self.time_first = nn.Parameter(torch.full((config.n_key,), math.log(0.3)))

    @property
    def decay(self) -> Tensor:
        return self.time_decay.float().exp().clamp(max=ops.LARGEST_DECAY)

    def forward(self, n_queries: int, n_keys: int, position: Tensor) -> Tensor:
        index = torch.arange(n_keys, device=position.device)
        age = index[n_keys - n_queries :, None] - index  # [Q, K]
        bias = torch.where(age > 0, (1 - age) * self.decay.view(-1, 1, 1), self.time_first.float().view(-1, 1, 1))
        return bias.masked_fill(age < 0, float("-inf")).unsqueeze(0)

    def by_distance(self, position: Tensor) -> Tensor:
        return self.time_first.float().view(1, 1, -1)


def position_bias(config: AFTConfig) -> PositionBias:
    match config.variant:
        case "simple":
            return PositionBias(config)
        case "conv":
            return ConvBias(config)
        case "local" | "full":
            return FactorisedBias(config)
        case "rwkv4":
            return DecayBias(config)


def gated_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    position: Tensor,
    state: LayerState,
    decay: Tensor | None = None,
) -> Tensor:
    """sigmoid(q) AFT(k, v) [B, C] of one token, query [B, C], the others as of `ops.step_`; the state is stepped."""
    if query.is_cuda and HAS_TRITON:
        from model import triton_step

        gated: Tensor = triton_step.gated_step_(query, key, value, bias, position, state, decay)
        return gated
    return torch.sigmoid(query) * ops.step_(key, value, bias, position, state, decay).flatten(-2)


class AFTAttention(nn.Module):
    """sigmoid(q) * AFT(k, v), between an input and an output projection."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.n_key, self.d_key = config.n_key, config.d_model // config.n_key
        self.n_window = config.bias_window - 1
        self.widths = [config.d_model, config.n_key, config.d_model]
        self.qkv = nn.Linear(config.d_model, sum(self.widths))
        self.bias = position_bias(config)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, position: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x [B, T, C], position [B] of its first token -> y [B, T, C] and the state after it."""
        query, keys, values = self.qkv(x).split(self.widths, -1)
        y, state = ops.forward(
            keys,
            values.unflatten(-1, (self.n_key, self.d_key)),
            lambda n_queries, n_keys, start: self.bias(n_queries, n_keys, position + start),
            self.n_window,
            position,
            state,
        )
        return self.out(torch.sigmoid(query) * y.flatten(-2).to(x.dtype)), state

    def step_(self, x: Tensor, position: Tensor, state: LayerState) -> Tensor:
        """x [B, C] -> y [B, C]; the state becomes that after it."""
        query, key, value = self.qkv(x).split(self.widths, -1)
        value = value.unflatten(-1, (self.n_key, self.d_key))
        gated = gated_step_(query, key, value, self.bias.by_distance(position), position, state)
        y: Tensor = self.out(gated.to(x.dtype))
        return y

    def init_state(self, batch_size: int, device: torch.device) -> LayerState:
        return LayerState.empty(batch_size, self.n_key, self.d_key, self.n_window, device)


class FeedForward(nn.Module):
    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attention = AFTAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, position: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, state = self.attention(self.attention_norm(x), position, state)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state

    def step_(self, x: Tensor, position: Tensor, state: LayerState) -> Tensor:
        x = x + self.attention.step_(self.attention_norm(x), position, state)
        y: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + y
