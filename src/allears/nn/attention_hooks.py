"""Run a model of ``transformers`` or ``diffusers`` on our attention through that library's public hooks, and undo it.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.errors import require
from allears.nn.attention_processors import CROSS_STAYS_DENSE, Attend, is_cross, make_processors, spec_of_layer
from allears.nn.padding_masks import PaddingMasks
from allears.ops.attention import AttentionSpec

_registered: dict[tuple[AttentionSpec, Attend | None], str] = {}

_UNSUPPORTED = {
    "softcap": "a cap on the logits",
    "s_aux": "attention sinks",
    "head_mask": "a mask over heads",
}

_CROSS_CLASS = re.compile(r"Cross\w*Attention$")
_CROSS_NAME = re.compile(r"cross_?att|encoder_att|encdec", re.IGNORECASE)
_CROSS_MARK = "_allears_cross"


class AttentionHandle:
    """What :func:`use_attention` gives back: ``undo()`` restores the model, and so does leaving a ``with`` block.

    ``stays_dense`` says of a sparse spec which layers, by name, it does not reach, and why.
    """

    def __init__(self, restore: Callable[[], None], stays_dense: Mapping[str, str] | None = None) -> None:
        self._restore: Callable[[], None] | None = restore
        self.stays_dense = dict(stays_dense or {})

    def undo(self) -> None:
        """Give the model its own attention back. The second call does nothing."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def __enter__(self) -> "AttentionHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def use_attention(model: nn.Module, spec: AttentionSpec | None = None, attend: Attend | None = None) -> AttentionHandle:
    """Swap a model's attention for ours: ``with use_attention(model, spec): ...``, or keep the handle and ``undo()``.

    ``transformers``: any model whose attention goes through ``ALL_ATTENTION_FUNCTIONS``; masks come from its mask
    interface, as booleans. ``diffusers``: models whose layers are its ``Attention`` with the standard processor
    (UNets, DiT and their kin), and Wan's transformer. Weights are not touched.

    Low-bit and sparse kernels take no masks. A mask that hides padding behind the keys of each entry reaches them as
    lengths, for which its values are read: once a forward, and that waits for the GPU. Others are refused.

    Args:
        model: a ``transformers`` or ``diffusers`` model (of a pipeline: ``pipe.transformer`` or ``pipe.unet``).
        spec: which attention. ``causal`` and ``scale`` are the model's own and must be left as they are. With
            ``sparse``, cross-attention stays dense and exact, since its keys are few: ``stays_dense`` of the handle
            lists it. (In ``transformers`` it is known by the names of module and class.)
        attend: runs in place of :func:`attention`, and is told which layer asks.

    Raises:
        ValueError: the model has no such hook, one of its layers has no counterpart here, or the spec sets ``causal``
            or ``scale``. Later, in its forward: dropout inside attention, returned attention weights, or whatever the
            kernel that was asked for refuses.
    """
    spec = spec or AttentionSpec()
    if spec.causal or spec.scale is not None:
        raise ValueError("spec: causal or scale given; the model decides both in each layer, so leave them unset")
    if hasattr(model, "set_attn_implementation"):
        return _hook_transformers(model, spec, attend)
    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if hasattr(part, "set_processor")}
    if layers:
        return _hook_diffusers(layers, spec, attend)
    parts = [name for name in ("transformer", "unet") if getattr(model, name, None) is not None]
    fix = f"give its {' or '.join(parts)}" if parts else "give a transformers or diffusers model"
    raise ValueError(f"model: {type(model).__name__} has no hook for attention; {fix}")


def _hook_diffusers(layers: dict[str, Any], spec: AttentionSpec, attend: Attend | None) -> AttentionHandle:
    before = {name: layer.get_processor() for name, layer in layers.items()}
    after = make_processors(before, spec, attend)

    def install(processors: dict[str, Any]) -> None:
        for name, layer in layers.items():
            layer.set_processor(processors[name])

    install(after)
    cross = [name for name, layer in layers.items() if spec.sparse is not None and is_cross(layer)]
    return AttentionHandle(lambda: install(before), dict.fromkeys(cross, CROSS_STAYS_DENSE))


