"""Audio read between its samples: faster, slower, shifted; one stretch or a batch of them laid in their places."""

from allears.ops.resample.call import lay, read_at
from allears.ops.resample.stretches import Stretches

__all__ = ["Stretches", "lay", "read_at"]
