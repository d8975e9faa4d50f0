"""Training-free sparse attention by the kernels of this family, as the door of ``attention(...)`` sees them.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed T_q, T_k rows.
"""

from functools import partial
from typing import Any

from torch import Tensor

from allears.ops.attention.backend import Backend
from allears.ops.attention.call import TAKES_NO_MASK, Facts, Packing
from allears.ops.attention.sparse_linear.backends import KERNELS, Kernel
from allears.ops.attention.sparse_linear.options import Precision, SparseLinear
from allears.ops.attention.sparse_linear.spargeattn import spargeattn_blocks
from allears.ops.attention.sparsity import Sparsity
from allears.ops.attention.spec import AttentionSpec


def options_of(sparsity: Sparsity, precision: Precision) -> SparseLinear:
    """The softmax branch alone, with the blocks of ``sparsity``."""
    return SparseLinear("sparse", sparsity.block_q, sparsity.block_k, smooth_k=sparsity.smooth_k, precision=precision)


def run_training_free(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: Kernel,
    precision: Precision,
    causal: bool,
    scale: float,
    return_lse: bool,
    options: Sparsity,
    **packing: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Blocks by the rule of ``options``, then ``kernel``: q (B, L_q, H, D), k and v (B, L_k, G, D), or packed ones."""
    how = options_of(options, precision)
    blocks = spargeattn_blocks(
        q,
        k,
        keep=options.keep,
        mass=options.mass,
        similarity=options.similarity,
        options=how,
        scale=scale,
        causal=causal,
        packing=Packing(**packing) if packing else None,
    )
    out, lse = kernel.run(q, k, v, blocks, None, how, proj=None, causal=causal, scale=scale, **packing)
    return (out, lse) if return_lse else out


def _backend(kernel: Kernel, precision: Precision) -> Backend:
    def refuses(facts: Facts, spec: AttentionSpec) -> str:
        if facts.mask != "none":
            return TAKES_NO_MASK.format("sparse=None")
        assert spec.sparse is not None
        return kernel.refuses(facts, options_of(spec.sparse, precision), spec.kernel == kernel.name)

    def trains(spec: AttentionSpec) -> bool:
        return kernel.trains and precision == "exact"

    run = partial(run_training_free, kernel=kernel, precision=precision)
    return Backend(kernel.name, run, refuses, kernel.missing, trains, ragged=True)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "exact": tuple(_backend(kernel, "exact") for kernel in KERNELS),
    "int8_fp8": tuple(_backend(kernel, "int8_fp8") for kernel in KERNELS),
}
"""By numerics, in the order in which ``kernel="auto"`` tries them."""
