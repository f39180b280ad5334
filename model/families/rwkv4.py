"""RWKV-4 (Peng et al. 2023): AFT whose bias decays with distance, in blocks that see the token before, too.

Shapes: B sequences, T tokens, C = d_model; each feature has a key, H = C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.activation import Activation
from model.config import ModelConfig, about
from model.errors import ConfigError
from model.language_model import Block, LanguageModel
from model.ops import Ops, X
from model.recurrences.aft import AFT, state_of
from model.recurrences.aft_functions import LARGEST_DECAY, Sums, is_possible

TIME_MIX, CHANNEL_MIX = range(2)  # rows of RWKV4Layer.shifted


# What a configuration of version 0.2, where RWKV-4 was a variant of AFT, holds besides: all without effect.
FIELDS_OF_0_2 = {"n_head": 1, "window": 32, "d_bias": 32, "max_positions": 1024, "position_embeddings": False}


@dataclass(frozen=True, kw_only=True)
class RWKV4Config(ModelConfig):
    """Architecture of an RWKV-4. Raises ConfigError, naming the field, for any value out of range."""

    family = "rwkv4"
    of_0_2: ClassVar[Mapping[str, Any]] = FIELDS_OF_0_2  # as the folder has them that the configuration was read from

    d_ff: int | None = about("Inner width of the feed-forward layer; 4 * d_model.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_feed_forward_width()

    def identity(self) -> dict[str, Any]:
        """As version 0.2 wrote it, so that sessions of then are still this model's."""
        return {**self.to_dict(), "variant": "rwkv4", **self.of_0_2}


class RWKV4Layer(NamedTuple):
    """State of one layer: the running sums, as of `Sums`, and what its two parts got for the last token.

    shifted [B, 2, C]
    """

    reference: Tensor
    sums: Tensor
    compensation: Tensor
    shifted: Tensor


class DecayBias(AFT):
    """w_{t,t'} = -(t - 1 - t') decay with decay = exp(time_decay), and time_first, a bonus, at t' = t."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)
        self.time_decay = nn.Parameter(torch.linspace(-5, 3, width))  # from 150 tokens to one
        self.time_first = nn.Parameter(torch.full((width,), math.log(0.3)))

    @property
    def decay(self) -> Tensor:
        return self.time_decay.float().exp().clamp(max=LARGEST_DECAY)

    def forward(self, n_queries: int, n_keys: int, position: Tensor) -> Tensor:
        index = torch.arange(n_keys, device=position.device)
        age = index[n_keys - n_queries :, None] - index  # [Q, K]
        bias = torch.where(age > 0, (1 - age) * self.decay.view(-1, 1, 1), self.time_first.float().view(-1, 1, 1))
        return bias.masked_fill(age < 0, float("-inf")).unsqueeze(0)

    def by_distance(self, position: Tensor) -> Tensor:
        return self.time_first.float().view(1, 1, -1)


class TokenShift(nn.Module):
    """mix * x_t + (1 - mix) * x_{t-1}, for each of n mixes."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(0, 1, width).repeat(n, 1))


