"""What the configurations of all families share. Each family adds its own fields (model/families)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor

from model.errors import ConfigError, ContextLengthError

Dtype = Literal["float32", "bfloat16", "float16"]

LARGEST = 2**28  # of a width: the bytes of a matrix of two of them are a number that PyTorch knows
MOST_BLOCKS = 1024  # they are made before a checkpoint's tensors are looked at, and no file may make that take for ever


def about(text: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that who makes a new model chooses, and what it is."""
    return dataclasses.field(default=default, metadata={"text": text})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder. Raises ConfigError, naming the field, for any value out of range.

    vocab_size      number of token ids
    tie_embeddings  the output projection is the embedding, not a matrix of its own
    norm_eps        added to the variance in layer norms
    dtype           dtype of the stored weights; the recurrent state is float32 whatever this says
    """

    family: ClassVar[str]  # "model_type" of config.json

    vocab_size: int
    d_model: int = about("Width of the residual stream.")
    n_layer: int = about("Blocks.")
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        self._require(self.dtype in get_args(Dtype), "dtype", f"one of {', '.join(get_args(Dtype))}")
        self._require_flag("tie_embeddings")
        small = isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1
        self._require(small, "norm_eps", "a number between 0 and 1")
        for name in ("vocab_size", "d_model"):
            self._require_positive(name)
        self._require_positive("n_layer", MOST_BLOCKS)

    @classmethod
    def architectures(cls) -> dict[str, dict[str, Any]]:
        """Those of the family by name, and the fields that make each."""
        return {cls.family: {}}

    @property
    def architecture(self) -> str:
        """Which of its kind the model is, for those who ask a server."""
        return self.family

    @property
    def context_limit(self) -> int | None:
        """Longest sequence in tokens; None if any length will do."""
        return None

    def check_context(self, position: Tensor, n_tokens: int) -> None:
        """Raises ContextLengthError if that many tokens from position [B] on are more than the model can read."""
        if self.context_limit is None:
            return
        end = n_tokens + int(position.max())
        if end > self.context_limit:
            raise ContextLengthError(
                f"A sequence of {end} tokens exceeds the model's max_positions = {self.context_limit}."
            )

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

    def identity(self) -> dict[str, Any]:
        """What a fingerprint of the model is made from."""
        return self.to_dict()

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")

    def _require_positive(self, name: str, at_most: int = LARGEST) -> None:
        value = getattr(self, name)
        valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= at_most
        self._require(valid, name, f"a whole number from 1 to {at_most}")

    def _require_flag(self, name: str) -> None:
        self._require(isinstance(getattr(self, name), bool), name, "true or false")

    def _set_feed_forward_width(self) -> None:
        """d_ff, where it is left out."""
        if getattr(self, "d_ff") is None:  # noqa: B009 - a field of those families that have one
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        self._require_positive("d_ff")
