"""A call of a compiled kernel, written down: what families and the native backend both know of C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Field = tuple[str, type[ctypes.c_int64] | type[ctypes.c_double] | type[ctypes.c_void_p]]


def whole(*names: str) -> list[Field]:
    """Fields of the C type int64_t; also of truth values."""
    return [(name, ctypes.c_int64) for name in names]


def real(*names: str) -> list[Field]:
    """Fields of the C type double."""
    return [(name, ctypes.c_double) for name in names]


def pointers(*names: str) -> list[Field]:
    """Fields that point at a tensor's first element, or at nothing."""
    return [(name, ctypes.c_void_p) for name in names]


class Kernel(ctypes.Structure):
    """The arguments of one call of the C function `function`, by the names of its structure in C.

    A subclass has that function's name and its `_fields_`, in the order of the C structure. A tensor stands for the
    address of its first element, None for none; what the tensors must look like is said in C, beside the structure.
    Tensors are kept as long as the call is.
    """

    function: str

    def __init__(self, **fields: int | float | Tensor | None) -> None:
        """All fields, by name."""
        expected = {field[0] for field in self._fields_}
        if fields.keys() != expected:
            raise TypeError(f"{self.function} takes {sorted(expected)}, not {sorted(fields)}.")
        self.tensors = tuple(value for value in fields.values() if isinstance(value, Tensor))
        given = {name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in fields.items()}
        super().__init__(**given)


class Rows:
    """Memory that kernels fill: rows [n_rows, width] of tokens, or any other shape.

    `release` is called, with the whole of the memory, when the last reference to it and to its parts is gone: a
    description that lets go of what it needs no more makes room for what comes.
    """

    def __init__(self, tensor: Tensor, release: Callable[[Tensor], None] | None = None, of: Rows | None = None) -> None:
        self.tensor, self._release, self._of = tensor, release, of

    def part(self, tensor: Tensor) -> Rows:
        """A view of this memory, which keeps it."""
        return Rows(tensor, of=self)

    def __del__(self) -> None:
        if self._release:
            self._release(self.tensor)


class Program(Protocol):
    """A list of kernels in the making, for at most n_rows tokens: one of each of a batch of sequences, or, if it is for
    one_sequence, successive ones. positions [n_rows] int64, of the tokens.
    """

    n_rows: int
    n_threads: int
    one_sequence: bool
    positions: Tensor

    def memory(self, *shape: int) -> Rows:
        """Room for what a kernel computes, float32."""

    def add(self, kernel: Kernel) -> None:
        """The next kernel to be run."""
