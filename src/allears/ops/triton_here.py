"""Whether Triton's kernels can run on this machine, and how."""

import importlib.util
import os

import torch

from allears.ops.constant import constant_in_graphs


@constant_in_graphs
def triton_missing() -> str:
    """Why Triton's kernels cannot run here, or ``""``."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'allears[gpu]'"
    return "" if torch.cuda.is_available() or interpreted() else "no CUDA GPU answers"


@constant_in_graphs
def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, as it does where TRITON_INTERPRET=1 is set."""
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    from allears.ops.attention.lowbit.triton_quant import on_hardware

    return not on_hardware()
