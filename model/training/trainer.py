"""The training loop: AdamW, warm-up and cosine, gradient clipping, checkpoints, exact resume, several processes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import load_tensors, save_tensors, write_whole
from model.errors import CheckpointError, ConfigError, TrainingError
from model.language_model import LanguageModel
from model.ops import Recurrence
from model.training.config import TrainingConfig
from model.training.data import PackedBatches
from model.training.evaluate import total_nats

STATE_FILE = "training_state.safetensors"
SECONDS_BETWEEN_CHECKPOINTS = 300.0  # at most, however many steps that are


@dataclass(frozen=True)
class Record:
    """What a step reports. loss in nats per token, validation in bits per character."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    validation: float | None = None


class Loss(nn.Module):
    """Mean cross-entropy in nats per token. A module, so that DDP wraps it and torch.compile sees no unused state."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T + 1]"""
        logits, _ = self.model(tokens[:, :-1])
        return total_nats(logits, tokens[:, 1:]) / tokens[:, 1:].numel()


class Trainer:
    """Trains `model` in place. `history` holds a Record per step; `step` counts steps done.

    With several processes (torchrun), each reads its share of every batch, and all hold the same weights.
    """

    def __init__(self, model: LanguageModel, batches: PackedBatches, config: TrainingConfig, folder: Path) -> None:
        self.model, self.batches, self.config, self.folder = model, batches, config, folder
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95))
        self.history: list[Record] = []
        if config.batch_size % process_count():
            raise ConfigError(
                f"batch_size must be a multiple of the {process_count()} processes, not {config.batch_size}."
            )
        loss: nn.Module = Loss(model)
        if dist.is_initialized():
            loss = DistributedDataParallel(loss)
        self.loss: Callable[[Tensor], Tensor] = torch.compile(loss) if config.compile else loss

    @property
    def step(self) -> int:
        return len(self.history)

    def run(
        self,
        validate: Callable[[], float] | None = None,
        report: Callable[[Record], None] | None = None,
        *,
        on_save: Callable[[], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train up to config.steps, saving resumable state on the way, and in any case at the end.

        Calls report(record) after every step, and on_save() in the first process before the state is saved. If
        should_stop() says so in any process, all stop after that step. Raises TrainingError if the loss is not finite;
        what was saved then stays.
        """
        saved_at = time.monotonic()
        while self.step < self.config.steps:
            record = self._train_step()
            if not math.isfinite(record.loss):
                raise TrainingError(
                    f"The loss of step {record.step} is {record.loss}: a lower learning_rate or gradient_clip may help."
                )
            done = record.step
            if validate and (done % self.config.evaluate_every == 0 or done == self.config.steps):
                record = Record(**{**vars(record), "validation": validate()})
            self.history.append(record)
            if report:
                report(record)
            stops = should_stop is not None and self._any_process(should_stop())
            late = time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS
            if done % self.config.checkpoint_every == 0 or done == self.config.steps or stops or late:
                if on_save and process_rank() == 0:
                    on_save()
                self.save()
                saved_at = time.monotonic()
            if stops:
                return

    def _any_process(self, value: bool) -> bool:
        """Whether it is true in one of the processes, which must go on and stop together."""
        return mean_over_processes(torch.tensor(float(value), device=self.model.device)) > 0

    def _train_step(self) -> Record:
        learning_rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        rows = torch.from_numpy(self.batches.batch(self.step)[process_rank() :: process_count()])
        loss = self.loss(rows.to(self.model.device).long())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        tokens = (self.step + 1) * self.config.batch_size * self.config.context
        return Record(self.step + 1, tokens, mean_over_processes(loss.detach()), learning_rate)

    def save(self) -> None:
        """Everything needed to continue as if nothing had happened, in one file that appears whole or not at all."""
        if process_rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        metadata = {
            "config": json.dumps(self._identity(), sort_keys=True),
            "history": json.dumps([vars(record) for record in self.history]),
        }
        save_tensors(self.folder / STATE_FILE, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)

    def resume(self) -> None:
        """Continue from the state in the folder. Raises CheckpointError if there is none, or of another run."""
        path = self.folder / STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"There is no {STATE_FILE} in {self.folder} to resume from.")
        tensors = load_tensors(path)
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
        stored, now = json.loads(metadata["config"]), self._identity()
        # A run of an older version may have had more fields, without effect.
        if differing := sorted(key for key in now if stored.get(key) != now[key]):
            key = differing[0]
            raise CheckpointError(f"{path} was written with {key} = {stored.get(key)!r}, not {now.get(key)!r}.")
        self.model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            # load_state_dict of the optimizer would need its own numbering; its state is keyed by parameter.
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device if value.ndim else "cpu")
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.history = [Record(**fields) for fields in json.loads(metadata["history"])]

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to give what an uninterrupted one gives."""
        run = {k: v for k, v in self.config.to_dict().items() if k != "checkpoint_every"}
        return {**run, **self.model.config.to_dict(), "tokens": self.batches.digest}


def stored_step(folder: Path) -> int | None:
    """Steps done by the run whose state is in the folder; None if there is none that can be read."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            return len(json.loads(file.metadata()["history"]))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and what recurrences learn, whose zero is not "small", do not."""
    of_recurrences = {id(p) for m in model.modules() if isinstance(m, Recurrence) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in of_recurrences else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return float(value)


def init_processes(device: torch.device) -> None:
    """Join the group that torchrun describes in the environment, if it does."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def write_history(path: Path, history: list[Record]) -> None:
    write_whole(path, "".join(json.dumps(vars(record)) + "\n" for record in history).encode())
