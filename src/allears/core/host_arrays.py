"""Small arrays of the host on their way to a device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(device: torch.device, values: Any, kind: Any = np.float32) -> Tensor:
    """A small host array on ``device`` without waiting for the work that is queued there."""
    tensor = torch.from_numpy(np.asarray(values, dtype=kind))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
