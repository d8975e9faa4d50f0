"""Something else in the place of a model's attention, layer by layer, whichever library the model is of.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from allears.nn.attention import CrossAttention, SelfAttention
from allears.nn.attention_hooks import AttentionHandle, use_attention
from allears.ops.attention import AttentionSpec

Tap = Callable[[str, Tensor, Tensor, Tensor, AttentionSpec, Tensor | None], Tensor]
"""(name of the layer, q (B, L_q, H, D), k and v (B, L_k, G, D), spec, mask) to (B, L_q, H, D)."""


def own_layers(model: nn.Module) -> dict[str, SelfAttention | CrossAttention]:
    """Our attention layers of ``model`` by name; empty if it has none."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SelfAttention | CrossAttention)}


def tap(model: nn.Module, run: Tap) -> AttentionHandle:
    """Let ``run`` attend in every layer until the handle is undone, or its ``with`` block left.

    Models with our :class:`SelfAttention` and :class:`CrossAttention` are tapped in these; models of ``transformers``
    and ``diffusers`` by :func:`use_attention`.

    Raises:
        ValueError: the model has neither, or one of our layers has a core already.
    """
    layers = own_layers(model)
    if not layers:
        names = {part: name for name, part in model.named_modules()}

        def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
            return run(names[layer], q, k, v, spec, mask)

        return use_attention(model, attend=attend)
    for name, layer in layers.items():
        if layer.core is not None:
            raise ValueError(
                f"model: layer {name!r} has a core ({type(layer.core).__name__}) already; restore the model first"
            )
    for name, layer in layers.items():
        layer.core = _Tapped(name, layer.spec, run)

    def restore() -> None:
        for layer in layers.values():
            layer.core = None

    return AttentionHandle(restore)


class _Tapped(nn.Module):
    def __init__(self, name: str, spec: AttentionSpec, run: Tap) -> None:
        super().__init__()
        self.name, self.spec, self.run = name, spec, run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.run(self.name, q, k, v, self.spec, mask)
