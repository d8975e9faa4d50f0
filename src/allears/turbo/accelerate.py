"""The door: change a stock Wan pipeline or transformer, say what was done, and take it back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.changes import AttentionChange, Change, LinearChange, NormsChange, attention_layers
from allears.turbo.experts import ExpertSwap
from allears.turbo.graphs import GraphedForward
from allears.turbo.memory import estimate_memory
from allears.turbo.parallel import Stretch, check_heads, slice_core, split_tokens
from allears.turbo.plan import Item, LayerError, Plan
from allears.turbo.report import measure_layers, random_inputs, relative_error, run_model
from allears.turbo.sparse.install import read_cores
from allears.turbo.spec import Sparse, TurboSpec
from allears.turbo.steps import FewSteps
from allears.turbo.swap import Ledger, attach, detach, ledger_of
from allears.turbo.wan.shapes import VideoSize, WanShape

_PARTS = ("transformer", "transformer_2")

Cores = Mapping[str, SparseLinearAttention]


def accelerate(
    pipeline_or_model: Any,
    spec: TurboSpec | None = None,
    *,
    cores: Cores | Mapping[str, Cores] | None = None,
    video: VideoSize | None = None,
    inputs: Mapping[str, Any] | VideoSize | None = None,
    group: Any = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Make a ``diffusers`` Wan pipeline (2.1, or 2.2 with two experts), or its transformer, faster.

    It works through hooks that these libraries offer (attention processors, submodules, the scheduler, torch's forward
    hooks), and :func:`restore` takes all of it back: weights and outputs are then the same to the bit.

    Args:
        pipeline_or_model: a pipeline with ``transformer`` and perhaps ``transformer_2``, or a transformer.
        spec: what to change.
        cores: fitted attention by layer, such as :func:`sla_cores` makes, in place of ``spec.attention``'s own; of a
            pipeline with two experts, a mapping for each of them by its name.
        video: the size of a video, for an estimate of the peak memory.
        inputs: a call of the transformer to measure errors on: keyword arguments, or a size for random ones. It needs
            room for the replaced weights beside the replacements.
        group: of torch.distributed: the tokens of a video are split over its ranks (``()`` for the default group).
        device: where weights are quantised, and with ``offload="experts"`` where the experts run; ``None``: where the
            weights are.

    Returns:
        What was replaced, by what, and why the rest was not.

    Raises:
        ValueError: it is no Wan transformer, was accelerated already, or an argument does not fit. Nothing is changed.
    """
    spec = spec or TurboSpec()
    parts = find_parts(pipeline_or_model)
    ledger = Ledger()
    owners = [*parts.values(), *([] if "" in parts else [pipeline_or_model])]
    for owner in owners:
        if ledger_of(owner) is not None:
            attach(owner, ledger)  # says that there is one
    try:
        plan = _change(pipeline_or_model, parts, spec, ledger, cores, video, inputs, group, device)
    except BaseException:
        ledger.final = ""
        ledger.undo()
        raise
    for owner in owners:
        attach(owner, ledger)
    ledger.note(lambda: [detach(owner) for owner in owners])
    return plan


def restore(pipeline_or_model: Any) -> None:
    """Take back what :func:`accelerate` did.

    Raises:
        ValueError: nothing was done, or ``originals="drop"`` made it final.
    """
    ledger = ledger_of(pipeline_or_model)
    if ledger is None:
        raise ValueError(f"{type(pipeline_or_model).__name__}: not accelerated, so there is nothing to restore")
    ledger.undo()


