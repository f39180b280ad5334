"""Linear layers whose matrices lie as kernels.c reads them fastest, in float32 or int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.native import operations
from model.native.library import Library, Operation
from model.native.operations import Activation
from model.transformer import AFTForCausalLM


class PackedLinear(nn.Module):
    """x W^T + bias, for reading only. A row of the result does not depend on the other rows.

    panels [ceil(N / P), K, P]: P columns of W^T each; with int8, W = scale [N] * whole numbers from -127 to 127, and
    only the weights are rounded.
    """

    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Library, *, int8: bool = False) -> None:
        """weight [N, K]"""
        super().__init__()
        self._kernels, self.n_out = kernels, weight.shape[0]
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127 if int8 else None
        if scale is not None:
            weight = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        width = kernels.panel_width
        padded = F.pad(weight, (0, 0, 0, -self.n_out % width))
        self.register_buffer("panels", padded.view(-1, width, weight.shape[1]).transpose(1, 2).contiguous())
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


def pack(model: AFTForCausalLM, kernels: Library, *, int8: bool = False) -> AFTForCausalLM:
    """The model with packed matrices, in float32 or int8, for reading only; it shares what is no matrix."""
    packed = AFTForCausalLM.empty(model.config)
    packed.load_state_dict(model.state_dict(), assign=True)
    packed.float().eval().requires_grad_(False)
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, kernels, int8=int8))
    if packed.head is None:
        packed.head = PackedLinear(packed.embedding.weight, None, kernels, int8=int8)
    return packed
