"""Choosing a device by name."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resolve_device(name: "str | torch.device" = "auto") -> "torch.device":
    """``auto`` takes CUDA where a GPU answers and the CPU elsewhere; any other name is taken as it is.

    A GPU without a number is, in a process that ``torchrun`` started, that of its local rank.

    Raises:
        ValueError: the name is no device, or names one that this machine lacks.
    """
    import torch

    if isinstance(name, str) and name == "auto":
        return _own(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not a device; use 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} was asked for, but torch finds no CUDA GPU here; use 'cpu' or 'auto'")
    return _own(device)


def _own(device: "torch.device") -> "torch.device":
    import torch

    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
