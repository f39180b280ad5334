"""Matrices as the kernels read them fastest, in one of several formats.

Shapes: W [N, K], of x [..., K] -> [..., N]; P columns of W^T that lie together, a panel.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.activation import Activation
from model.backends.native import calls
from model.backends.native.compiler import Library


class Panels(NamedTuple):
    """tensor [ceil(N / P), K, P], the last columns padded by 0; scale [N], by which products are multiplied."""

    tensor: Tensor
    scale: Tensor | None


class Format(Protocol):
    """How weights are held. All is computed in float32."""

    @property
    def name(self) -> str:
        """As people choose it; the kernel that reads it is linear_<name>."""

    def pack(self, weight: Tensor, panel_width: int) -> Panels:
        """weight [N, K] of any dtype. Holds one copy in float32 at most."""

    def unpack(self, panels: Panels, n: int) -> Tensor:
        """The weight [N, K] that the kernel computes with, in float32."""


class Plain:
    """Numbers as they are, or rounded to a dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def pack(self, weight: Tensor, panel_width: int) -> Panels:
        return Panels(_panels(weight, panel_width, self.dtype), None)

    def unpack(self, panels: Panels, n: int) -> Tensor:
        return _rows(panels.tensor, n)


class Int8:
    """W = scale [N] * whole numbers from -127 to 127. Only weights are rounded: inputs and sums stay float32."""

    name = "int8"

    def pack(self, weight: Tensor, panel_width: int) -> Panels:
        largest = torch.maximum(weight.amax(1), -weight.amin(1)).float()
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = weight.to(torch.float32, copy=True).div_(scale.unsqueeze(1)).round_()
        return Panels(_panels(rounded, panel_width, torch.int8), scale)

    def unpack(self, panels: Panels, n: int) -> Tensor:
        assert panels.scale is not None
        return _rows(panels.tensor, n) * panels.scale.unsqueeze(1)


FLOAT32 = Plain("float32", torch.float32)
BFLOAT16 = Plain("bfloat16", torch.bfloat16)
FORMATS: dict[str, Format] = {each.name: each for each in (FLOAT32, BFLOAT16, Int8())}


def stored_format(dtype: torch.dtype) -> Format:
    """The smallest that loses nothing of a weight."""
    return BFLOAT16 if dtype == torch.bfloat16 else FLOAT32


def _panels(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    padded = torch.zeros(math.ceil(n / width) * width, k, dtype=dtype)
    padded[:n] = weight
    return padded.view(-1, width, k).transpose(1, 2)


def _rows(panels: Tensor, n: int) -> Tensor:
    return panels.transpose(1, 2).flatten(0, 1)[:n].float()


class HugePages:
    """Memory in pages of 2 MiB, where Linux has them: with one text, looking up a page every 4 KiB takes a tenth of the
    time that reading the weights does.
    """

    BLOCK_BYTES = 64 * 2**20
    ALIGNMENT = 4096

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The same tensor, contiguous, in this memory."""
        start = math.ceil(self._used / self.ALIGNMENT) * self.ALIGNMENT
        if start + tensor.nbytes > len(self._block):
            size = math.ceil(tensor.nbytes / self.BLOCK_BYTES) * self.BLOCK_BYTES
            self._block, start = torch.frombuffer(_pages(size), dtype=torch.uint8), 0
        self._used = start + tensor.nbytes
        return self._block[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _pages(n_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, n_bytes)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    with contextlib.suppress(OSError):  # a Linux built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class PackedMatrix:
    """x W^T + bias, for reading only. A row of the result does not depend on the other rows."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Library,
        weight_format: Format,
        memory: HugePages | None = None,
    ) -> None:
        """weight [N, K], bias [N]; memory: which it shares with others."""
        packed = weight_format.pack(weight.detach(), kernels.panel_width)
        self.format, self.n_out = weight_format, len(weight)
        self.panels = packed._replace(tensor=(memory or HugePages()).copy(packed.tensor))
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self._kernels = kernels

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.panels if part is not None)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N]"""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = x.new_empty(len(rows), self.n_out)
        self._kernels.tasks([self.call(rows, out)]).run(len(rows), torch.get_num_threads())
        return out.view(*x.shape[:-1], self.n_out)

    def call(
        self, x: Tensor, out: Tensor, *, activation: Activation = Activation.NONE, adds: bool = False
    ) -> calls.Linear:
        """The same as a part of a longer list: out [B, N] = the activation of it for x [B, K], or out + that."""
        panels, scale = self.panels
        name = self.format.name
        return calls.Linear(x, panels, scale, self.bias, out, format_name=name, activation=activation, adds=adds)
