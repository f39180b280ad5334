"""Linear layers whose matrices lie as kernels.c reads them fastest, in float32, bfloat16 or int8."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.native import operations
from model.native.library import Library, Operation
from model.native.operations import Activation
from model.transformer import AFTForCausalLM


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


class PackedLinear(nn.Module):
    """x W^T + bias, for reading only. A row of the result does not depend on the other rows.

    panels [ceil(N / P), K, P]: P columns of W^T each, in bfloat16 if the weight is that, which loses nothing; with
    int8, W = scale [N] * whole numbers from -127 to 127, and only the weights are rounded. All is computed in float32.
    """

    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Library,
        *,
        int8: bool = False,
        memory: HugePages | None = None,
    ) -> None:
        """weight [N, K]; memory: which it shares with others."""
        super().__init__()
        self._kernels, self.n_out = kernels, weight.shape[0]
        weight = weight.detach()
        weight = weight if weight.dtype == torch.bfloat16 and not int8 else weight.float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127 if int8 else None
        if scale is not None:
            weight = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        width = kernels.panel_width
        padded = F.pad(weight, (0, 0, 0, -self.n_out % width))
        panels = padded.view(-1, width, weight.shape[1]).transpose(1, 2)
        self.register_buffer("panels", (memory or HugePages()).copy(panels))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N]"""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        output = x.new_empty(len(rows), self.n_out)
        calls = (Operation * 1)(self.operation(rows, output))
        self._kernels.run(calls, len(rows), torch.get_num_threads())
        return output.view(*x.shape[:-1], self.n_out)

    def operation(
        self, x: Tensor, output: Tensor, *, activation: Activation = Activation.NONE, adds: bool = False
    ) -> Operation:
        """The same as a part of a longer list: output = the activation of what `forward` gives, or output + that."""
        assert isinstance(self.panels, Tensor)
        return operations.linear(x, self.panels, self.scale, self.bias, output, activation=activation, adds=adds)


class WidenedEmbedding(nn.Embedding):
    """In bfloat16, half the bytes; the rows that are looked up are float32."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids).float()


def pack(model: AFTForCausalLM, kernels: Library, *, int8: bool = False) -> AFTForCausalLM:
    """The model with packed matrices, for reading only; it shares what is no matrix."""
    packed = AFTForCausalLM.empty(model.config)
    packed.load_state_dict(model.state_dict(), assign=True)
    packed.eval().requires_grad_(False)
    memory, embedding = HugePages(), model.embedding.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layer = PackedLinear(module.weight, module.bias, kernels, int8=int8, memory=memory)
            packed.set_submodule(name, layer)
    if packed.head is None:
        packed.head = PackedLinear(embedding, None, kernels, int8=int8, memory=memory)
    if embedding.dtype == torch.bfloat16:
        packed.embedding = WidenedEmbedding(*embedding.shape, _weight=embedding)  # type: ignore[misc]
    for module in packed.modules():  # what is left is small, but for an embedding in float16
        if not isinstance(module, WidenedEmbedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return packed
