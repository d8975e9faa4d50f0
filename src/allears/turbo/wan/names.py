"""Names of Wan's weights: from the original layout, and TurboDiffusion's, to that of ``diffusers``.

The original code calls the norm before cross-attention ``norm3`` and the one before the feed-forward part ``norm2``;
diffusers has them the other way round. TurboDiffusion embeds patches by a linear layer (the same weights, flat), may
store linear layers in INT8 with a scale for each tile of 128 x 128, and has the projection ``proj_l`` of SLA in each
self-attention.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from allears.core.errors import WeightsError
from allears.turbo.wan.shapes import HEAD_DIM, WanShape

Layout = Literal["diffusers", "wan", "turbodiffusion"]

_TILE = 128
_PREFIXES = ("net.", "model.diffusion_model.", "model.", "_orig_mod.")
_WRAPPER = "_checkpoint_wrapped_module."

_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_IN_BLOCK = {
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    **{
        f"{ours}.{name}": f"{theirs}.{new}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, new in {
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "o": "to_out.0",
            "norm_q": "norm_q",
            "norm_k": "norm_k",
            "k_img": "add_k_proj",
            "v_img": "add_v_proj",
            "norm_k_img": "norm_added_k",
        }.items()
    },
}
_WHOLE = {"modulation", "img_emb.emb_pos", "head.modulation"}  # parameters of their own, not weight or bias of a layer
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PROJECTION = re.compile(r"blocks\.(\d+)\.self_attn\.attn_op\.local_attn\.proj_l\.(weight|bias)")


@dataclass(frozen=True)
class Converted:
    """A checkpoint under diffusers' names.

    Args:
        state: tensors, as stored; INT8 ones as bfloat16.
        projections: of SLA's linear branch, by layer: ``{"blocks.0.attn1": {"weight": ..., "bias": ...}}``.
        from_int8: how many linear layers were stored in INT8.
    """

    state: dict[str, Tensor]
    projections: dict[str, dict[str, Tensor]]
    from_int8: int


def find_layout(names: Iterable[str]) -> Layout:
    """The layout that tensors of these names are in.

    Raises:
        WeightsError: none of the three.
    """
    plain = {strip(name) for name in names}
    if any(name.startswith("condition_embedder.") for name in plain):
        return "diffusers"
    if not any(name.startswith("time_projection.1.") for name in plain):
        few = ", ".join(sorted(plain)[:3])
        raise WeightsError(
            f"weights: the names ({few}, ...) are neither of diffusers' Wan, nor of the original, nor TurboDiffusion's"
        )
    turbo = any("proj_l." in name or name.endswith("int8_weight") for name in plain)
    return "turbodiffusion" if turbo or any(name.startswith("net.") for name in names) else "wan"


def strip(name: str) -> str:
    """A name without what training wrappers put into it."""
    name = name.replace(_WRAPPER, "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def convert(tensors: Mapping[str, Tensor]) -> Converted:
    """Tensors in the original or TurboDiffusion's layout, under diffusers' names.

    Raises:
        WeightsError: a name is unknown, or an INT8 weight lacks its scales.
    """
    plain = {strip(name): tensor for name, tensor in tensors.items()}
    state: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    from_int8 = 0
    for name, tensor in plain.items():
        if found := _PROJECTION.fullmatch(name):
            projections.setdefault(f"blocks.{found[1]}.attn1", {})[found[2]] = tensor
            continue
        layer, _, kind = name.rpartition(".")
        if kind == "scale":
            continue  # read with its weight
        if kind == "int8_weight":
            if f"{layer}.scale" not in plain:
                raise WeightsError(f"weights: {name!r} has no {layer + '.scale'!r} beside it; convert the file again")
            tensor, kind = from_tiles(tensor, plain[f"{layer}.scale"]), "weight"
            from_int8 += 1
        new = rename(f"{layer}.{kind}" if layer else kind)
        if new == "patch_embedding.weight" and tensor.dim() == 2:
            tensor = tensor.reshape(tensor.shape[0], -1, 1, 2, 2)
        state[new] = tensor
    return Converted(state, projections, from_int8)


def rename(name: str) -> str:
    """A name of the original layout in diffusers'.

    Raises:
        WeightsError: it is unknown.
    """
    block = _BLOCK.fullmatch(name)
    known, rest, prefix = (_IN_BLOCK, block[2], f"blocks.{block[1]}.") if block else (_OUTSIDE, name, "")
    if rest in _WHOLE:
        return prefix + known[rest]
    layer, _, kind = rest.rpartition(".")
    if layer not in known or kind not in ("weight", "bias"):
        raise WeightsError(f"weights: {name!r} is no name of a Wan transformer; give one of Wan 2.1 or 2.2 (not VACE)")
    return f"{prefix}{known[layer]}.{kind}"


def from_tiles(weight: Tensor, scale: Tensor) -> Tensor:
    """INT8 weight (N, K) with a scale for each tile of 128 x 128, (ceil(N / 128), ceil(K / 128)), in bfloat16.

    Raises:
        WeightsError: the scales do not fit.
    """
    rows, columns = weight.shape
    wanted = (-(-rows // _TILE), -(-columns // _TILE))
    if tuple(scale.shape) != wanted:
        raise WeightsError(f"weights: scales {tuple(scale.shape)} for INT8 {(rows, columns)}; wanted {wanted}")
    each = scale.float().repeat_interleave(_TILE, 0)[:rows].repeat_interleave(_TILE, 1)[:, :columns]
    return (weight.float() * each).to(torch.bfloat16)


def shape_of(state: Mapping[str, Tensor], heads: int | None = None, eps: float = 1e-6) -> WanShape:
    """Sizes of the network that a state under diffusers' names is of.

    Args:
        heads: ``None``: as many as heads of 128 fill the width, as in every published Wan.
        eps: of the norms, which no weight tells.

    Raises:
        WeightsError: a tensor that tells a size is missing, or the width does not split into heads.
    """
    try:
        width, in_channels, *patch = state["patch_embedding.weight"].shape
        layers = 1 + max(int(found[1]) for name in state if (found := _BLOCK.fullmatch(name)))
        ffn_dim = state["blocks.0.ffn.net.2.weight"].shape[1]
        out = state["proj_out.weight"].shape[0]
        text_dim = state["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        freq_dim = state["condition_embedder.time_embedder.linear_1.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"weights: {error} is missing; give all files of the transformer") from error
    heads = heads or width // HEAD_DIM
    if not heads or width % heads:
        raise WeightsError(
            f"weights: width {width} does not split into {heads} heads; give the config.json beside them"
        )
    image = state.get("condition_embedder.image_embedder.norm1.weight")
    positions = state.get("condition_embedder.image_embedder.pos_embed")
    return WanShape(
        layers=layers,
        heads=heads,
        ffn_dim=ffn_dim,
        head_dim=width // heads,
        in_channels=in_channels,
        out_channels=out // (patch[0] * patch[1] * patch[2]),
        text_dim=text_dim,
        freq_dim=freq_dim,
        image_dim=None if image is None else image.shape[0],
        pos_embed_seq_len=None if positions is None else positions.shape[1],
        cross_attn_norm="blocks.0.norm2.weight" in state,
        eps=eps,
        patch=(patch[0], patch[1], patch[2]),
    )