class TimeMix(nn.Module):
    """sigmoid(r) * AFT(k, v), between input projections and an output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = TokenShift(3, width)  # of key, value, receptance
        self.receptance, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.bias = DecayBias(width)


class ChannelMix(nn.Module):
    """sigmoid(r) * W_v relu(k)^2"""

    def __init__(self, width: int, d_ff: int) -> None:
        super().__init__()
        self.shift = TokenShift(2, width)  # of key, receptance
        self.receptance = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, d_ff, bias=False)
        self.down = nn.Linear(d_ff, width, bias=False)


class RWKV4Block(Block):
    """Pre-norm residual block: x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.attention = TimeMix(config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = ChannelMix(config.d_model, config.d_ff)

    def run(self, ops: Ops[X], x: X, layer: Any) -> tuple[X, Any]:
        time, channel = self.attention, self.feed_forward
        (k, v, r), shifted = ops.shift(ops.norm(x, self.attention_norm), time.shift.mix, layer.shifted, TIME_MIX)
        r, k, v = ops.beside((r, time.receptance), (k, time.key), (v, time.value))
        y, layer = ops.recur(time.bias, r, k, v, layer=layer)
        x = ops.linear(y, time.out, adds_to=x)
        (k, r), shifted = ops.shift(ops.norm(x, self.feed_forward_norm), channel.shift.mix, shifted, CHANNEL_MIX)
        inner = ops.linear(ops.linear(k, channel.up, Activation.RELU_SQUARED), channel.down)
        x = ops.add_gated(x, ops.linear(r, channel.receptance), inner)
        return x, layer._replace(shifted=shifted)


class RWKV4ForCausalLM(LanguageModel):
    """Decoder of RWKV-4 blocks."""

    config_class = RWKV4Config
    foreign_type = "rwkv"
    residual = ("attention.out", "feed_forward.down")
    config: RWKV4Config

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__(config)
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.blocks = nn.ModuleList(RWKV4Block(config) for _ in range(config.n_layer))
        self.initialise()

    def empty_layer(self, batch_size: int, device: torch.device) -> RWKV4Layer:
        width = self.config.d_model
        running = Sums.empty(batch_size, width, 1, device)
        return RWKV4Layer(*running, torch.zeros(batch_size, 2, width, device=device))

    @classmethod
    def is_possible(cls, layer: RWKV4Layer, position: int) -> bool:
        return is_possible(*state_of(layer), position) and bool(layer.shifted.isfinite().all())

    def embed(self, ops: Ops[X]) -> X:
        return ops.norm(ops.embed(self.embedding), self.embedding_norm)

    @classmethod
    def older_config(cls, fields: Mapping[str, Any]) -> RWKV4Config | None:
        if (fields.get("model_type"), fields.get("variant")) != ("aft", "rwkv4"):
            return None
        without_effect = FIELDS_OF_0_2 | {name: fields[name] for name in FIELDS_OF_0_2 if name in fields}
        for name, value in without_effect.items():
            if name != "position_embeddings" and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number, at least 1, not {value!r}.")
        if without_effect["position_embeddings"] is not False:
            raise ConfigError("position_embeddings must be false: RWKV-4 has none.")
        own = {name: value for name, value in fields.items() if name not in {"model_type", "variant", *FIELDS_OF_0_2}}
        config = RWKV4Config.from_dict(own)
        object.__setattr__(config, "of_0_2", without_effect)
        return config

    @classmethod
    def has_author_names(cls, names: Collection[str]) -> bool:
        return any(name.endswith(".att.time_first") for name in names)

    @classmethod
    def from_foreign(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> tuple[RWKV4Config, Named]:
        return from_foreign(tensors, described)


# Checkpoints of others: tensors have the author's names, or those of Hugging Face transformers.

Named = dict[str, Tensor]

OURS_BY_AUTHOR = {
    "emb.weight": "embedding.weight",
    "blocks.0.ln0": "embedding_norm",
    "ln1": "attention_norm",
    "ln2": "feed_forward_norm",
    "ln_out": "norm",
    "att.key": "attention.key",
    "att.value": "attention.value",
    "att.receptance": "attention.receptance",
    "att.output": "attention.out",
    "att.time_decay": "attention.bias.time_decay",
    "att.time_first": "attention.bias.time_first",
    "ffn.key": "feed_forward.up",
    "ffn.value": "feed_forward.down",
    "ffn.receptance": "feed_forward.receptance",
}
AUTHOR_BY_TRANSFORMERS = {
    "rwkv.": "",
    "embeddings.weight": "emb.weight",
    "pre_ln": "ln0",
    "attention.": "att.",
    "feed_forward.": "ffn.",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}
# Of each token shift, in the order of its rows.
MIXES = {"att": ("attention.shift.mix", "kvr"), "ffn": ("feed_forward.shift.mix", "kr")}


def from_foreign(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> tuple[RWKV4Config, Named]:
    """Configuration, and tensors by our names. described: config.json of transformers, {} for a file of the author's.

    Without a head of its own the model has that of the embedding.
    """
    norm_eps = described.get("layer_norm_epsilon", 1e-5)
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise ConfigError(f"layer_norm_epsilon must be a number between 0 and 1, not {norm_eps!r}.")
    if described:
        tensors = _by_name((_by_author(name), tensor) for name, tensor in tensors.items())
    tensors = {"head.weight": tensors["emb.weight"], **tensors}
    vocab_size, d_model = tensors["emb.weight"].shape
    dtypes = {tensor.dtype for tensor in tensors.values()}
    config = RWKV4Config(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layer=_count_blocks(tensors),
        d_ff=tensors["blocks.0.ffn.key.weight"].shape[0],
        tie_embeddings=torch.equal(tensors["head.weight"], tensors["emb.weight"]),
        norm_eps=norm_eps,
        dtype=str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32",  # type: ignore[arg-type]
    )
    renamed = _by_name(_renamed(tensors))
    if config.tie_embeddings:
        del renamed["head.weight"]
    return config, renamed


def _by_name(pairs: Iterable[tuple[str, Tensor]]) -> Named:
    named: Named = {}
    for name, tensor in pairs:
        if name in named:
            raise ValueError(f"two of its tensors have the name {name!r} once they are renamed.")
        named[name] = tensor
    return named


def _count_blocks(names: Collection[str]) -> int:
    numbers = {number for name in names for number in re.findall(r"^blocks\.(\d+)\.", name)}
    n = len(numbers)
    if wrong := numbers - {str(number) for number in range(n)}:
        raise ValueError(f"its {n} blocks must have the numbers from 0 to {n - 1}, not {min(wrong)}.")
    return n


def _by_author(name: str) -> str:
    for theirs, authors in AUTHOR_BY_TRANSFORMERS.items():
        name = name.replace(theirs, authors)
    return name


def _renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by our names; what is not known keeps its name."""
    for name, tensor in tensors.items():
        shift = re.fullmatch(r"blocks\.(\d+)\.(att|ffn)\.time_mix_([kvr])", name)
        if shift is None:
            shape = (-1,) if "time_" in name else tensor.shape
            yield _ours(name), tensor.reshape(shape)
            continue
        block, part, which = shift.groups()
        ours, order = MIXES[part]
        if which == order[0]:
            rows = [tensors[f"blocks.{block}.{part}.time_mix_{letter}"] for letter in order]
            yield f"blocks.{block}.{ours}", torch.stack([row.flatten() for row in rows])


def _ours(name: str) -> str:
    for theirs, ours in OURS_BY_AUTHOR.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
        block = re.fullmatch(rf"(blocks\.\d+\.){re.escape(theirs)}(.*)", name)
        if block:
            return block[1] + ours + block[2]
    return name
