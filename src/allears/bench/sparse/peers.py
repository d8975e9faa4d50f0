"""The published modules of sparse-linear attention: SLA in Triton, and SageSLA in INT8 and FP8 (github.com/thu-ml/SLA);
and the training-free sparse attention that they came from (github.com/thu-ml/SpargeAttn).

They take (B, H, L, D). Their formula is not ours: the linear branch covers all keys, also those that the softmax branch
reads, and is added through a projection that is zero in a new module. So a new module is held to what its softmax
branch must give on the map that its own ``get_block_map`` makes; its linear branch costs its time all the same.
Shapes: B batch, L length, H heads, D head size, M_q and M_k blocks of queries and keys.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from allears.bench.attention.peers import UnavailableError, sources
from allears.bench.attention.systems import Attend, Machine
from allears.bench.sparse.cases import SparseCase
from allears.bench.sparse.formula import Formula
from allears.ops.attention.sparse_linear.blocks import blocks_from_map
from allears.ops.attention.sparse_linear.options import SparseLinear

KEYS = 64  # keys of a block of ours
SLA_BLOCKS = (64, 64)  # queries and keys of a block: what SLA's module has by default
SAGESLA_BLOCKS = (
    64,
    128,
)  # what SageSLA's module and SpargeAttn take on compute capability 9.0; they choose themselves
SPARGE_BLOCKS = (128, 64)  # of SpargeAttn elsewhere

Make = Callable[[SparseCase], tuple[Attend, Callable[[Tensor, Tensor], Formula]]]


def load_sla(machine: Machine) -> tuple[Make, str]:
    """SLA's Triton module.

    Raises:
        UnavailableError: no GPU, or the package does not import.
    """
    machine.need_gpu()
    package, about = _package("sparse_linear_attention")
    block_q, block_k = SLA_BLOCKS

    def new(case: SparseCase) -> torch.nn.Module:
        return package.SparseLinearAttention(case.shape.head_dim, case.keep, BLKQ=block_q, BLKK=block_k)

    return maker(new, package, SLA_BLOCKS, machine.device), f"{about}, blocks {block_q}x{block_k}"


def load_sagesla(machine: Machine) -> tuple[Make, str]:
    """SageSLA, forward alone; of its kernels those for compute capability 9.0.

    Raises:
        UnavailableError: no such GPU, or a package does not import.
    """
    machine.need_gpu()
    package, about = _package("SageSLA", "spas_sage_attn")
    if torch.cuda.get_device_capability(machine.device) != (9, 0):
        raise UnavailableError("its blocks are known here for compute capability 9.0 alone")

    def new(case: SparseCase) -> torch.nn.Module:
        return package.SageSparseLinearAttention(case.shape.head_dim, case.keep)

    return maker(new, package, SAGESLA_BLOCKS, machine.device), f"{about}, blocks {'x'.join(map(str, SAGESLA_BLOCKS))}"


def load_spargeattn(machine: Machine) -> tuple[Make, str]:
    """SpargeAttn's function with the best blocks of each query block (top-k), forward alone, bidirectional.

    Raises:
        UnavailableError: no GPU, or the package does not import.
    """
    machine.need_gpu()
    package, about = _package("spas_sage_attn")
    hopper = torch.cuda.get_device_capability(machine.device) == (9, 0)
    blocks = SAGESLA_BLOCKS if hopper else SPARGE_BLOCKS
    return sparge_maker(package, blocks), f"{about}, top-k, blocks {'x'.join(map(str, blocks))}"


def sparge_maker(package: Any, blocks: tuple[int, int]) -> Make:
    """Attention and formula of SpargeAttn's top-k function.

    Args:
        package: has that function, and ``utils.get_block_map_meansim_fuse_quant``, which makes its map.
        blocks: queries and keys of a block that the function takes on this GPU.
    """

    def make(case: SparseCase) -> tuple[Attend, Callable[[Tensor, Tensor], Formula]]:
        _plain(case)

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return package.spas_sage2_attn_meansim_topk_cuda(*heads, topk=case.keep).transpose(1, 2)

        def formula(q: Tensor, k: Tensor) -> Formula:
            queries, keys = (x.transpose(1, 2).contiguous() for x in (q, k))
            sizes = {"BLKQ": blocks[0], "BLKK": blocks[1]}
            mean = keys.mean(-2, keepdim=True)
            rule = {"simthreshd1": -0.1, "cdfthreshd": None, "topk": case.keep}  # what the function has by default
            return _on_map(
                package.utils.get_block_map_meansim_fuse_quant(queries, keys, mean, **rule, **sizes)[0], blocks, k
            )

        return attend, formula

    return make


def maker(
    new: Callable[[SparseCase], torch.nn.Module], package: Any, blocks: tuple[int, int], device: torch.device
) -> Make:
    """Attention and formula of a published module.

    Args:
        new: a new module for a case.
        package: has ``utils.get_block_map``, which makes the module's map.
        blocks: queries and keys of a block; the keys a multiple of :data:`KEYS`.
    """
    block_q, block_k = blocks

    def make(case: SparseCase) -> tuple[Attend, Callable[[Tensor, Tensor], Formula]]:
        _plain(case)
        module = new(case).to(device)

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            return module(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        def formula(q: Tensor, k: Tensor) -> Formula:
            heads = (x.transpose(1, 2).contiguous() for x in (q, k))
            map, _, _ = package.utils.get_block_map(*heads, topk_ratio=case.keep, BLKQ=block_q, BLKK=block_k)
            return _on_map(map, blocks, k)

        return attend, formula

    return make


def _plain(case: SparseCase) -> None:
    """Raises :class:`UnavailableError` where a peer has no answer that could be compared."""
    if case.shape.causal or case.shape.heads != case.shape.kv_heads:
        raise UnavailableError("it has neither causal calls that mask by key nor shared key heads")


def _on_map(map: Tensor, blocks: tuple[int, int], k: Tensor) -> Formula:
    """Softmax over the blocks of a map (B, H, M_q, M_k) of these block sizes; k is (B, L, H, D)."""
    block_q, block_k = blocks
    fine = map.bool().repeat_interleave(block_k // KEYS, -1)[..., : -(-k.shape[1] // KEYS)]
    width = int(fine.sum(-1).max())
    return Formula(blocks_from_map(fine, width=width), SparseLinear(form="sparse", block_q=block_q))


def _package(name: str, *others: str) -> tuple[ModuleType, str]:
    """The package with its ``utils``, and what its sources and those of the others that it needs are."""
    try:
        package = import_module(name)
        import_module(f"{name}.utils")
        about = [f"{other} {_version(other)}, {sources(import_module(other))}" for other in (name, *others)]
    except ImportError as error:
        raise UnavailableError(f"{name} does not import: {error}") from error
    return package, "; ".join(about)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "without a version"
