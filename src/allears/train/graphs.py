"""Forward and backward passes as CUDA graphs: a network of many small kernels costs one launch a pass."""

from typing import Any

import torch
from torch import Tensor, nn


def graphed(model: nn.Module, *samples: Tensor) -> nn.Module:
    """``model`` with its training passes captured for inputs shaped as ``samples``, by
    ``torch.cuda.make_graphed_callables``: in training it replays them, in evaluation it runs as before.

    Call it in the autocast that training has. The captured passes keep their memory, and take that shape alone.

    Raises:
        ValueError: the samples are not on a CUDA device.
    """
    if any(sample.device.type != "cuda" for sample in samples):
        raise ValueError(f"samples: on {samples[0].device}; CUDA graphs take tensors on a CUDA device")
    kind = "cuda"
    inputs: Any = tuple(sample.detach().clone() for sample in samples)
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):  # a graph outlives the cache of casts
        return torch.cuda.make_graphed_callables(model, inputs)  # type: ignore
