"""Making a trained model faster: sparse-linear attention fitted to it, 8-bit layers, fused blocks, few steps."""

from allears.turbo.accelerate import accelerate, restore, sla_cores
from allears.turbo.memory import MemoryEstimate, estimate_memory
from allears.turbo.plan import Item, LayerError, Plan
from allears.turbo.spec import Sparse, Steps, TurboSpec
from allears.turbo.wan.load import LoadedWan, load_experts, load_wan
from allears.turbo.wan.shapes import VideoSize, WanShape

__all__ = [
    "Item",
    "LayerError",
    "LoadedWan",
    "MemoryEstimate",
    "Plan",
    "Sparse",
    "Steps",
    "TurboSpec",
    "VideoSize",
    "WanShape",
    "accelerate",
    "estimate_memory",
    "load_experts",
    "load_wan",
    "restore",
    "sla_cores",
]
