"""The kinds of change to a Wan transformer: what each would replace, how to try one layer, and how to make them all."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from allears.nn.attention_hooks import use_attention
from allears.nn.attention_processors import CROSS_STAYS_DENSE, WanProcessor, make_processors
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec
from allears.turbo.linear import Linears
from allears.turbo.plan import Item, Kind
from allears.turbo.sparse.install import install
from allears.turbo.spec import TurboSpec
from allears.turbo.swap import Ledger
from allears.turbo.wan.block import FusedWanBlock, refuses

Trial = tuple[nn.Module, Callable[[], Callable[..., Tensor]]]
"""A layer, and what makes its replacement, which takes the arguments of the layer."""


class Change(Protocol):
    """One kind of change to one transformer."""

    kind: Kind

    def items(self) -> list[Item]:
        """Every layer that is looked at, and what becomes of it."""
        ...

    def trials(self) -> dict[str, Trial]:
        """The layers that are replaced, by name, with the way to try each alone. Asked before :meth:`apply`."""
        ...

    def apply(self, ledger: Ledger) -> None:
        """Replace them all, and note how to take it back."""
        ...


class AttentionChange:
    """Sparse-linear cores in self-attention; our exact kernels in cross-attention.

    Args:
        part: name of the transformer in its pipeline.
        model: it.
        spec: what to change.
        cores: by layer; empty: attention stays dense.
        always: run dense attention, too, on our processors, as fused blocks and split tokens need.
    """

    kind: Kind = "attention"

    def __init__(
        self, part: str, model: Any, spec: TurboSpec, cores: Mapping[str, SparseLinearAttention], always: bool = False
    ) -> None:
        self.part, self.model, self.spec, self.cores, self.always = part, model, spec, dict(cores), always
        self.objection = _objection(model)

    def items(self) -> list[Item]:
        if not self.cores and self.spec.attention is None:
            return []
        return list(self._items())

    def _items(self) -> Iterator[Item]:
        for name, layer in attention_layers(self.model).items():
            kind = type(layer).__name__
            if self.objection:
                yield Item(self.part, name, "attention", kind, None, self.objection)
            elif name in self.cores:
                yield Item(self.part, name, "attention", kind, describe(self.cores[name]))
            elif name.endswith("attn2"):
                yield Item(self.part, name, "attention", kind, None, CROSS_STAYS_DENSE)
            else:
                reason = "named in skip" if self.spec.skips(name) else "its fit left it dense"
                yield Item(self.part, name, "attention", kind, None, reason)

    def trials(self) -> dict[str, Trial]:
        layers = attention_layers(self.model)
        return {} if self.objection else {name: (layers[name], self._maker(name)) for name in self.cores}

    def _maker(self, name: str) -> Callable[[], Callable[..., Tensor]]:
        core, layer = self.cores[name], attention_layers(self.model)[name]

        def attend(of: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
            core.to(q.device)
            return core(q, k, v, mask)

        return lambda: partial(WanProcessor(AttentionSpec(), attend), layer)

    def apply(self, ledger: Ledger) -> None:
        if self.objection:
            return
        if self.cores:
            ledger.note(install(self.model, self.cores).undo)
        elif self.always:
            ledger.note(use_attention(self.model).undo)


class LinearChange:
    """8-bit linear layers in the blocks."""

    kind: Kind = "linear"

    def __init__(self, part: str, model: Any, spec: TurboSpec, device: Any = None) -> None:
        self.part, self.spec = part, spec
        self.linears = Linears(model, spec, device)

    def items(self) -> list[Item]:
        found = []
        for name, layer in self.linears.layers.items():
            what = f"{type(layer).__name__}({layer.in_features}, {layer.out_features})"
            reason = self.linears.stays(name)
            after = None if reason else f"W8A8Linear({self.spec.linear})"
            found.append(Item(self.part, name, "linear", what, after, reason))
        return found

    def trials(self) -> dict[str, Trial]:
        chosen = {name: layer for name, layer in self.linears.layers.items() if not self.linears.stays(name)}
        return {name: (layer, partial(self.linears.build, layer)) for name, layer in chosen.items()}

    def apply(self, ledger: Ledger) -> None:
        self.linears.apply(ledger)


class NormsChange:
    """Blocks that run in fused passes."""

    kind: Kind = "norms"

    def __init__(self, part: str, model: Any, spec: TurboSpec) -> None:
        self.part, self.model, self.spec = part, model, spec
        self.objection = _objection(model)

    def items(self) -> list[Item]:
        found = []
        for name, block in self._blocks().items():
            reason = self._stays(name, block)
            after = None if reason else FusedWanBlock.__name__
            found.append(Item(self.part, name, "norms", type(block).__name__, after, reason))
        return found

    def trials(self) -> dict[str, Trial]:
        chosen = {name: block for name, block in self._blocks().items() if not self._stays(name, block)}
        return {name: (block, partial(FusedWanBlock, block)) for name, block in chosen.items()}

    def apply(self, ledger: Ledger) -> None:
        for name, block in self._blocks().items():
            if not self._stays(name, block):
                ledger.exchange(self.model, name, FusedWanBlock(block))

    def _blocks(self) -> dict[str, Any]:
        return {f"blocks.{index}": block for index, block in enumerate(self.model.blocks)}

    def _stays(self, name: str, block: Any) -> str:
        if name in self.spec.skip:
            return "named in skip"
        return self.objection or refuses(block)


def attention_layers(model: Any) -> dict[str, Any]:
    """Self- and cross-attention of every block, by name."""
    return {
        f"blocks.{index}.{name}": getattr(block, name)
        for index, block in enumerate(model.blocks)
        for name in ("attn1", "attn2")
    }


def describe(core: SparseLinearAttention) -> str:
    """A core in a few words."""
    options = core.options
    return f"{options.form} attention, {core.keep:.3g} of the keys exact, {options.precision}"


def _objection(model: Any) -> str:
    """Why the attention layers cannot run on our processors; empty if they can."""
    ours = {name: layer for name, layer in attention_layers(model).items() if not _is_ours(layer)}
    try:
        make_processors({name: layer.processor for name, layer in ours.items()}, AttentionSpec())
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return ""


def _is_ours(layer: Any) -> bool:
    return isinstance(layer.processor, WanProcessor)
