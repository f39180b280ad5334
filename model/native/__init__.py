"""Models on CPUs in C: matrices packed, and a pass through the model run as one list of operations."""

from model.native.library import library
from model.native.linear import PackedLinear, pack
from model.native.runner import NativeRunner

__all__ = ["NativeRunner", "PackedLinear", "library", "pack"]