def _hook_transformers(model: Any, spec: AttentionSpec, attend: Attend | None) -> AttentionHandle:
    name = _register(spec, attend)
    before = _implementations(model.config)
    cross = _cross_layers(model) if spec.sparse is not None else {}
    marked = [part for layer in cross.values() for part in layer.modules() if not hasattr(part, _CROSS_MARK)]

    def restore() -> None:
        model.set_attn_implementation(before)
        for part in marked:
            delattr(part, _CROSS_MARK)

    handle = AttentionHandle(restore, dict.fromkeys(cross, CROSS_STAYS_DENSE))
    for part in marked:
        setattr(part, _CROSS_MARK, True)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        handle.undo()
        raise ValueError(
            f"model: {type(model).__name__} does not let its attention be set; its layers do not go through "
            f"transformers' AttentionInterface"
        )
    return handle


def _cross_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that look at a context, with all that is in them: the outermost that a name, a class or they say it of."""
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in found) and _is_cross(name, part):
            found[name] = part
    return found


def _is_cross(name: str, part: nn.Module) -> bool:
    own = name.rpartition(".")[2] if any(part.children()) else ""  # not the norm that stands beside it
    return bool(_CROSS_CLASS.search(type(part).__name__) or _CROSS_NAME.search(own) or is_cross(part))


def _implementations(config: Any) -> str | dict[str, Any]:
    """The implementation in each part of a configuration, in the form that ``set_attn_implementation`` takes."""
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    if not parts:
        return config._attn_implementation
    return {"": config._attn_implementation, **{key: _implementations(part) for key, part in parts.items()}}


def _register(spec: AttentionSpec, attend: Attend | None) -> str:
    """The name under which transformers knows the two; one for each distinct pair, for the life of the process."""
    if (spec, attend) not in _registered:
        functions = require("transformers.modeling_utils", "hub", "running a transformers model on our attention")
        masks = require("transformers.masking_utils", "hub", "running a transformers model on our attention")
        name = f"allears_{len(_registered)}"
        functions.AttentionInterface.register(name, _make_function(spec, attend))
        masks.AttentionMaskInterface.register(name, _make_mask(masks.sdpa_mask))
        _registered[spec, attend] = name
    return _registered[spec, attend]


def _make_mask(sdpa_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """transformers' boolean masks. It may leave out a causal mask only where both alignments of it are the same."""

    def mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **rest: Any) -> Tensor | None:
        skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
        return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **rest)

    return mask


def _make_function(spec: AttentionSpec, other: Attend | None) -> Callable[..., tuple[Tensor, None]]:
    masks = PaddingMasks()

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, L_q, D), key and value (B, G, L_k, D) to (B, L_q, H, D)."""
        if dropout:
            raise ValueError(f"dropout: {dropout} given; attention here has none: set attention_dropout=0 or eval()")
        if rest.get("output_attentions"):
            raise ValueError("output_attentions: True given; attention weights are never formed here")
        for name, what in _UNSUPPORTED.items():
            if rest.get(name) is not None:
                raise ValueError(f"{name}: {type(module).__name__} asks for {what}, which is not supported")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        if causal and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"attention_mask: {type(module).__name__} is causal over {query.shape[2]} queries and "
                f"{key.shape[2]} keys and gives no mask, so their alignment is unknown; pass a mask"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mask = _add_bias(attention_mask, position_bias)
        chosen = replace(spec_of_layer(spec, hasattr(module, _CROSS_MARK)), causal=causal, scale=scaling)
        y = masks.attend(q, k, v, chosen, mask) if other is None else other(module, q, k, v, chosen, mask)
        return y.contiguous(), None

    return attend


def _add_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
