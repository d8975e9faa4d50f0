"""What the tests of the Triton kernels share."""

import math

import pytest
import torch

empty = torch.empty


def poisoned(*shape, **how):
    """torch.empty, full of what a kernel must overwrite."""
    tensor = empty(*shape, **how)
    if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.is_floating_point():
        tensor.fill_(math.nan)
    return tensor


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is full of NaN, and on a machine without a GPU Triton interprets its kernels."""
    from allears.ops.attention.lowbit import triton_host

    if triton_host.on_hardware() and not torch.cuda.is_available():
        pytest.fail("Triton was imported for a GPU before this file: set TRITON_INTERPRET=1 for the whole test run")
    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)
