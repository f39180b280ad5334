"""What a product with a matrix may end in."""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    """Known in C as ACTIVATION_<name>."""

    NONE, GELU, RELU_SQUARED = range(3)