def find_parts(pipeline_or_model: Any) -> dict[str, Any]:
    """The Wan transformers of a pipeline by name; a transformer itself under the empty name.

    Raises:
        ValueError: there is none.
    """
    whole = {"": pipeline_or_model} if isinstance(pipeline_or_model, nn.Module) else {}
    parts = whole or {name: part for name in _PARTS if (part := getattr(pipeline_or_model, name, None)) is not None}
    strange = [part for part in parts.values() if type(part).__name__ != "WanTransformer3DModel"]
    if not parts or strange:
        found = type(strange[0] if strange else pipeline_or_model).__name__
        hint = "; accelerate before torch.compile" if found == "OptimizedModule" else ""
        raise ValueError(
            f"pipeline_or_model: {found} given; wanted diffusers' WanTransformer3DModel, or a pipeline with one{hint}"
        )
    return parts


def sla_cores(
    projections: Mapping[str, Mapping[str, Tensor]], model: Any, keep: float = 0.1, options: SparseLinear | None = None
) -> dict[str, SparseLinearAttention]:
    """Attention of the form SLA from a checkpoint's projections of the linear branch (TurboDiffusion's ``proj_l``).

    Args:
        projections: see :class:`~allears.turbo.wan.load.LoadedWan`.
        keep: share of the key blocks; TurboDiffusion publishes 0.1 to 0.15.
        options: of the form ``"sla"``.
    """
    options = options or SparseLinear(form="sla")
    shape, found = WanShape.from_diffusers(model.config), {}
    for name, projection in projections.items():
        core = SparseLinearAttention(shape.heads, shape.head_dim, keep, options)
        if core.proj is None:
            raise ValueError(f"options: form {options.form!r} given, but these projections are of the form 'sla'")
        core.proj.load_state_dict({key: value.float() for key, value in projection.items()})
        found[name] = core.requires_grad_(False)
    return found


def new_cores(model: Any, sparse: Sparse, spec: TurboSpec) -> dict[str, SparseLinearAttention]:
    """A core for each self-attention layer that is not skipped: fitted ones from a file, or such as they start."""
    names = [n for n in attention_layers(model) if n.endswith("attn1") and not spec.skips(n)]
    if sparse.fitted is not None:
        fitted = read_cores(sparse.fitted, precision=sparse.options.precision)
        return {name: core for name, core in fitted.items() if not spec.skips(name)}
    shape = WanShape.from_diffusers(model.config)
    return {
        name: SparseLinearAttention(shape.heads, shape.head_dim, sparse.keep, sparse.options).requires_grad_(False)
        for name in names
    }


def _change(
    target: Any,
    parts: dict[str, Any],
    spec: TurboSpec,
    ledger: Ledger,
    cores: Any,
    video: VideoSize | None,
    inputs: Mapping[str, Any] | VideoSize | None,
    group: Any,
    device: torch.device | str | None,
) -> Plan:
    if spec.graphs and group is not None:
        raise ValueError("graphs, group: a graph of one device cannot wait for others; use graphs=False")
    stretch = None if group is None else Stretch(None if group == () else group)
    items: list[Item] = []
    errors: list[LayerError] = []
    notes: list[str] = []
    for part, model in parts.items():
        found = _cores_of(part, model, spec, cores, len(parts))
        if stretch is not None:
            check_heads(WanShape.from_diffusers(model.config).heads, stretch.ranks)
            found = {name: slice_core(core, stretch) for name, core in found.items()}
        call = random_inputs(model, inputs) if isinstance(inputs, VideoSize) else inputs
        wanted = None if call is None else run_model(model, call)
        for make in _kinds(part, model, spec, found, device, stretch is not None):
            change = make()
            items += change.items()
            if call is not None and (trials := change.trials()) and stretch is None:
                errors += measure_layers(part, change.kind, model, trials, call)
            change.apply(ledger)
            if call is not None and wanted is not None and stretch is None:
                errors.append(LayerError(part, "", change.kind, relative_error(run_model(model, call), wanted)))
        if stretch is not None:
            split_tokens(model, stretch, ledger)
    if stretch is not None:
        notes.append(f"tokens and heads are split over {stretch.ranks} ranks; errors are not measured there")
    if cores is None and spec.attention is not None and spec.attention.fitted is None:
        notes.append("sparse layers are not fitted to the model: see allears.turbo.sparse.sparsify")
    arguments = _install_steps(target, parts, spec, ledger, items, notes)
    _install_offload(parts, spec, ledger, notes, device)
    _install_graphs(parts, spec, ledger, items)
    shape = WanShape.from_diffusers(next(iter(parts.values())).config)
    memory = None
    if video is not None:
        ranks = 1 if stretch is None else stretch.ranks
        memory = estimate_memory(shape, video, spec, experts=len(parts), ranks=ranks)
    weights = sum(shape.layers * shape.block_parameters() + shape.other_parameters() for _ in parts)
    title = (
        f"{type(target).__name__}: {len(parts)} transformer{'s' if len(parts) > 1 else ''} of {shape.layers} blocks, "
        f"{shape.heads} heads of {shape.head_dim}; {weights / 1e9:.2f} billion weights"
    )
    return Plan(title, tuple(items), tuple(errors), memory, tuple(notes), arguments)


