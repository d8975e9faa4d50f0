"""Who is measured: this library's sparse-linear modules, torch's dense kernels, and the published sparse modules.

A system is made for a case, since its sparsity is built into it. All that it does to 16-bit q, k, v counts: pooling,
routing, quantising, both branches, mixing. Shapes: B batch, L length, H query heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allears.bench.attention import systems as dense
from allears.bench.attention.peers import UnavailableError
from allears.bench.attention.systems import INT8, Attend, Machine, System
from allears.bench.sparse.cases import SparseCase
from allears.bench.sparse.formula import Formula
from allears.bench.sparse.peers import load_sagesla, load_sla, load_spargeattn
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec, Numerics
from allears.ops.attention.sparse_linear import SparseLinear, explain_sparse_linear
from allears.ops.attention.sparse_linear.spargeattn import spargeattn_blocks
from allears.ops.attention.sparse_linear.training_free import options_of
from allears.ops.attention.sparsity import Sparsity
from allears.turbo.graphs import Replayed

SPARSE = (0.015, 0.04)  # bounds on the relative error of the output, and of each gradient, for 16-bit products
SAGESLA = (0.1, None)  # wider than INT8's: it has one scale for 64 queries, where ours has one for each
EVEN_RATIOS = (0.5, 0.95)  # of the heads, evenly between: so that a ratio of the wrong head shows


@dataclass(frozen=True)
class Prepared:
    """A system made for a case.

    Args:
        attend: q, k, v and whether the call is causal, which our modules know from the case, to (B, L, H, D).
        formula: what it computes for a q and k. ``None``: dense attention.
        replays: its memory is held between calls, so that a call's is not told.
        heads_first: its own layout is (B, H, L, D): it is timed on tensors that lie so in memory, and no transposition
            is counted against it.
    """

    attend: Attend
    formula: Callable[[Tensor, Tensor], Formula] | None = None
    heads_first: bool = False
    replays: bool = False


Make = Callable[[SparseCase], Prepared]


class Ours:
    """Modules of this library, of one kind of options. On a GPU the reference, not made for speed, is refused.

    Args:
        graph: forwards are replayed as CUDA graphs, one for each q, k and v.
    """

    def __init__(self, options: SparseLinear, device: torch.device, graph: bool = False) -> None:
        self.options, self.device, self.graph = options, device, graph
        self._kernels: dict[str, str] = {}

    def __call__(self, case: SparseCase) -> Prepared:
        module = self.module(case)
        name = case.shape.name
        graphs: dict[int, Replayed] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            grad = torch.is_grad_enabled() and q.requires_grad
            call = f"{name} with gradients" if grad else name
            if call not in self._kernels:
                self._kernels[call] = kernel(module, q, k, v)
            if not self.graph:
                return module(q, k, v)
            if q.data_ptr() not in graphs:
                graphs[q.data_ptr()] = Replayed(module, q, k, v)
            return graphs[q.data_ptr()](*graphs[q.data_ptr()].inputs)

        def formula(q: Tensor, k: Tensor) -> Formula:
            router, proj = module.router, module.proj
            return Formula(
                module.route(q, k),
                module.options,
                ratio=None if module.ratio is None else module.ratio(),
                proj=None if proj is None else (proj.weight, proj.bias),
                router=None if router is None else (router.proj_q, router.proj_k),
                keep=case.keep,
                causal=module.causal,
            )

        return Prepared(attend, formula, replays=self.graph)

    def module(self, case: SparseCase) -> SparseLinearAttention:
        """A module with projections, ratios and biases that are not those it starts with, alike for equal cases."""
        shape = case.shape
        module = SparseLinearAttention(
            shape.heads, shape.head_dim, case.keep, self.options, kv_heads=shape.kv_heads, causal=shape.causal
        ).to(self.device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            if module.router is not None:
                for proj in (module.router.proj_q, module.router.proj_k):
                    proj += (0.3 * shape.head_dim**-0.5 * torch.randn(proj.shape, generator=generator)).to(self.device)
            if module.ratio is not None:
                module.ratio.set(torch.linspace(*EVEN_RATIOS, shape.heads, device=self.device))
            if module.proj is not None:
                for weight in module.proj.parameters():
                    weight.copy_(shape.head_dim**-0.5 * torch.randn(weight.shape, generator=generator))
        return module

    def ran(self) -> dict[str, str]:
        """What each kernel ran, in words: for the notes of a run."""
        words: dict[str, list[str]] = {}
        for call, name in self._kernels.items():
            words.setdefault(name, []).append(call)
        return {name: ", ".join(calls) for name, calls in words.items()}


def kernel(module: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel that a module's call runs.

    Raises:
        UnavailableError: there is none, or on a GPU the reference alone.
    """
    proj = None if module.proj is None else (module.proj.weight, module.proj.bias)
    ratio = None if module.ratio is None else module.ratio()
    try:
        choice = explain_sparse_linear(
            q, k, v, module.route(q, k), ratio, module.options, proj=proj, causal=module.causal
        )
    except (ValueError, ImportError) as error:
        raise UnavailableError(str(error)) from error
    if q.is_cuda and "reference" in choice.kernel:
        why = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
        raise UnavailableError(f"only the reference runs on this GPU ({why or 'no kernel of its own'})")
    return choice.kernel


