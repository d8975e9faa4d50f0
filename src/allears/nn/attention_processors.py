"""Attention processors for ``diffusers`` that run on our attention: the ``Attention`` module's and Wan's.

Written to the interface of those modules; nothing of the library is imported.

Shapes: B batch, L positions, M positions of the context, C channels, H heads, D head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from allears.nn.padding_masks import PaddingMasks
from allears.ops.attention import AttentionSpec, attention

Attend = Callable[[Any, Tensor, Tensor, Tensor, AttentionSpec, Tensor | None], Tensor]
"""(layer, q, k, v, spec, mask) to the output, in place of :func:`attention`; the layer is a module of the model."""

CROSS_STAYS_DENSE = "cross-attention: few keys; dense, on the exact kernels of this library"
"""Why a layer that looks at a context does not become sparse, in hooks and in plans of ``allears.turbo``."""


class StandardProcessor:
    """For diffusers' ``Attention`` module, in place of its ``AttnProcessor`` and ``AttnProcessor2_0``."""

    def __init__(self, spec: AttentionSpec, attend: Attend | None = None, masks: PaddingMasks | None = None) -> None:
        self.spec, self.attend, self.masks = spec, attend, masks or PaddingMasks()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, L, C) or an image (B, C, height, width), context (B, M, C'), to the shape of the former."""
        given, image = hidden_states, hidden_states.shape[2:] if hidden_states.dim() == 4 else None
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        x = x if image is None else x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q = attn.to_q(x).unflatten(-1, (attn.heads, -1))
        k, v = (to(context).unflatten(-1, (-1, q.shape[-1])) for to in (attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else _by_head(attn.norm_q, q)
        k = k if attn.norm_k is None else _by_head(attn.norm_k, k)
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[1], q.shape[0])
            mask = mask.unflatten(0, (q.shape[0], attn.heads))
        spec = replace(spec_of_layer(self.spec, _crosses(attn, encoder_hidden_states)), causal=False, scale=attn.scale)
        if self.attend is None:
            y = self.masks.attend(q, k, v, spec, mask, attention_mask)
        else:
            y = self.attend(attn, q, k, v, spec, mask)
        y = y.flatten(2).to(q.dtype)
        y = _leave(attn.to_out, y)
        y = y if image is None else y.transpose(1, 2).unflatten(2, image)
        y = y + given if attn.residual_connection else y
        return y / attn.rescale_output_factor


class WanProcessor:
    """For diffusers' ``WanAttention``: self- and cross-attention, and the second context of image-to-video."""

    def __init__(
        self,
        spec: AttentionSpec,
        attend: Attend | None = None,
        masks: PaddingMasks | None = None,
        text_length: int = 512,
    ) -> None:
        self.spec, self.attend, self.masks = spec, attend, masks or PaddingMasks()
        self.text_length = text_length

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, L, C), context (B, M, C'), rotary cosines and sines (1, L, 1, D), to (B, L, C).

        With an image the context is its features, then ``text_length`` positions of text.
        """
        context, picture = encoder_hidden_states, None
        if attn.add_k_proj is not None and context is not None:
            split = context.shape[1] - self.text_length
            picture, context = context[:, :split], context[:, split:]
        q, k, v = _wan_projections(attn, hidden_states, context)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotate_pairs(q, *rotary_emb), _rotate_pairs(k, *rotary_emb)
        spec = spec_of_layer(self.spec, _crosses(attn, encoder_hidden_states))
        if self.attend is None:
            y = self.masks.attend(q, k, v, spec, attention_mask)
        else:
            y = self.attend(attn, q, k, v, spec, attention_mask)
        y = y.flatten(2).to(q.dtype)
        if picture is not None:
            if attn.fused_projections:
                k, v = attn.to_added_kv(picture).chunk(2, dim=-1)
            else:
                k, v = attn.add_k_proj(picture), attn.add_v_proj(picture)
            k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_added_k(k), v))
            y = y + attention(q, k, v, spec).flatten(2).to(q.dtype)
        return _leave(attn.to_out, y)


_COUNTERPARTS = {
    "AttnProcessor": StandardProcessor,
    "AttnProcessor2_0": StandardProcessor,
    "WanAttnProcessor": WanProcessor,
    "WanAttnProcessor2_0": WanProcessor,
}


def make_processors(before: Mapping[str, Any], spec: AttentionSpec, attend: Attend | None = None) -> dict[str, Any]:
    """For each layer's processor its counterpart here. The few image keys of Wan's second context are not ``attend``'s.

    Raises:
        ValueError: a layer's processor has none, or spreads a sequence over several GPUs.
    """
    strange = {name: type(p).__name__ for name, p in before.items() if type(p).__name__ not in _COUNTERPARTS}
    if strange:
        name, kind = next(iter(strange.items()))
        raise ValueError(
            f"model: {len(strange)} of {len(before)} attention layers have no counterpart here ({name} runs {kind}); "
            f"known are {', '.join(_COUNTERPARTS)}"
        )
    for name, processor in before.items():
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError(f"model: {name} runs context-parallel, which is not supported; disable it first")
    masks = PaddingMasks()
    return {name: _COUNTERPARTS[type(processor).__name__](spec, attend, masks) for name, processor in before.items()}


def spec_of_layer(spec: AttentionSpec, cross: bool) -> AttentionSpec:
    """The same, but for cross-attention under a sparse spec: that stays dense and exact, with any kernel."""
    if spec.sparse is None or not cross:
        return spec
    return replace(spec, kernel="auto", numerics="exact", sparse=None)


def is_cross(layer: Any) -> bool:
    """Whether a layer of ``diffusers`` looks at a context, as far as it says so itself."""
    return bool(getattr(layer, "is_cross_attention", False))


def _crosses(layer: Any, context: Tensor | None) -> bool:
    return context is not None or is_cross(layer)


def _by_head(norm: Any, x: Tensor) -> Tensor:
    """A norm over (B, H, L, D), as the library calls it, on (B, L, H, D)."""
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _leave(layers: Any, y: Tensor) -> Tensor:
    """The output layer, then dropout."""
    return layers[1](layers[0](y))


def _wan_projections(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if not attn.fused_projections:
        context = x if context is None else context
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)
    if not attn.is_cross_attention:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, (k, v) = attn.to_q(x), attn.to_kv(x if context is None else context).chunk(2, dim=-1)
    return q, k, v


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over neighbouring channels (2i, 2i + 1); each angle stands twice in ``cos`` and ``sin``."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2).type_as(x)
