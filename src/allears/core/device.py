"""Choosing a device by name, and how exactly it multiplies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

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


@contextmanager
def matmul_precision(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Products of float32 matrices in float32 (``highest``) or, on a GPU, in TF32 (``high``): in a block or, as a
    decorator, in a function. Afterwards the process has what it had before.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
