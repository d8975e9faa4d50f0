"""What the attention layers of a model take in a forward pass, and the model with other attention in them.

Shapes: B batch, L positions, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from allears.nn.attention import SelfAttention
from allears.ops.attention import AttentionSpec

from .clips import spread


class Recorded(NamedTuple):
    """What one attention layer took: q (B, L, H, D), k and v (B, L, G, D), float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float | None


@contextmanager
def recording(model: nn.Module, sequences: Callable[[str], int]) -> Iterator[dict[str, Recorded]]:
    """Record what every :class:`SelfAttention` of ``model`` takes in its forward, by the name of the layer.

    Args:
        model: any module that holds :class:`SelfAttention`.
        sequences: name of a layer to how many of its B sequences are kept, evenly from the first to the last.

    Raises:
        ValueError: the model holds none; or, in its forward, a layer has a mask, which low-bit attention does not take.
    """
    found: dict[str, Recorded] = {}
    hooks = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = dict(zip(("x", "mask", "offset"), arguments, strict=False)) | named
            if given.get("mask") is not None:
                raise ValueError(f"model: layer {name!r} attends with a mask, which low-bit attention does not take")
            x: Tensor = given["x"]
            chosen = torch.tensor(spread(x.shape[0], sequences(name)))
            q, k, v = (part.float().clone() for part in module._project(x[chosen], given.get("offset", 0)))
            found[name] = Recorded(q, k, v, module.spec.causal, module.spec.scale)

        return hook

    for name, module in layers(model).items():
        hooks.append(module.register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_of(model: nn.Module, spec: AttentionSpec) -> Iterator[None]:
    """Run every :class:`SelfAttention` of ``model`` by another spec, of which causal and scale are not read.

    Raises:
        ValueError: the model holds no such layer.
    """
    own = {module: module.spec for module in layers(model).values()}
    try:
        for module, before in own.items():
            module.spec = replace(spec, causal=before.causal, scale=before.scale)
        yield
    finally:
        for module, before in own.items():
            module.spec = before


def layers(model: nn.Module) -> dict[str, SelfAttention]:
    """Every :class:`SelfAttention` of ``model`` by its name.

    Raises:
        ValueError: it has none.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, SelfAttention)}
    if not found:
        raise ValueError(f"model: {type(model).__name__} holds no SelfAttention; give a model that has some")
    return found
