"""Models on NVIDIA GPUs: each step is one CUDA graph, so that none waits for Python. Not yet run on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.backends.eager import EagerRunner
from model.language_model import LanguageModel
from model.ops import EagerOps, Recurrence
from model.recurrences.aft import AFT
from model.state import State

HAS_TRITON = importlib.util.find_spec("triton") is not None


class CUDAOps(EagerOps):
    """As PyTorch's, with a kernel for a token's recurrence where there is one."""

    def step_(self, recurrence: Recurrence, rows: Sequence[Tensor], layer: Any) -> Tensor:
        if not (HAS_TRITON and isinstance(recurrence, AFT)):
            return super().step_(recurrence, rows, layer)
        from model.backends import triton_aft

        return triton_aft.step_(recurrence, rows, layer, self.position)


class CUDARunner(EagerRunner):
    """A `Runner` for CUDA devices."""

    ops = CUDAOps

    def __init__(self, model: LanguageModel, states: State, *, pads: bool = False) -> None:
        super().__init__(model, states, pads=pads)
        self._ids = torch.zeros(states.batch_size, dtype=torch.long, device=model.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _advance(self, token_ids: Tensor) -> Tensor:
        """Rows up to the next power of two are stepped; those beyond B are in nobody's use."""
        n_rows = len(token_ids)
        self._ids[:n_rows] = token_ids
        size = min(1 << (n_rows - 1).bit_length(), self._states.batch_size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        self._states.position[n_rows:] = 0  # as of free rows in EagerRunner.step_
        return logits

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        states, current = self._states.select(slice(0, size)), torch.cuda.current_stream()
        before = states.clone()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(current)  # for the copy, and for what the states and ids were written by
        with torch.cuda.stream(beside):
            for _ in range(2):  # allocates and compiles what a capture may not
                super()._advance(self._ids[:size])
        current.wait_stream(beside)
        states.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = super()._advance(self._ids[:size])
        return graph, logits
