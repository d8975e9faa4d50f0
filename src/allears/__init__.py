"""allears: full attention by listening. Clean, separate and generate sound on one attention engine.

Names are loaded on first use, so that ``import allears`` stays quick and needs no optional package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_LAZY = {
    "attention": "allears.ops.attention",
    "AttentionSpec": "allears.ops.attention",
    "LowBit": "allears.ops.attention",
    "explain": "allears.ops.attention",
    "key_lengths_from_mask": "allears.ops.attention",
    "use_attention": "allears.nn.attention_hooks",
    "Enhancer": "allears.models.enhance",
    "Separator": "allears.models.separate",
}

if TYPE_CHECKING:
    from allears.models.enhance import Enhancer as Enhancer
    from allears.models.separate import Separator as Separator
    from allears.nn.attention_hooks import use_attention as use_attention
    from allears.ops.attention import AttentionSpec as AttentionSpec
    from allears.ops.attention import LowBit as LowBit
    from allears.ops.attention import attention as attention
    from allears.ops.attention import explain as explain
    from allears.ops.attention import key_lengths_from_mask as key_lengths_from_mask

__all__ = [
    "AttentionSpec",
    "Enhancer",
    "LowBit",
    "Separator",
    "__version__",
    "attention",
    "explain",
    "key_lengths_from_mask",
    "use_attention",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'allears' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
