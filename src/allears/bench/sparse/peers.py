"""The published modules of sparse-linear attention: SLA in Triton, and SageSLA in INT8 and FP8 (github.com/thu-ml/SLA).

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

from allears.bench.attention.peers import UnavailableError
from allears.bench.attention.systems import Attend, Machine
from allears.bench.sparse.cases import SparseCase
from allears.bench.sparse.formula import Formula
from allears.ops.attention.sparse_linear.blocks import blocks_from_map
from allears.ops.attention.sparse_linear.options import SparseLinear

KEYS = 64  # keys of a block of ours
SLA_BLOCKS = (64, 64)  # queries and keys of a block: what SLA's module has by default
SAGESLA_BLOCKS = (64, 128)  # what SageSLA's module takes on compute capability 9.0; it chooses by itself

Make = Callable[[SparseCase], tuple[Attend, Callable[[Tensor, Tensor], Formula]]]


def load_sla(machine: Machine) -> tuple[Make, str]:
    """SLA's Triton module.

    Raises:
        UnavailableError: no GPU, or the package does not import.
    """
    machine.need_gpu()
    package, about = _package("sparse_linear_attention", "sparse_linear_attention")
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
    package, about = _package("SageSLA", "sparse_linear_attention", "spas_sage_attn")
    if torch.cuda.get_device_capability(machine.device) != (9, 0):
        raise UnavailableError("its blocks are known here for compute capability 9.0 alone")

    def new(case: SparseCase) -> torch.nn.Module:
        return package.SageSparseLinearAttention(case.shape.head_dim, case.keep)

    return maker(new, package, SAGESLA_BLOCKS, machine.device), f"{about}, blocks {'x'.join(map(str, SAGESLA_BLOCKS))}"


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
        module = new(case).to(device)

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            return module(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        def formula(q: Tensor, k: Tensor) -> Formula:
            heads = (x.transpose(1, 2).contiguous() for x in (q, k))
            map, _, _ = package.utils.get_block_map(*heads, topk_ratio=case.keep, BLKQ=block_q, BLKK=block_k)
            fine = map.bool().repeat_interleave(block_k // KEYS, -1)[..., : -(-k.shape[1] // KEYS)]
            width = int(fine.sum(-1).max())
            return Formula(blocks_from_map(fine, width=width), SparseLinear(form="sparse", block_q=block_q))

        return attend, formula

    return make


def _package(name: str, *distributions: str) -> tuple[ModuleType, str]:
    """The package with its ``utils``, and the versions of what it comes from."""
    try:
        package = import_module(name)
        import_module(f"{name}.utils")
    except ImportError as error:
        raise UnavailableError(f"{name} does not import: {error}") from error
    return package, ", ".join(f"{distribution} {_version(distribution)}" for distribution in distributions)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