def _kinds(part: str, model: Any, spec: TurboSpec, cores: Cores, device: Any, split: bool) -> list[Any]:
    """What makes each change, in order: a later one looks at the model as the earlier ones left it."""

    def attention() -> Change:
        return AttentionChange(part, model, spec, cores, always=spec.norms or split)

    kinds: list[Any] = [attention]
    if spec.linear is not None:
        kinds.append(lambda: LinearChange(part, model, spec, device))
    if spec.norms:
        kinds.append(lambda: NormsChange(part, model, spec))
    return kinds


def _cores_of(part: str, model: Any, spec: TurboSpec, cores: Any, parts: int) -> dict[str, SparseLinearAttention]:
    if cores is not None:
        mine = cores[part] if part and part in cores else cores
        if parts > 1 and mine is cores:
            raise ValueError(f"cores: no entry {part!r}; a pipeline with two experts needs cores for each by its name")
        return {name: core for name, core in mine.items() if not spec.skips(name)}
    return {} if spec.attention is None else new_cores(model, spec.attention, spec)


def _install_steps(
    target: Any, parts: dict[str, Any], spec: TurboSpec, ledger: Ledger, items: list[Item], notes: list[str]
) -> dict[str, Any]:
    if spec.steps is None:
        return {}
    if "" in parts:
        items.append(Item("", "scheduler", "steps", "none", None, "a transformer alone has no scheduler"))
        return {}
    before, sampler = type(target.scheduler).__name__, FewSteps(spec.steps, target)
    ledger.set(target, "scheduler", sampler)
    for model in parts.values():
        ledger.note(model.register_forward_pre_hook(sampler.scale_first, with_kwargs=True).remove)
    steps = spec.steps
    after = f"FewSteps({steps.count}, {steps.sampler}, sigma_max={steps.sigma_max:g})"
    items.append(Item("", "scheduler", "steps", before, after, "for weights distilled to few steps"))
    return {"num_inference_steps": steps.count, "guidance_scale": 1.0}


def _install_offload(
    parts: dict[str, Any], spec: TurboSpec, ledger: Ledger, notes: list[str], device: torch.device | str | None
) -> None:
    if spec.offload == "none":
        return
    if len(parts) < 2:
        notes.append("offload: there is one expert, so nothing is swapped")
        return
    place = device if device is not None else next(next(iter(parts.values())).parameters()).device
    ledger.note(ExpertSwap(parts, place).undo)
    notes.append(f"offload: of two experts the one that runs is on {place}")


def _install_graphs(parts: dict[str, Any], spec: TurboSpec, ledger: Ledger, items: list[Item]) -> None:
    if not spec.graphs:
        return
    for part, model in parts.items():
        graphed = GraphedForward(model)
        ledger.set(model, "forward", graphed)
        ledger.note(graphed.drop)
        items.append(Item(part, "forward", "graphs", "called", "replayed", "one graph for each shape, on CUDA"))
