"""8-bit linear layers in the place of a transformer's own; q, k and v in one where they read the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.nn.w8a8 import W8A8Linear
from allears.turbo.spec import TurboSpec
from allears.turbo.swap import Ledger

_JOINED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v"), "to_added_kv": ("add_k_proj", "add_v_proj")}
"""The layers that diffusers' fused projections stand for: its processors and ours run the joined one where there is."""


class Away(nn.Module):
    """Stands where a joined layer was; holds nothing, so that moving the model does not move what is parked."""

    def __init__(self, name: str, joined: str) -> None:
        super().__init__()
        self.name, self.joined = name, joined

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"{self.name}: is part of {self.joined} now; turbo.restore brings it back")


class Linears:
    """The linear layers in a transformer's blocks.

    Args:
        model: it.
        spec: numbers, skipped names, and where the originals go.
        device: where weights are quantised; ``None``: where they are.
    """

    def __init__(self, model: Any, spec: TurboSpec, device: torch.device | str | None = None) -> None:
        self.model, self.spec, self.device = model, spec, device
        cores = [name for name, part in model.named_modules() if isinstance(part, SparseLinearAttention)]
        self.layers: dict[str, Any] = {
            f"blocks.{name}": layer
            for name, layer in model.blocks.named_modules()
            if isinstance(layer, nn.Linear) and not any(f"blocks.{name}".startswith(f"{core}.") for core in cores)
        }

    def stays(self, name: str) -> str:
        """Why a layer is not replaced; empty if it is."""
        if self.spec.skips(name):
            return "named in skip"
        layer = self.layers[name]
        if type(layer) is not nn.Linear:
            return f"is a {type(layer).__name__}, not a plain linear layer"
        parent, _, leaf = name.rpartition(".")
        if leaf == "base_layer":
            return "carries an adapter (LoRA); fuse it into the weights first"
        if self._fused_by_user(parent) and any(leaf in parts for joined, parts in self._joined(parent).items()):
            return "does not run: its projections are fused already"
        return ""

    def build(self, layer: nn.Linear) -> W8A8Linear:
        """The layer in 8 bits, where the layer is."""
        assert self.spec.linear is not None, "accelerate asks only then"
        place = layer.weight.device
        if self.device is not None and torch.device(self.device) != place:
            layer = _linear(layer.weight.to(self.device), None if layer.bias is None else layer.bias.to(self.device))
        new = W8A8Linear.from_linear(layer, scheme=self.spec.linear)
        return new.to(place).eval()

    def apply(self, ledger: Ledger) -> None:
        """Replace all, those of one attention layer that read the same as one."""
        done: set[str] = set()
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in self.layers):
            done |= self._join(parent, ledger)
        for name, layer in self.layers.items():
            if name not in done and not self.stays(name):
                ledger.exchange(self.model, name, self.build(layer))
                self._retire([layer], ledger)

    def _join(self, parent: str, ledger: Ledger) -> set[str]:
        """Join what can be joined in an attention layer, all or nothing; the names of the layers it took."""
        groups = self._joined(parent)
        names = [f"{parent}.{part}" for parts in groups.values() for part in parts]
        if not groups or self._fused_by_user(parent) or any(n not in self.layers or self.stays(n) for n in names):
            return set()
        attn: Any = self.model.get_submodule(parent)
        for joined, parts in groups.items():
            layers = [self.layers[f"{parent}.{part}"] for part in parts]
            ledger.add_module(attn, joined, self.build(join(layers)))
            for part in parts:
                ledger.exchange(attn, part, Away(f"{parent}.{part}", joined))
            self._retire(layers, ledger)
        ledger.set(attn, "fused_projections", True)
        return set(names)

    def _joined(self, parent: str) -> dict[str, tuple[str, ...]]:
        """Which layers of an attention layer may be joined; nothing for any other module."""
        attn: Any = self.model.get_submodule(parent)
        if not hasattr(attn, "fused_projections") or not hasattr(attn, "to_out"):
            return {}
        names = ["to_kv"] if attn.is_cross_attention else ["to_qkv"]
        names += ["to_added_kv"] if attn.add_k_proj is not None else []
        return {name: _JOINED[name] for name in names}

    def _fused_by_user(self, parent: str) -> bool:
        attn: Any = self.model.get_submodule(parent)
        return bool(getattr(attn, "fused_projections", False))

    def _retire(self, layers: Sequence[nn.Linear], ledger: Ledger) -> None:
        tensors = [tensor for layer in layers for tensor in layer.parameters()]
        if self.spec.originals == "cpu":
            ledger.park(tensors)
        elif self.spec.originals == "drop":
            ledger.drop(tensors, "the weights that 8-bit layers replaced were dropped, as originals='drop' asked")


def join(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are theirs, one after another."""
    weight = torch.cat([layer.weight.data for layer in layers])
    biases = [layer.bias for layer in layers]
    return _linear(weight, None if biases[0] is None else torch.cat([bias.data for bias in biases]))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
