"""The AFT operation as plain loops in float64, straight from the paper's formula.

Of `model` it knows where parameters are, and no code.

Shapes: T tokens, H keys per token, D features per key. One sequence, no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model.families.aft import ConvBias, FactorisedBias
from model.families.rwkv4 import DecayBias
from model.recurrences.aft import AFT

Bias = Callable[[int, int, int], Tensor]  # (h, t, t') -> w, a float64 scalar


def aft_reference(keys: Tensor, values: Tensor, w: Bias, rows: Iterable[int] | None = None) -> Tensor:
    """keys [T, H], values [T, H, D] -> y [len(rows), H, D], for all T rows if none are named."""
    keys, values = keys.double(), values.double()
    n_tokens, n_key = keys.shape
    output = []
    for t in range(n_tokens) if rows is None else rows:
        heads = []
        for h in range(n_key):
            logits = torch.stack([keys[s, h] + w(h, t, s) for s in range(t + 1)])
            weights = torch.exp(logits - logits.max())
            heads.append((weights.unsqueeze(-1) * values[: t + 1, h]).sum(0) / weights.sum())
        output.append(torch.stack(heads))
    return torch.stack(output)


def reference_bias(bias: AFT) -> Bias:
    """w_{t,t'} of a bias module, computed in float64 from its parameters."""
    zero = torch.zeros((), dtype=torch.float64)
    if isinstance(bias, ConvBias):
        weight, gamma, beta = bias.weight.double(), bias.gamma.double(), bias.beta.double()
        mean = weight.mean(-1, keepdim=True)
        std = (((weight - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()
        by_distance = gamma * (weight - mean) / std + beta
        return lambda h, t, s: by_distance[h, t - s] if t - s < bias.window else zero
    if isinstance(bias, FactorisedBias):
        query, key = bias.query.double(), bias.key.double()
        return lambda h, t, s: (query[t] * key[s]).sum() if t - s < bias.window else zero
    if isinstance(bias, DecayBias):
        decay, first = bias.time_decay.double().exp(), bias.time_first.double()
        return lambda h, t, s: first[h] if s == t else -(t - 1 - s) * decay[h]
    return lambda h, t, s: zero
