"""AFT's recurrence of one token as one Triton kernel: what `AFT.step_` does, in place, for GPUs.

Shapes as in recurrences/aft.py: B sequences, H keys per token, D features per key, W = window - 1.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.recurrences.aft import AFT, state_of
from model.recurrences.aft_functions import decay_factors
from model.recurrences.limits import EMPTY_REFERENCE, LARGEST_KEY, LOW_SUM, REFERENCE_SLACK

FEATURES_PER_PROGRAM = 64


def step_(recurrence: AFT, rows: Sequence[Tensor], layer: Any, position: Tensor) -> Tensor:
    """As `AFT.step_`; the layer's tensors are contiguous."""
    query, key, value = (row.float().contiguous() for row in rows)
    bias, decay = recurrence.by_distance(position).contiguous(), recurrence.decay
    running, window = state_of(layer)
    batch_size, n_key = key.shape
    d_key, n_window = value.shape[1] // n_key, 0 if window is None else window.keys.shape[1]
    output = torch.empty_like(value)
    block_d = triton.next_power_of_2(d_key)
    block_h = max(1, FEATURES_PER_PROGRAM // block_d) if d_key == 1 else 1
    _step[(batch_size, triton.cdiv(n_key, block_h))](
        query,
        key,
        value,
        bias,
        position,
        *running,
        *(window or running[:2]),  # not looked at without a window
        bias if decay is None else decay_factors(decay),
        output,
        n_key,
        d_key,
        n_window,
        bias.stride(0) if bias.shape[0] > 1 else 0,
        SHARED_BIAS=bias.shape[2] == 1,
        HAS_WINDOW=n_window > 0,
        HAS_DECAY=decay is not None,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        SLACK=REFERENCE_SLACK,
        LOW=LOW_SUM,
        LOWEST=EMPTY_REFERENCE,
        LARGEST=LARGEST_KEY,
    )
    return output.to(rows[0].dtype)


@triton.jit
def _step(
    queries,
    new_keys,
    new_values,
    bias,
    position,
    reference,
    sums,
    compensation,
    keys,
    values,
    decay,
    output,
    n_key,
    d_key,
    n_window,
    bias_stride,
    SHARED_BIAS: tl.constexpr,  # noqa: N803
    HAS_WINDOW: tl.constexpr,  # noqa: N803
    HAS_DECAY: tl.constexpr,  # noqa: N803
    BLOCK_H: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    SLACK: tl.constexpr,  # noqa: N803
    LOW: tl.constexpr,  # noqa: N803
    LOWEST: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_key = h < n_key
    is_value = is_key[:, None] & (d < d_key)[None, :]
    width = n_key * d_key
    feature = h[:, None] * d_key + d[None, :]
    query = tl.load(queries + row * width + feature, mask=is_value, other=0.0)
    key = tl.load(new_keys + row * n_key + h, mask=is_key, other=0.0)
    key = tl.minimum(tl.maximum(key, -LARGEST), LARGEST)
    value = tl.load(new_values + row * width + feature, mask=is_value, other=0.0)
    before = tl.load(reference + row * n_key + h, mask=is_key, other=0.0)
    ring_keys = keys + row * n_window * n_key + h
    ring_values = values + row * n_window * width + feature
    stride = 1 if SHARED_BIAS else n_key
    biases = bias + row * bias_stride + (h * 0 if SHARED_BIAS else h)
    slot = tl.load(position + row) % n_window if HAS_WINDOW else 0

    # Largest key first, then the bias: k + w alone would round to 1e-5 at |k| = 200.
    top = tl.maximum(key, before)
    for j in range(n_window):
        top = tl.maximum(top, tl.load(ring_keys + j * n_key, mask=is_key, other=0.0))
    own = (key - top) + tl.load(biases, mask=is_key, other=0.0)
    carried = before - top
    peak = tl.maximum(own, carried)
    for j in range(n_window):
        distance = tl.where(slot > j, slot - j, slot + n_window - j)
        logit = tl.load(ring_keys + j * n_key, mask=is_key, other=0.0) - top
        peak = tl.maximum(peak, logit + tl.load(biases + distance * stride, mask=is_key, other=0.0))

    own, carried = tl.exp(own - peak), tl.exp(carried - peak)
    at = row * n_key * (d_key + 1) + h * (d_key + 1)
    ats = at[:, None] + d[None, :]
    sum_v, sum_1 = tl.load(sums + ats, mask=is_value, other=0.0), tl.load(sums + at + d_key, mask=is_key, other=0.0)
    lost_v = tl.load(compensation + ats, mask=is_value, other=0.0)
    lost_1 = tl.load(compensation + at + d_key, mask=is_key, other=0.0)
    numerator = own[:, None] * value + carried[:, None] * (sum_v + lost_v)
    denominator = own + carried * (sum_1 + lost_1)
    for j in range(n_window):
        distance = tl.where(slot > j, slot - j, slot + n_window - j)
        logit = tl.load(ring_keys + j * n_key, mask=is_key, other=0.0) - top
        weight = tl.exp(logit + tl.load(biases + distance * stride, mask=is_key, other=0.0) - peak)
        numerator += weight[:, None] * tl.load(ring_values + j * width, mask=is_value, other=0.0)
        denominator += weight
    average = numerator / denominator[:, None]
    tl.store(output + row * width + feature, average / (1.0 + tl.exp(-query)), mask=is_value)

    # The token takes the slot of the one that leaves the window, which goes into the running sums (absorb).
    leaving_key, leaving_value = key, value
    if HAS_WINDOW:
        leaving_key = tl.load(ring_keys + slot * n_key, mask=is_key, other=0.0)
        leaving_value = tl.load(ring_values + slot * width, mask=is_value, other=0.0)
        tl.store(ring_keys + slot * n_key, key, mask=is_key)
        tl.store(ring_values + slot * width, value, mask=is_value)
    faded, sunk = 0.0 * before, before
    if HAS_DECAY:  # _sunk
        faded = tl.load(decay + h, mask=is_key, other=0.0)
        sinks_by = tl.where(sum_1 * tl.exp(-faded) < LOW, SLACK * tl.ceil(faded / SLACK), 0.0)
        sunk = tl.maximum(before - sinks_by, LOWEST)
    after = tl.where(leaving_key > sunk + SLACK, leaving_key, sunk)
    scale, weight = tl.exp((before - after) - faded), tl.exp(leaving_key - after)
    change = 0.0 * before
    if HAS_DECAY:  # _decayed
        is_kept = before == after
        scale = tl.where(is_kept, tl.load(decay + n_key + h, mask=is_key, other=0.0), scale)
        change = tl.where(is_kept, tl.load(decay + 2 * n_key + h, mask=is_key, other=0.0), 0.0)
    scaled = sum_v * scale[:, None]
    added = weight[:, None] * leaving_value + sum_v * change[:, None]
    total = scaled + added
    rounded = total - scaled
    lost = (scaled - (total - rounded)) + (added - rounded)
    tl.store(sums + ats, total, mask=is_value)
    tl.store(compensation + ats, lost_v * (scale + change)[:, None] + lost, mask=is_value)
    scaled_1, added_1 = sum_1 * scale, weight + sum_1 * change
    total_1 = scaled_1 + added_1
    rounded_1 = total_1 - scaled_1
    lost_of_1 = (scaled_1 - (total_1 - rounded_1)) + (added_1 - rounded_1)
    tl.store(sums + at + d_key, total_1, mask=is_key)
    tl.store(compensation + at + d_key, lost_1 * (scale + change) + lost_of_1, mask=is_key)
    tl.store(reference + row * n_key + h, after, mask=is_key)
