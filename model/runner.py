"""What an engine runs a model by: the compiled kernels on CPUs that have a compiler, PyTorch everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from model.backends.native.runner import NativeRunner
from model.errors import ConfigError
from model.state import AFTState
from model.transformer import AFTForCausalLM

Quantization = Literal["float32", "bfloat16", "int8"]  # the names of FORMATS


class Runner(Protocol):
    """model: as it is run; is_exact: whether a text is bitwise the same in any batch and however it is cut."""

    model: AFTForCausalLM
    is_exact: bool

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        """A token for each of the first B states -> logits [B, V], valid until the next call; the states are stepped.

        Raises ContextLengthError, as `read` does.
        """

    def read(self, token_ids: Sequence[int], state: AFTState | None) -> tuple[Tensor, AFTState]:
        """T <= chunk_size tokens of one sequence from a state, None at the start -> outputs [T, C] of the last block,
        valid until the next call, and the state after them, which shares nothing.
        """


class TorchRunner:
    is_exact = False

    def __init__(self, model: AFTForCausalLM, states: AFTState) -> None:
        self.model, self._states = model, states

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        states = self._states.select(slice(0, len(token_ids)))
        return self.model.step_(torch.tensor(token_ids, device=self.model.device), states)

    def read(self, token_ids: Sequence[int], state: AFTState | None) -> tuple[Tensor, AFTState]:
        hidden, state = self.model.hidden(torch.tensor([token_ids], device=self.model.device), state)
        return hidden[0], state.clone()


class CUDAGraphRunner(TorchRunner):
    """Steps captured as CUDA graphs, so that no step waits for Python. Not yet run on a GPU."""

    def __init__(self, model: AFTForCausalLM, states: AFTState) -> None:
        super().__init__(model, states)
        self._ids = torch.zeros(states.batch_size, dtype=torch.long, device=model.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        """Rows up to the next power of two are stepped; those beyond B are in nobody's use."""
        n_rows = len(token_ids)
        self.model.check_context(self._states.position[:n_rows], 1)
        self._ids[:n_rows] = torch.tensor(token_ids).to(self._ids.device, non_blocking=True)
        size = min(1 << (n_rows - 1).bit_length(), self._states.batch_size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:n_rows]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        states, before = self._states.select(slice(0, size)), self._states.select(slice(0, size)).clone()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(2):  # allocates and compiles what a capture may not
                self.model.advance_(self._ids[:size], states)
        torch.cuda.synchronize()
        states.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model.advance_(self._ids[:size], states)
        return graph, logits


def make_runner(
    model: AFTForCausalLM, states: AFTState, chunk_size: int, quantize: Quantization | None = None
) -> Runner:
    """states: of all slots, stepped in place; quantize: the format of matrices, None for what loses nothing.

    Raises ConfigError if the model cannot be quantised here.
    """
    kernels = library() if NativeRunner.supports(model) else None
    if kernels:
        return NativeRunner(model, states, chunk_size, kernels, FORMATS[quantize] if quantize else None)
    if quantize:
        raise ConfigError("quantize needs the compiled kernels: a CPU, and a C compiler such as gcc or clang.")
    return CUDAGraphRunner(model, states) if model.device.type == "cuda" else TorchRunner(model, states)
