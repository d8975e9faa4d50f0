"""Put fitted sparse-linear attention into a model, and take it out again."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import from_dict
from allears.core.errors import WeightsError
from allears.core.weights import check_keys, load_weights
from allears.nn.attention_hooks import AttentionHandle
from allears.nn.sparse_linear_attention import SparseLinearAttention, Stage
from allears.ops.attention import AttentionSpec, attention
from allears.turbo.sparse.record import LayerFacts
from allears.turbo.sparse.search import SparseSettings, build_core
from allears.turbo.sparse.taps import own_layers, tap

KIND = "sparse-linear attention"
_CHILD = "sparse_core"


class Installed(AttentionHandle):
    """The cores that are in a model, by layer.

    ``restore()`` makes the model dense again, and so does leaving a ``with`` block. In the model they are ordinary
    submodules: they train, move and are saved with it.
    """

    def __init__(self, cores: dict[str, SparseLinearAttention], restore: Callable[[], None]) -> None:
        super().__init__(restore)
        self.cores = cores

    def restore(self) -> None:
        """The second call does nothing."""
        self.undo()

    def set_stage(self, stage: Stage) -> None:
        """The stage of all cores; see :meth:`SparseLinearAttention.set_stage`."""
        for core in self.cores.values():
            core.set_stage(stage)


def apply(model: nn.Module, path_stem: str | os.PathLike[str], **changes: Any) -> Installed:
    """Install what :func:`sparsify` left at ``path_stem``: sparse layers get their cores, the others stay dense.

    Args:
        model: the model that was sparsified, or one of the same architecture.
        path_stem: NAME of NAME.safetensors and NAME.json.
        changes: fields of :class:`SparseLinear` that may differ from those of the fit: ``precision`` and ``backward``.

    Raises:
        WeightsError: the files are missing, of another kind, or do not fit the layers of the model.
        ValueError: a change is of a field that the router was trained for.
    """
    return install(model, read_cores(path_stem, **changes))


def read_cores(path_stem: str | os.PathLike[str], **changes: Any) -> dict[str, SparseLinearAttention]:
    """The fitted cores that :func:`sparsify` left at ``path_stem``, by layer; see :func:`apply`."""
    if wrong := sorted(set(changes) - {"precision", "backward"}):
        raise ValueError(f"{wrong[0]}: given, but the layers were fitted for their own; change precision or backward")
    tensors, record = load_weights(path_stem)
    if record.get("kind") != KIND:
        raise WeightsError(f"weights {str(path_stem)!r}: of kind {record.get('kind')!r}, wanted {KIND!r}")
    settings = from_dict(SparseSettings, record["settings"], "settings")
    settings = replace(settings, options=replace(settings.options, **changes))
    cores = {}
    for name, layer in record["layers"].items():
        if layer["keep"] is not None:
            core = build_core(LayerFacts(**layer["facts"]), layer["keep"], settings)
            prefix = f"{name}."
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            check_keys(core, state)
            core.load_state_dict(state)
            cores[name] = core
    return cores


def install(model: nn.Module, cores: dict[str, SparseLinearAttention]) -> Installed:
    """Let each core attend in the layer of its name.

    Raises:
        WeightsError: the model has no such layer, or one with other heads.
        ValueError: a layer has a core already, or the model has no hook for attention.
    """
    own, parts = own_layers(model), dict(model.named_modules())
    for name, core in cores.items():
        if name not in (own or parts):
            raise WeightsError(f"model: {type(model).__name__} has no attention layer {name!r}; give the model fitted")
        part: Any = parts[name]
        if getattr(part, "core", None) is not None or hasattr(part, _CHILD):
            raise ValueError(f"model: layer {name!r} has a core already; restore the model first")
        wanted = (core.heads, core.kv_heads, core.head_dim)
        if own and (found := (part.heads, part.kv_heads, part.head_dim)) != wanted:
            raise WeightsError(f"model: layer {name!r} has (H, G, D) = {found}, the core was fitted for {wanted}")
        place = next(part.parameters(), torch.empty(0))
        core.to(place.device)
    if own:
        for name, core in cores.items():
            own[name].core = core
        return Installed(cores, lambda: _take_out(own, cores))
    return _install_by_hooks(parts, model, cores)


def _take_out(own: dict[str, Any], cores: dict[str, SparseLinearAttention]) -> None:
    for name in cores:
        own[name].core = None


def _install_by_hooks(
    parts: dict[str, nn.Module], model: nn.Module, cores: dict[str, SparseLinearAttention]
) -> Installed:
    def run(name: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
        core = cores.get(name)
        if core is None:
            return attention(q, k, v, spec, mask)
        found, wanted = (q.shape[2], k.shape[2], q.shape[3]), (core.heads, core.kv_heads, core.head_dim)
        if found != wanted or spec.causal != core.causal:
            raise ValueError(
                f"model: layer {name!r} attends with (H, G, D) = {found} and causal={spec.causal}, its core was fitted "
                f"for {wanted} and causal={core.causal}"
            )
        return core(q, k, v, mask)

    handle = tap(model, run)
    for name, core in cores.items():
        parts[name].add_module(_CHILD, core)

    def restore() -> None:
        handle.undo()
        for name in cores:
            delattr(parts[name], _CHILD)

    return Installed(cores, restore)
