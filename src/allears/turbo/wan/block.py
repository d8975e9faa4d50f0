"""A Wan transformer block in few passes: each norm with what stands around it, and 8 bits where the next layer wants
them.

The block keeps the parts of the one that it replaces, under their names: weights, processors and hooks inside go on to
work. What it computes differs in rounding alone: float32 inside each pass, one rounding to the dtype of the tokens.

Shapes: B batch, N tokens, M positions of text (and image before it), C width, H heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.nn.attention_processors import WanProcessor, spec_of_layer
from allears.ops.attention import attention
from allears.ops.gemm.schemes import Quantised
from allears.ops.norm.fused import activate_quantised, gated_residual, layer_norm_modulated, residual_norm, rms_norm
from allears.ops.norm.rope import rotate

_CHILDREN = ("norm1", "attn1", "norm2", "attn2", "ffn", "norm3")


class FusedWanBlock(nn.Module):
    """In the place of diffusers' ``WanTransformerBlock``, in inference.

    Args:
        block: the block; its attention runs on :class:`WanProcessor`.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        for name in _CHILDREN:
            self.add_module(name, getattr(block, name))
        self.scale_shift_table = block.scale_shift_table
        self.train(block.training)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states (B, M, C), temb (B, 6, C) or (B, N, 6, C), rotary cosines and
        sines (1, N, 1, D), to (B, N, C).

        Raises:
            ValueError: gradients are asked for.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ValueError(
                "hidden_states: require a gradient, but fused blocks have none; call turbo.restore to train"
            )
        parts: Any = self
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation(self.scale_shift_table, temb)
        x = hidden_states
        y = layer_norm_modulated(x, scale, shift, eps=parts.norm1.eps, scheme=first_scheme(parts.attn1))
        y = self_attention(parts.attn1, y, rotary_emb)
        norm = parts.norm2
        if isinstance(norm, nn.Identity):
            x = gated_residual(x, y, gate)
            y = x
        else:
            x, y = residual_norm(
                x, y, gate, weight=norm.weight, bias=norm.bias, eps=norm.eps, scheme=scheme_of_layer(parts.attn2.to_q)
            )
        y = cross_attention(parts.attn2, y, encoder_hidden_states)
        up, down = parts.ffn.net[0].proj, parts.ffn.net[2]
        x, y = residual_norm(
            x, y, None, scale=scale_ff, shift=shift_ff, eps=parts.norm3.eps, scheme=scheme_of_layer(up)
        )
        y, scheme = up(y), scheme_of_layer(down)
        y = F.gelu(y, approximate="tanh") if scheme is None else activate_quantised(y, "gelu_tanh", scheme)
        return gated_residual(x, down(y), gate_ff)


def refuses(block: Any) -> str:
    """Why a block cannot be replaced by :class:`FusedWanBlock`; empty if it can."""
    if type(block).__name__ != "WanTransformerBlock":
        return f"is a {type(block).__name__}" + (
            "; accelerate before torch.compile" if "Optimized" in type(block).__name__ else ""
        )
    if any(hasattr(block, name) for name in ("_diffusers_hook", "_hf_hook")):
        return "has a hook of diffusers (cache or offload); disable it first"
    for attn in (block.attn1, block.attn2):
        if not isinstance(attn.processor, WanProcessor):
            return f"its attention runs on {type(attn.processor).__name__}"
    net = block.ffn.net
    if getattr(net[0], "approximate", None) != "tanh" or not hasattr(net[0], "proj") or len(net) != 3:
        return "its feed-forward part is not linear, GELU (tanh), linear"
    return ""


def modulation(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """table (1, 6, C) and temb (B, 6, C) or (B, N, 6, C) to six shifts, scales and gates (B, 1 or N, C), float32."""
    if temb.dim() == 4:
        return tuple(part.squeeze(2) for part in (table.unsqueeze(0).float() + temb.float()).chunk(6, dim=2))
    return (table.float() + temb.float()).chunk(6, dim=1)


def scheme_of_layer(layer: Any) -> str | None:
    """The 8-bit numbers that a layer reads; ``None``: 16-bit ones."""
    scheme = getattr(layer, "scheme", None)
    return getattr(scheme, "name", scheme)


def first_scheme(attn: Any) -> str | None:
    """That of the layers that read the input of self-attention: 16 bits where they do not agree."""
    layers = [attn.to_qkv] if attn.fused_projections else [attn.to_q, attn.to_k, attn.to_v]
    schemes = {scheme_of_layer(layer) for layer in layers}
    return schemes.pop() if len(schemes) == 1 else None


def self_attention(attn: Any, x: Tensor | Quantised, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x of (B, N, C) to (B, N, C), the output layer included."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in (q, k, v))
    cos, sin = rotary[0][0, :, 0, 0::2].contiguous(), rotary[1][0, :, 0, 1::2].contiguous()
    q = rotate(q, cos, sin, weight=attn.norm_q.weight, norm=True, eps=_eps(attn.norm_q))
    k = rotate(k, cos, sin, weight=attn.norm_k.weight, norm=True, eps=_eps(attn.norm_k))
    processor = attn.processor
    if processor.attend is None:
        y = attention(q, k, v, processor.spec)
    else:
        y = processor.attend(attn, q, k, v, processor.spec, None)
    return attn.to_out[0](y.flatten(2))


def cross_attention(attn: Any, x: Tensor | Quantised, context: Tensor) -> Tensor:
    """x of (B, N, C) and context (B, M, C) to (B, N, C), the output layer included."""
    processor, of_picture, picture = attn.processor, attn.add_k_proj, None
    spec = spec_of_layer(processor.spec, cross=True)
    if of_picture is not None:
        split = context.shape[1] - processor.text_length
        picture, context = context[:, :split], context[:, split:]
    q = _heads(attn, rms_norm(attn.to_q(x), attn.norm_q.weight, _eps(attn.norm_q)))
    if attn.fused_projections:
        k, v = attn.to_kv(context).chunk(2, dim=-1)
    else:
        k, v = attn.to_k(context), attn.to_v(context)
    k, v = _heads(attn, rms_norm(k, attn.norm_k.weight, _eps(attn.norm_k))), _heads(attn, v)
    if processor.attend is None:
        y = attention(q, k, v, spec)
    else:
        y = processor.attend(attn, q, k, v, spec, None)
    if picture is not None:
        if attn.fused_projections:
            k, v = attn.to_added_kv(picture).chunk(2, dim=-1)
        else:
            k, v = of_picture(picture), attn.add_v_proj(picture)
        k, v = _heads(attn, rms_norm(k, attn.norm_added_k.weight, _eps(attn.norm_added_k))), _heads(attn, v)
        y = y + attention(q, k, v, spec)
    return attn.to_out[0](y.flatten(2))


def _heads(attn: Any, x: Any) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


def _eps(norm: nn.RMSNorm) -> float:
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
