"""Architecture of a language model of the AFT family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from model.errors import ConfigError

Variant = Literal["simple", "conv", "local", "full", "rwkv4"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class AFTConfig:
    """Architecture of a decoder. Raises ConfigError, naming the field, for any value out of range.

    The last column names the variants that use a field; for the others it has no effect, so that one set of values
    can describe a comparison of variants.

    variant              position bias: none, per head by distance, factorised in the window, factorised everywhere;
                         or RWKV-4: a decay per feature, and blocks that mix each token with the one before it
    vocab_size           number of token ids
    d_model              width of the residual stream
    n_layer              number of blocks
    n_head               heads: each has one key for its d_model / n_head features            conv
    window               a bias reaches over the last `window` tokens, the current included   conv, local
    d_bias               inner size of the factorised bias u_t . v_t'                         local, full
    max_positions        positions 0 .. max_positions - 1 exist, no more       local, full, position_embeddings
    d_ff                 inner width of the feed-forward layer; 4 * d_model if left out
    position_embeddings  add a learned embedding per position, as the paper does; bounds the context
    tie_embeddings       the output projection is the embedding, not a matrix of its own
    norm_eps             added to the variance in layer norms
    dtype                dtype of the stored weights; the recurrent state is float32 whatever this says
    """

    variant: Variant
    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int = 1
    window: int = 32
    d_bias: int = 32
    max_positions: int = 1024
    d_ff: int | None = None
    position_embeddings: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        self._require(self.variant in get_args(Variant), "variant", f"one of {', '.join(get_args(Variant))}")
        self._require(self.dtype in get_args(Dtype), "dtype", f"one of {', '.join(get_args(Dtype))}")
        for name in ("position_embeddings", "tie_embeddings"):
            self._require(isinstance(getattr(self, name), bool), name, "true or false")
        small = isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1
        self._require(small, "norm_eps", "a number between 0 and 1")
        for name in ("vocab_size", "d_model", "n_layer", "n_head", "window", "d_bias", "max_positions"):
            self._require_positive(name)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        self._require_positive("d_ff")
        self._require(self.d_model % self.n_head == 0, "n_head", f"a divisor of d_model = {self.d_model}")
        if self.variant == "local":
            self._require(self.window <= self.max_positions, "window", f"at most max_positions = {self.max_positions}")

    @property
    def n_key(self) -> int:
        """H, the number of keys per token: the heads of "conv", every feature otherwise."""
        return self.n_head if self.variant == "conv" else self.d_model

    @property
    def bias_window(self) -> int:
        """s: a token at distance s or more is in the running sums. A window of 1 with a zero bias is "simple"."""
        windows = {"simple": 1, "rwkv4": 1, "conv": self.window, "local": self.window, "full": self.max_positions}
        return windows[self.variant]

    @property
    def context_limit(self) -> int | None:
        """Longest sequence in tokens; None if any length will do."""
        bounded = self.variant in ("local", "full") or self.position_embeddings
        return self.max_positions if bounded else None

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ConfigError for an unknown or missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise ConfigError(f"Unknown configuration field {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise ConfigError(f"Configuration field {missing[0]!r} is missing.")
        return cls(**fields)

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self._require(valid, name, "a whole number, at least 1")
