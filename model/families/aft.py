"""Attention Free Transformers (Zhai et al. 2021): simple, conv, local and full.

Shapes: B sequences, T tokens, C = d_model, H keys per token, D = C / H, Q queries, K keys seen by them, W = window - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import Activation
from model.config import ModelConfig, about
from model.kernel import Program, Rows
from model.language_model import Block, LanguageModel
from model.ops import Ops, X
from model.recurrences.aft import AFT, FactorisedBiasCall, state_of
from model.recurrences.aft_functions import Sums, Window, is_possible

Variant = Literal["simple", "conv", "local", "full"]


@dataclass(frozen=True, kw_only=True)
class AFTConfig(ModelConfig):
    """Architecture of an AFT. Raises ConfigError, naming the field, for any value out of range.

    variant: position bias: none, per head by distance, factorised in the window, factorised everywhere. Fields that
    only some variants use have no effect on the others, so that one set of values can describe a comparison of them.
    """

    family = "aft"

    variant: Variant
    n_head: int = about("Heads, each with one key for its d_model / n_head features (conv).", 1)
    window: int = about("Tokens that a bias reaches, the current included (conv, local).", 32)
    d_bias: int = about("Inner size of the factorised bias (local, full).", 32)
    max_positions: int = about("Longest sequence (local, full, position_embeddings).", 1024)
    d_ff: int | None = about("Inner width of the feed-forward layer; 4 * d_model.", None)
    position_embeddings: bool = about("Learned position embeddings, as in the paper; they bound the context.", False)

    def __post_init__(self) -> None:
        self._require(self.variant in get_args(Variant), "variant", f"one of {', '.join(get_args(Variant))}")
        super().__post_init__()
        self._require_flag("position_embeddings")
        for name in ("n_head", "window", "d_bias", "max_positions"):
            self._require_positive(name)
        self._set_feed_forward_width()
        self._require(self.d_model % self.n_head == 0, "n_head", f"a divisor of d_model = {self.d_model}")
        if self.variant == "local":
            self._require(self.window <= self.max_positions, "window", f"at most max_positions = {self.max_positions}")

    @classmethod
    def architectures(cls) -> dict[str, dict[str, Any]]:
        return {variant: {"variant": variant} for variant in get_args(Variant)}

    @property
    def architecture(self) -> str:
        return self.variant

    @property
    def n_key(self) -> int:
        """H, the number of keys per token: the heads of "conv", every feature otherwise."""
        return self.n_head if self.variant == "conv" else self.d_model

    @property
    def bias_window(self) -> int:
        """s: a token at distance s or more is in the running sums. A window of 1 with a zero bias is "simple"."""
        return {"simple": 1, "conv": self.window, "local": self.window, "full": self.max_positions}[self.variant]

    @property
    def context_limit(self) -> int | None:
        bounded = self.variant in ("local", "full") or self.position_embeddings
        return self.max_positions if bounded else None


class AFTLayer(NamedTuple):
    """State of one layer: the running sums and the window, as of `Sums` and `Window`."""

    reference: Tensor
    sums: Tensor
    compensation: Tensor
    keys: Tensor
    values: Tensor


class ConvBias(AFT):
    """AFT-conv: w^i_{t-t'} per head i, re-parameterised as gamma (w - mean w) / std w + beta (paper, section 3.3)."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config.bias_window, config.n_key)
        self.weight = nn.Parameter(torch.randn(config.n_head, config.window))  # [H, s], by distance
        self.gamma = nn.Parameter(torch.zeros(config.n_head, 1))
        self.beta = nn.Parameter(torch.zeros(config.n_head, 1))

    def learned(self, age: Tensor, position: Tensor) -> Tensor:
        by_distance = self.gamma.float() * F.layer_norm(self.weight.float(), (self.window,)) + self.beta.float()
        return by_distance[:, age.clamp(0, self.window - 1)].unsqueeze(0)


class FactorisedBias(AFT):
    """AFT-local and AFT-full: w_{t,t'} = u_t . v_t' (paper, section 3.2); full is local without end."""

    functions = ("aft", "factorised_bias")

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config.bias_window, config.n_key)
        self.query = nn.Parameter(torch.empty(config.max_positions, config.d_bias).normal_(std=0.01))
        self.key = nn.Parameter(torch.empty(config.max_positions, config.d_bias).normal_(std=0.01))

    def learned(self, age: Tensor, position: Tensor) -> Tensor:
        query_positions = position[:, None] + torch.arange(age.shape[0], device=age.device)
        key_positions = query_positions[:, -1:] - age[-1]  # negative in slots that no token has filled: any will do
        u = F.embedding(query_positions, self.query).float()
        v = F.embedding(key_positions.clamp(min=0), self.key).float()
        return (u @ v.transpose(1, 2)).unsqueeze(1)

    def write_bias(self, program: Program) -> Rows:
        """It differs from position to position: computed in each pass."""
        bias = program.memory(program.n_rows, self.window, 1)
        query, key = self.query.detach().float(), self.key.detach().float()
        program.add(FactorisedBiasCall(program.positions, query, key, bias.tensor.squeeze(2)))
        return bias


def position_bias(config: AFTConfig) -> AFT:
    match config.variant:
        case "simple":
            return AFT(config.bias_window, config.n_key)
        case "conv":
            return ConvBias(config)
        case "local" | "full":
            return FactorisedBias(config)


class Attention(nn.Module):
    """sigmoid(q) * AFT(k, v), between an input and an output projection."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.widths = [config.d_model, config.n_key, config.d_model]
        self.qkv = nn.Linear(config.d_model, sum(self.widths))
        self.bias = position_bias(config)
        self.out = nn.Linear(config.d_model, config.d_model)


class FeedForward(nn.Module):
    """W_down gelu(W_up x)"""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)


class AFTBlock(Block):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def run(self, ops: Ops[X], x: X, layer: Any) -> tuple[X, Any]:
        attention, feed_forward = self.attention, self.feed_forward
        q, k, v = ops.split(ops.linear(ops.norm(x, self.attention_norm), attention.qkv), attention.widths)
        y, layer = ops.recur(attention.bias, q, k, v, layer=layer)
        x = ops.linear(y, attention.out, adds_to=x)
        inner = ops.linear(ops.norm(x, self.feed_forward_norm), feed_forward.up, Activation.GELU)
        return ops.linear(inner, feed_forward.down, adds_to=x), layer


class AFTForCausalLM(LanguageModel):
    """Decoder of AFT blocks."""

    config_class = AFTConfig
    residual = ("attention.out", "feed_forward.down")
    config: AFTConfig

    def __init__(self, config: AFTConfig) -> None:
        super().__init__(config)
        has_positions = config.position_embeddings
        self.position_embedding = nn.Embedding(config.max_positions, config.d_model) if has_positions else None
        self.blocks = nn.ModuleList(AFTBlock(config) for _ in range(config.n_layer))
        self.initialise()

    def empty_layer(self, batch_size: int, device: torch.device) -> AFTLayer:
        n_key = self.config.n_key
        d_key = self.config.d_model // n_key
        running = Sums.empty(batch_size, n_key, d_key, device)
        return AFTLayer(*running, *Window.empty(batch_size, n_key, d_key, self.config.bias_window - 1, device))

    @classmethod
    def is_possible(cls, layer: AFTLayer, position: int) -> bool:
        return is_possible(*state_of(layer), position)

    def embed(self, ops: Ops[X]) -> X:
        return ops.embed(self.embedding, self.position_embedding)
