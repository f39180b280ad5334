"""Threads of a process that generates."""

from __future__ import annotations

import math
from pathlib import Path

import torch

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores in a period, and the period's


def use_threads(threads: int | None) -> None:
    """CPU threads of a step; None is one for each core, as far as a container's quota goes.

    To be called before a model is loaded: its kernels and the layout of its matrices are made for that many.
    """
    torch.set_num_threads(threads or available_cores())


def available_cores() -> int:
    """A container may be allowed less than PyTorch sees."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # "max", or no cgroup
        return torch.get_num_threads()
    return max(1, min(allowed, torch.get_num_threads()))
