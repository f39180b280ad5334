"""The device that a model runs on."""

from __future__ import annotations

import torch

from server.errors import ConfigurationError

CPU_ONLY = " This PyTorch was built without CUDA; https://pytorch.org/get-started/locally has the others."


def find_device(name: str) -> torch.device:
    """Raises ConfigurationError, which names those that there are and what to do, for a device that is not here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"]
    if accelerator:
        here += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        hint = CPU_ONLY if name.startswith("cuda") and torch.version.cuda is None else ""
        raise ConfigurationError(f"device must be {' or '.join(here)} on this machine, not {name!r}.{hint}")
    return torch.device(name)
