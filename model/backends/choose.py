"""Which backend runs a model: the compiled kernels on CPUs that have a compiler, PyTorch everywhere else."""

from __future__ import annotations

from model.backends.base import Runner
from model.backends.cuda import CUDARunner
from model.backends.eager import EagerRunner
from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from model.backends.native.program import NativeRunner
from model.errors import ConfigError
from model.language_model import LanguageModel
from model.state import State


def make_runner(
    model: LanguageModel, states: State, chunk_size: int, *, quantize: str | None = None, batch_invariant: bool = False
) -> Runner:
    """states: of all slots, stepped in place; quantize: the name of a weight format; batch_invariant: whether a text
    must get the same bits in any batch, whatever it costs. Raises ConfigError for a format that cannot be had here.
    """
    if quantize is not None and quantize not in FORMATS:
        raise ConfigError(f"quantize must be one of {', '.join(FORMATS)}, not {quantize!r}.")
    kernels = library() if model.device.type == "cpu" else None
    if kernels and NativeRunner.supports(model, kernels):
        return NativeRunner(model, states, chunk_size, kernels, FORMATS[quantize] if quantize else None)
    if quantize:
        raise ConfigError("quantize needs the compiled kernels: a CPU, and a C compiler such as gcc or clang.")
    runner = CUDARunner if model.device.type == "cuda" else EagerRunner
    return runner(model, states, pads=batch_invariant)
