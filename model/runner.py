"""What an engine runs a model by: the compiled kernels on CPUs that have a compiler, PyTorch everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.errors import ConfigError
from model.native import NativeRunner, library
from model.state import AFTState
from model.transformer import AFTForCausalLM

Quantization = Literal["int8"]


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


def make_runner(
    model: AFTForCausalLM, states: AFTState, chunk_size: int, quantize: Quantization | None = None
) -> Runner:
    """states: of all slots, stepped in place. Raises ConfigError if the model cannot be quantised here."""
    kernels = library() if NativeRunner.supports(model) else None
    if kernels:
        return NativeRunner(model, states, chunk_size, kernels, int8=quantize == "int8")
    if quantize:
        raise ConfigError("quantize needs the compiled kernels: a CPU, and a C compiler such as gcc or clang.")
    return TorchRunner(model, states)
