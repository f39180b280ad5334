"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.training.data import Source


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Raises ConfigError, naming the field, for values out of range.

    data                 text files to learn from
    validation           text file whose bits per character are reported; None for none
    steps                optimiser steps; each reads batch_size windows of context tokens, over all processes
    learning_rate        peak, reached after warmup_steps, then a cosine down to final_learning_rate
    weight_decay         of matrices; biases, norms and position biases have none
    gradient_clip        largest norm of the gradient
    evaluate_every       steps between validations on the first validation_documents documents; the final one reads all
    checkpoint_every     steps between checkpoints from which the run can resume
    compile              whether the loss is compiled (torch.compile)
    """

    data: tuple[Source, ...]
    validation: Path | None = None
    steps: int = 1000
    batch_size: int = 16
    context: int = 256
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 250
    validation_documents: int = 64
    checkpoint_every: int = 250
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data must name at least one text file.")
        for field in ("steps", "batch_size", "context", "evaluate_every", "validation_documents", "checkpoint_every"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, not {getattr(self, field)}.")
        for field in ("warmup_steps", "weight_decay", "final_learning_rate", "seed"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be at least 0 and finite, not {getattr(self, field)}.")
        for field in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be positive and finite, not {getattr(self, field)}.")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine that ends at final_learning_rate with the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values, to be stored with a run and compared on resume."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return fields
