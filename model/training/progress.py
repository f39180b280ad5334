"""What a training run shows: a progress bar, a line per validation, and a picture of the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.checkpoint import write_whole
from model.training.trainer import Record

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """A context manager to be called with each Record.

    Terminals have a bar, and a line for each validation. Elsewhere there are lines from time to time, and one at once.
    """

    def __init__(self, steps: int, done: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, told="")
        self._last: tuple[float, int] | None = None
        self._speed = 0.0
        self._steps, self._line_at = steps, -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, record: Record) -> None:
        now = time.monotonic()
        if self._last:
            speed = (record.tokens - self._last[1]) / max(now - self._last[0], 1e-9)
            self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        self._last = now, record.tokens
        told = f"loss {record.loss:.3f}" + (f"  {self._speed:,.0f} tokens/s" if self._speed else "")
        self._bar.update(self._task, completed=record.step, told=told)
        line = f"step {record.step} of {self._steps}  tokens {record.tokens:,}  {told}"
        if record.validation is not None:
            self._print(f"{line}  validation {record.validation:.4f} bits/character")
            self._last = None  # the validation just done took time of its own
        elif not self.console.is_terminal and now - self._line_at > SECONDS_BETWEEN_LINES:
            self._print(line)

    def _print(self, line: str) -> None:
        self._line_at = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True)


def plot_history(path: Path, history: Sequence[Record]) -> bool:
    """Training loss (nats per token) and validation (bits per character) against tokens read, as a PNG.

    Returns whether it is drawn. It is not without matplotlib: a picture is not worth a run.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    tokens = [record.tokens for record in history]
    axes.plot(tokens, [record.loss for record in history], color="tab:blue", alpha=0.25, linewidth=0.6)
    axes.plot(tokens, smooth([record.loss for record in history]), color="tab:blue", label="training loss")
    axes.set(xlabel="tokens read", ylabel="training loss, nats per token", ylim=(0, None))
    validated = [(record.tokens, record.validation) for record in history if record.validation is not None]
    if validated:
        right = axes.twinx()
        right.plot(*zip(*validated, strict=True), color="tab:orange", marker=".", label="validation")
        right.set(ylabel="validation, bits per character", ylim=(0, None))
        right.legend(loc="upper right")
    axes.legend(loc="upper center")
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(path, drawn.getvalue())
    return True


def smooth(values: Sequence[float], weight: float = 0.98) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