class TrainingFree:
    """The training-free choice of blocks, through the spec of :func:`~allears.ops.attention.attention`."""

    def __init__(self, numerics: Numerics) -> None:
        self.numerics: Numerics = numerics
        self._made: list[dense.Ours] = []

    def __call__(self, case: SparseCase) -> Prepared:
        sparsity, causal = Sparsity(keep=case.keep), case.shape.causal
        ours = dense.Ours(AttentionSpec(numerics=self.numerics, sparse=sparsity))
        self._made.append(ours)

        def formula(q: Tensor, k: Tensor) -> Formula:
            options = options_of(sparsity, "exact")
            blocks = spargeattn_blocks(q, k, keep=case.keep, options=options, causal=causal)
            eye = torch.eye(q.shape[-1], device=q.device)
            router = (eye.expand(q.shape[2], -1, -1), eye.expand(k.shape[2], -1, -1))
            return Formula(blocks, options, router=router, keep=case.keep, causal=causal)

        return Prepared(ours, formula)

    def ran(self) -> dict[str, str]:
        """What each kernel ran, in words: for the notes of a run."""
        words: dict[str, dict[str, None]] = {}
        for ours in self._made:
            for name, calls in ours.ran().items():
                words.setdefault(name, {})[calls] = None
        return {name: ", ".join(calls) for name, calls in words.items()}


def _training_free(numerics: Numerics) -> Callable[[Machine], tuple[Make, str]]:
    def load_training_free(machine: Machine) -> tuple[Make, str]:
        return TrainingFree(numerics), f"AttentionSpec(numerics={numerics!r}, sparse=Sparsity(keep=...))"

    return load_training_free


def _ours(options: SparseLinear, graph: bool = False) -> Callable[[Machine], tuple[Make, str]]:
    def load_ours(machine: Machine) -> tuple[Make, str]:
        if graph and machine.device.type != "cuda":
            raise UnavailableError(f"CUDA graphs need a CUDA GPU; this is {machine.device}")
        how = ", replayed as a CUDA graph" if graph else ""
        return Ours(options, machine.device, graph), f"SparseLinearAttention, {options}{how}"

    return load_ours


def _dense(name: str) -> System[Make]:
    (system,) = dense.select([name])

    def load_dense(machine: Machine) -> tuple[Make, str]:
        attend, about = system.load(machine)
        return lambda case: Prepared(attend), about

    return System(name, load_dense, system.trains, system.bounds)


def _peer(load: Callable[[Machine], tuple[Callable[[SparseCase], tuple[Attend, Callable]], str]]) -> Callable:
    def load_peer(machine: Machine) -> tuple[Make, str]:
        make, about = load(machine)
        return lambda case: Prepared(*make(case), heads_first=True), about

    return load_peer


SYSTEMS: tuple[System[Make], ...] = (
    System("allears-sla2", _ours(SparseLinear()), True, SPARSE),
    System("allears-sla2-int8fp8", _ours(SparseLinear(precision="int8_fp8")), True, INT8),
    System("allears-sla2-int8fp8-graph", _ours(SparseLinear(precision="int8_fp8"), True), False, INT8),
    System("allears-sla", _ours(SparseLinear(form="sla")), True, SPARSE),
    System("allears-sparse", _training_free("exact"), True, SPARSE),
    System("allears-sparse-int8fp8", _training_free("int8_fp8"), False, INT8),
    _dense("fa2"),
    _dense("cudnn"),
    System("sla-triton", _peer(load_sla), True, SPARSE),
    System("sagesla", _peer(load_sagesla), False, SAGESLA),
    System("spargeattn", _peer(load_spargeattn), False, SAGESLA),
)


def select(names: Sequence[str]) -> list[System[Make]]:
    """Those of :data:`SYSTEMS`, all or those named.

    Raises:
        ValueError: a name is unknown.
    """
    return dense.pick(names, SYSTEMS)
