"""Numbers that all forms of the recurrence share: PyTorch's, Triton's and C's. Nothing here imports PyTorch."""

from __future__ import annotations

import math

REFERENCE_SLACK = 16.0  # nats by which a key may exceed the reference of the running sums before that moves
LOW_SUM = math.exp(-REFERENCE_SLACK)  # sums that decay below it get a lower reference
LARGEST_KEY = 1e38  # so that no difference of two keys overflows
EMPTY_REFERENCE = -3.4028234663852886e38  # the lowest float32; finite, so that no difference of references is NaN
KEY_BLOCK = 64  # keys that C takes together, side by side in vectors
