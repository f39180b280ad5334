"""The device that a model runs on."""

from __future__ import annotations

import torch

from server.errors import ConfigurationError


def find_device(name: str) -> torch.device:
    """Raises ConfigurationError, which names those that there are, for a device that is not here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"]
    if accelerator:
        here += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ConfigurationError(f"device must be {' or '.join(here)} on this machine, not {name!r}.")
    return torch.device(name)
