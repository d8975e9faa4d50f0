"""A network from its weights: with sparse-linear attention where they have it, with 8-bit layers where asked for.

Weights with routers are a little larger than those without, so a few of their matrices may be stored in 8 bits.

Shapes: N rows, K columns of a matrix.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import from_dict, to_dict
from allears.core.errors import WeightsError
from allears.core.weights import Pretrained, check_keys
from allears.models.video.config import VideoConfig
from allears.models.video.model import VideoNet
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.nn.w8a8 import W8A8Linear
from allears.ops.attention import AttentionSpec
from allears.ops.attention.sparse_linear.options import Precision, SparseLinear
from allears.ops.gemm.schemes import SchemeName

_VALUES, _SCALE = ".int8", ".scale"


@dataclass(frozen=True)
class SparseLayers:
    """Which layers have sparse-linear attention, as it stands in the record of weights under ``sparse``.

    Args:
        keeps: by layer (``blocks.0.attention``) the share of its key blocks that are read exactly.
        options: of all of them; their precision is that of the tuning.
        ratio_of_query: see :class:`~allears.nn.sparse_linear_attention.SparseLinearAttention`.
    """

    keeps: dict[str, float]
    options: SparseLinear
    ratio_of_query: bool = False

    @classmethod
    def of(cls, net: VideoNet) -> "SparseLayers | None":
        """Those of a network; ``None`` of a dense one."""
        cores = {name: layer.core for name, layer in net.named_modules() if _core_of(layer) is not None}
        if not cores:
            return None
        first: Any = next(iter(cores.values()))
        of_query = first.ratio is not None and first.ratio.weight is not None
        return cls({name: core.keep for name, core in cores.items()}, first.options, of_query)  # type: ignore

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "SparseLayers | None":
        """Those of the JSON beside weights.

        Raises:
            WeightsError: it is not what :meth:`of` gave.
        """
        if record.get("sparse") is None:
            return None
        try:
            return from_dict(cls, record["sparse"], "sparse")
        except ValueError as error:
            raise WeightsError(f"weights: {error}") from error

    def to_record(self) -> dict[str, Any]:
        return to_dict(self)


def _core_of(layer: nn.Module) -> SparseLinearAttention | None:
    core = getattr(layer, "core", None)
    return core if isinstance(core, SparseLinearAttention) else None


def build_net(
    config: VideoConfig,
    tensors: Mapping[str, Tensor],
    sparse: SparseLayers | None = None,
    precision: Precision | None = None,
    linear: SchemeName | None = None,
) -> VideoNet:
    """The network in evaluation mode, on the CPU.

    Args:
        tensors: of all its parts; packed ones (:func:`pack`) too.
        sparse: its sparse layers.
        precision: of attention, in place of the record's: ``int8_fp8`` gives dense layers 8-bit kernels too.
        linear: see :func:`use_w8a8`.

    Raises:
        WeightsError: the tensors do not fit, or are of other sparse layers.
    """
    spec = AttentionSpec(numerics="int8_fp8") if precision == "int8_fp8" else AttentionSpec()
    net = VideoNet(config, spec)
    if sparse is not None:
        options = replace(sparse.options, precision=precision or sparse.options.precision)
        layers: dict[str, Any] = dict(net.named_modules())
        for name, keep in sparse.keeps.items():
            if name not in layers or not hasattr(layers[name], "core"):
                raise WeightsError(f"weights: sparse layer {name!r} is not in this model; choose another file")
            layer = layers[name]
            layer.core = SparseLinearAttention(
                layer.heads, layer.head_dim, keep, options, ratio_of_query=sparse.ratio_of_query
            )
    state = unpack(tensors)
    check_keys(net, state)
    net.load_state_dict(state)
    if linear is not None:
        use_w8a8(net, linear)
    return net.eval()


def load_net(
    found: Pretrained[VideoConfig], precision: Precision | None = None, linear: SchemeName | None = None
) -> VideoNet:
    """:func:`build_net` of weights that were found."""
    return build_net(found.config, found.tensors, SparseLayers.of_record(found.record), precision, linear)


def use_w8a8(net: VideoNet, scheme: SchemeName = "fp8_row") -> list[str]:
    """8-bit linear layers in all blocks of a trained network, in place; those of routers, text and time stay.

    Returns:
        The names of the layers.
    """
    names = [name for name, part in net.blocks.named_modules() if type(part) is nn.Linear and ".core." not in name]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer: Any = net.blocks.get_submodule(name)
        setattr(net.blocks.get_submodule(parent), leaf, W8A8Linear.from_linear(layer, scheme))
    return [f"blocks.{name}" for name in names]


def pack(state: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """``state`` with the weights (N, K) of these linear layers as int8, under NAME.int8, and a scale a row, NAME.scale.

    Raises:
        ValueError: a layer has no matrix in ``state``.
    """
    packed = dict(state)
    for layer in layers:
        name = f"{layer}.weight"
        if name not in packed or packed[name].dim() != 2:
            raise ValueError(f"layers: {layer!r} has no matrix in these weights; name linear layers of the model")
        weight = packed.pop(name).float()
        scale = (weight.abs().amax(1) / 127).clamp_min(2.0**-14).half().float()
        packed[name + _VALUES] = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        packed[name + _SCALE] = scale
    return packed


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`pack`, but for what rounding took; other weights come back as they are."""
    found = dict(state)
    for name in [name for name in state if name.endswith(_VALUES)]:
        bare = name.removesuffix(_VALUES)
        if bare + _SCALE not in found:
            raise WeightsError(f"weights: {name!r} is there without its scale; copy both files of the pair again")
        found[bare] = found.pop(name).float() * found.pop(bare + _SCALE).float()[:, None]
    return found
