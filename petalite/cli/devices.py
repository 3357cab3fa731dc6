"""From a device's name to one that works here."""

from __future__ import annotations

import torch

from petalite.errors import PetaliteError


def usable_device(name: str) -> torch.device:
    """Raises PetaliteError with torch's reason if this machine or this torch has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:  # its text lists two dozen names, most of them of no use here
        raise PetaliteError(f"device {name!r} is not known (examples: cpu, cuda, cuda:1)") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PetaliteError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
