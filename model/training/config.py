"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import about
from model.errors import ConfigError
from model.training.data import Source

MOST = 2**31 - 1  # of what is counted
MOST_RATE = 1000  # far above what any run can bear, far below what float32 has


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Raises ConfigError, naming the field, for values out of range.

    Each step reads batch_size windows of context tokens of data, over all processes. Biases, norms and what recurrences
    learn have no weight decay. Validations but the last read the first validation_documents documents; without
    validation there are none. compile: whether the loss is compiled (torch.compile).
    """

    data: tuple[Source, ...]
    validation: Path | None = about("Text file to report bits per character on.", None)
    steps: int = about("Steps of the optimiser.", 1000)
    batch_size: int = about("Sequences per step, over all processes.", 16)
    context: int = about("Tokens per sequence.", 256)
    learning_rate: float = about("Peak.", 3e-3)
    final_learning_rate: float = about("Where the cosine after the peak ends.", 1e-4)
    warmup_steps: int = about("Steps until the peak.", 100)
    weight_decay: float = about("Of matrices only.", 0.1)
    gradient_clip: float = about("Largest norm of the gradient.", 1.0)
    seed: int = about("The same seed gives the same batches and weights.", 0)
    evaluate_every: int = about("Steps between validations.", 250)
    validation_documents: int = about("Documents read by validations before the last.", 64)
    checkpoint_every: int = about("Steps between checkpoints.", 250)
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data must name at least one text file.")
        for field in ("steps", "batch_size", "context", "evaluate_every", "validation_documents", "checkpoint_every"):
            if not 1 <= getattr(self, field) <= MOST:
                raise ConfigError(f"{field} must be from 1 to {MOST}, not {getattr(self, field)}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to {2**63 - 1}, not {self.seed}.")
        if not 0 <= self.warmup_steps <= MOST:
            raise ConfigError(f"warmup_steps must be from 0 to {MOST}, not {self.warmup_steps}.")
        for field in ("weight_decay", "final_learning_rate"):
            if not 0 <= getattr(self, field) <= MOST_RATE:
                raise ConfigError(f"{field} must be from 0 to {MOST_RATE}, not {getattr(self, field)}.")
        if not 0 < self.learning_rate <= MOST_RATE:
            raise ConfigError(f"learning_rate must be positive and at most {MOST_RATE}, not {self.learning_rate}.")
        if not 0 < self.gradient_clip < math.inf:
            raise ConfigError(f"gradient_clip must be positive and finite, not {self.gradient_clip}.")

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
