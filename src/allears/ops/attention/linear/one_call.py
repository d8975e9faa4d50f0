"""What the kernels of linear attention, Triton's and those in CUDA C++, are told of one call, and of its GPU."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True)
class Call:
    """A call but for its tensors' values.

    Args:
        kind, power, norm, eps: see ``LinearOptions``.
        cu: (S + 1,) offsets of packed sequences, or None.
        lengths: (B,) numbers of keys, or None.
    """

    kind: str
    power: int
    norm: str
    eps: float
    cu: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def joint(self) -> bool:
        """Whether the heads of a row share a norm."""
        return self.kind == "focused" and self.power > 1 and self.norm == "channels"

    def entries(self, x: Tensor) -> int:
        return self.cu.shape[0] - 1 if self.cu is not None else x.shape[0]


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for Triton's interpreter."""
    return _processors(device.index) if device.type == "cuda" else _INTERPRETED_PROCESSORS


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
