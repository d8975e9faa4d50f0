"""The forward by the Triton kernels against the reference, in Triton's interpreter or on a GPU. The interpreter
multiplies bfloat16 by its bits, so that 16 bits are float16 here.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed: T tokens of S sequences.
"""

import math

import pytest
import torch
from tests.ops.sparse_linear.triton_calls import DEVICE, ON_GPU, offsets, random_map, rel

from allears.ops.attention.call import Packing
from allears.ops.attention.lowbit.triton_host import Launch
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, blocks_from_map, map_from_blocks
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference
from allears.ops.attention.sparse_linear.routers import pooled_scores, select_top_k, sla_blocks
from allears.ops.attention.sparse_linear.triton_host import forward_launch, sparse_linear_forward_triton
from allears.ops.attention.sparse_linear.triton_run import sparse_linear_triton

pytestmark = pytest.mark.usefixtures("poison")


def operands(queries, keys, heads, groups, size, batch=1, dtype=torch.float16):
    q = torch.randn(batch, queries, heads, size, device=DEVICE)
    k = torch.randn(batch, keys, groups, size, device=DEVICE) + torch.randn(size, device=DEVICE)
    return q.to(dtype), k.to(dtype), torch.randn(batch, keys, groups, size, device=DEVICE).to(dtype)


def wanted_of(q, k, v, blocks, ratio, options, **how):
    """Both branches mixed, and their log-sum-exp; the projection of the form "sla" is left out."""
    size = q.shape[-1]
    proj = (torch.eye(size, device=DEVICE), None) if options.form == "sla" else None
    return sparse_linear_reference(q, k, v, blocks, ratio, options, proj=proj, **how)


# On a GPU the 8-bit numbers part from the reference's in two ways, which the interpreter does not show:
# - 1 / scale is good to 2 units in the last place there, so that of some 10,000 numbers of q one, which lies halfway
#   between two integers, is rounded to the other: all logits of its row move, and its log-sum-exp by some 1e-3 (one of
#   260 on an H100). The sum of a row is not to blame: it is of P as it was before rounding, in float32.
#   Causal calls do not smooth the keys, and 16-bit keys as they are lie near halves 10 to 100 times more often than
#   smoothed ones (1.6 of 1,000 bfloat16 ones; of smoothed ones 17 of a million): up to 5 % of the rows part (H200).
# - Hopper's FP8 unit keeps some 14 bits in its sums, 2^-13 = 1.2e-4 of the output.
FLIPPED, FLIPPED_UNSMOOTHED, FLIPPED_LSE, FP8_SUMS = 0.02, 0.08, 5e-3, 5e-4


def flips_of(options, causal):
    """The share of rows that may part."""
    if not ON_GPU or options.precision != "int8_fp8":
        return 0.0
    return FLIPPED_UNSMOOTHED if causal or not options.smooth_k else FLIPPED


def check(made, wanted, tolerance, lse_tolerance=1e-4, flips=0.0):
    out, lse = made.out.float(), made.lse
    if made.o_linear is not None:
        out = out + made.o_linear.float()
    assert made.out.isfinite().all()
    assert rel(out, wanted[0].float()) < tolerance
    if flips:
        apart = ~torch.isclose(lse, wanted[1].float(), rtol=lse_tolerance, atol=lse_tolerance)
        assert int(apart.sum()) <= max(1, flips * apart.numel())
        lse_tolerance = FLIPPED_LSE
    torch.testing.assert_close(lse, wanted[1].float(), rtol=lse_tolerance, atol=lse_tolerance)


def compare(q, k, v, options, causal=False, keep=0.4, ratio=None, tolerance=2e-3, **how):
    geometry = Geometry.of(q, k, options, causal)
    blocks = blocks_from_map(random_map(geometry, q.shape[0], q.shape[2], keep))
    if options.form == "sla2" and ratio is None:
        ratio = torch.rand(q.shape[0], q.shape[2], geometry.n_q, device=DEVICE)
    made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options, causal=causal, **how)
    how = {name: value for name, value in how.items() if name == "scale"}
    flips = flips_of(options, causal)
    check(made, wanted_of(q, k, v, blocks, ratio, options, causal=causal, **how), tolerance, flips=flips)
    return made


@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "size", "block_q", "form", "kind", "causal"),
    [
        (130, 330, 2, 1, 32, 64, "sla2", "softmax", False),
        (200, 100, 2, 2, 24, 128, "sla2", "elu", True),
        (100, 270, 2, 2, 16, 64, "sla", "relu", True),
        (65, 200, 2, 1, 40, 128, "sparse", "softmax", False),
        (1, 1, 1, 1, 8, 64, "sla2", "relu", False),
    ],
)
def test_equals_the_reference(precision, queries, keys, heads, groups, size, block_q, form, kind, causal):
    """Odd lengths; L_q below and above L_k, where causal alignment leaves queries without keys; grouped heads."""
    q, k, v = operands(queries, keys, heads, groups, size)
    options = SparseLinear(form=form, block_q=block_q, feature_map=kind, precision=precision)
    compare(q, k, v, options, causal)


@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
def test_float32_strides_scale_and_a_batch(precision):
    def mixed(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    q, k, v = (mixed(x) for x in operands(70, 140, 2, 1, 16, batch=2, dtype=torch.float32))
    before = [x.clone() for x in (q, k, v)]
    ratio = torch.rand(2, 1, device=DEVICE)
    options = SparseLinear(block_q=64, smooth_k=False, precision=precision)
    of_eight_bits = FP8_SUMS if ON_GPU else 1e-4
    compare(q, k, v, options, scale=0.3, ratio=ratio, tolerance=of_eight_bits if precision == "int8_fp8" else 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
def test_groups_of_heads_and_a_given_mean_change_nothing(precision):
    """One head at a time (the 8-bit copies then lie where the states were), and all at once."""
    q, k, v = operands(64, 100, 2, 2, 16)
    options = SparseLinear(block_q=64, precision=precision)
    ratio = torch.rand(1, 2, 1, device=DEVICE)
    one = compare(q, k, v, options, ratio=ratio, scratch_fraction=1e-9)
    whole = compare(q, k, v, options, ratio=ratio, scratch_fraction=1e9, k_mean=one.k_mean)
    assert rel(whole.out, one.out) < 1e-3 and torch.equal(whole.lse, one.lse)


def test_half_a_block_of_queries_a_program():
    q, k, v = operands(150, 150, 1, 1, 16)
    for causal in (False, True):
        compare(q, k, v, SparseLinear(), causal, launch=Launch(64, 4, 1))
    with pytest.raises(ValueError, match="launch: 48 rows"):
        compare(q, k, v, SparseLinear(), launch=Launch(48, 4, 1))


@pytest.mark.parametrize(("precision", "causal"), [("exact", False), ("int8_fp8", True)])
def test_packed_sequences(precision, causal):
    """Among them empty ones, one without keys, and one with more queries than keys."""
    cu_q, cu_k = offsets(70, 0, 3, 10), offsets(131, 19, 0, 5)
    packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 70, "max_seqlen_k": 131}
    q, k, v = (x[0] for x in operands(83, 155, 1, 1, 16))
    options = SparseLinear(block_q=64, precision=precision)
    geometry = Geometry.of(q, k, options, causal, Packing(*packing.values()))
    blocks = blocks_from_map(random_map(geometry, 4, 1, 0.3))
    ratio = torch.rand(4, 1, geometry.n_q, device=DEVICE)
    made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options, causal=causal, **packing)
    flips = flips_of(options, causal)
    check(made, wanted_of(q, k, v, blocks, ratio, options, causal=causal, **packing), 2e-3, flips=flips)
    assert not made.out[70:73].any() and made.lse[:, 70:73].eq(-math.inf).all()
    with pytest.raises(ValueError, match="max_seqlen_q, max_seqlen_k: None"):
        sparse_linear_forward_triton(q, k, v, blocks, ratio, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def test_a_row_that_keeps_all_or_all_but_one_block():
    """Without linear blocks the ratio is 1; with one the linear branch is exact, too."""
    q, k, v = operands(30, 64 * 9, 1, 1, 16)
    picked = torch.ones(1, 1, 1, 9, dtype=torch.bool, device=DEVICE)
    ratio = torch.full((1, 1, 1), 0.25, device=DEVICE)
    options = SparseLinear(block_q=64)
    dense = sparse_linear_forward_triton(q, k, v, blocks_from_map(picked), ratio, options)
    alone = sparse_linear_forward_triton(
        q, k, v, blocks_from_map(picked), None, SparseLinear(form="sparse", block_q=64)
    )
    assert torch.equal(dense.out, alone.out)
    picked[..., 4] = False
    blocks = blocks_from_map(picked)
    made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options)
    check(made, wanted_of(q, k, v, blocks, ratio, options), 1e-3)
    apart = sparse_linear_forward_triton(q, k, v, blocks, None, SparseLinear(form="sla", block_q=64))
    assert rel(apart.o_linear.float(), 4 / 3 * (made.out.float() - 0.25 * apart.out.float())) < 2e-3


def test_lists_of_three_classes():
    q, k, v = operands(100, 600, 2, 1, 16)
    options = SparseLinear(form="sla", block_q=64)
    geometry = Geometry.of(q, k, options, False)
    blocks = sla_blocks(pooled_scores(q, k, options, scale=0.25), 0.2, 0.3, geometry=geometry)
    assert int(blocks.linear.sum()) < int((~map_from_blocks(blocks, geometry.n_k)).sum())
    made = sparse_linear_forward_triton(q, k, v, blocks, None, options)
    check(made, wanted_of(q, k, v, blocks, None, options), 2e-3)


@pytest.mark.parametrize("size", [16, 24])
def test_the_projection_of_sla_is_added_by_the_kernel_where_no_gradient_is_asked_for(size):
    """A query block without linear blocks gets no bias either."""
    q, k, v = operands(100, 300, 2, 1, size)
    options = SparseLinear(form="sla", block_q=64)
    map = random_map(Geometry.of(q, k, options, False), 1, 2, 0.4)
    map[:, 1, 0] = True
    blocks = blocks_from_map(map)
    proj = (torch.randn(size, size, device=DEVICE), torch.randn(size, device=DEVICE))
    for given in (proj, (proj[0], None)):
        wanted, _ = sparse_linear_reference(q, k, v, blocks, None, options, proj=given)
        got, lse = sparse_linear_triton(q, k, v, blocks, None, options, proj=given)
        assert rel(got, wanted) < 2e-3
        learned = (given[0].requires_grad_(), given[1])
        apart, wanted_lse = sparse_linear_triton(q, k, v, blocks, None, options, proj=learned)
        assert apart.requires_grad and rel(got, apart.detach()) < 2e-3 and torch.equal(lse, wanted_lse)
        given[0].requires_grad_(False)


@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
def test_no_keys_and_no_queries(form):
    q = torch.zeros(1, 5, 2, 16, device=DEVICE)
    options = SparseLinear(form=form, block_q=64)
    ratio = torch.rand(2, 1, device=DEVICE) if form == "sla2" else None
    nothing = torch.zeros(1, 2, 1, device=DEVICE, dtype=torch.int32)
    made = sparse_linear_forward_triton(q, q[:, :0], q[:, :0], Blocks(nothing[..., :0, None], nothing), ratio, options)
    assert not made.out.any() and made.lse.eq(-math.inf).all()
    assert made.o_linear is None or not made.o_linear.any()
    none = nothing[:, :, :0]
    made = sparse_linear_forward_triton(q[:, :0], q, q, Blocks(none[..., None], none), ratio, options)
    assert made.out.shape == (1, 0, 2, 16) and made.lse.shape == (1, 2, 0)


def test_launches_fit_the_shared_memory_of_each_chip():
    for kib in (99, 163, 227):
        for padded in (32, 64, 128):
            for int8 in (False, True):
                launch = forward_launch(padded, 128, int8, shared_bytes=kib * 1024)
                stage = 64 * padded * (2 if int8 else 4)
                assert 128 * padded * (1 if int8 else 2) + launch.stages * stage <= kib * 1024
    assert forward_launch(128, 128, False) == Launch(128, 8, 3)
    assert forward_launch(256, 128, False).rows == 64


CASES = [
    ("sla2", "softmax", False, 128, 128, 1),
    ("sla2", "softmax", False, 64, 64, 2),
    ("sla2", "elu", True, 128, 128, 2),
    ("sla2", "relu", False, 80, 128, 1),
    ("sla", "softmax", True, 128, 64, 1),
    ("sla", "elu", False, 128, 128, 3),
    ("sparse", "softmax", False, 128, 128, 1),
    ("sparse", "softmax", True, 64, 128, 4),
    ("sla2", "softmax", False, 256, 128, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
@pytest.mark.parametrize(("form", "kind", "causal", "size", "block_q", "repeats"), CASES)
@pytest.mark.parametrize(("queries", "keys"), [(1000, 2000), (2000, 1000), (2048, 2048)])
def test_real_sizes(queries, keys, form, kind, causal, size, block_q, repeats, precision, dtype):
    q, k, v = operands(queries, keys, 2 * repeats, 2, size, batch=2, dtype=dtype)
    options = SparseLinear(form=form, block_q=block_q, feature_map=kind, precision=precision)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5}[dtype]
    compare(q, k, v, options, causal, keep=0.1, tolerance=max(tolerance, 2e-3) if precision != "exact" else tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
@pytest.mark.parametrize("causal", [False, True])
def test_real_packed_sequences(precision, causal):
    cu_q, cu_k = offsets(1000, 1, 0, 2000, 63, 500), offsets(1000, 300, 70, 1500, 0, 2001)
    packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 2000, "max_seqlen_k": 2001}
    q, k, v = (x[0] for x in operands(3564, 4871, 8, 2, 128, dtype=torch.bfloat16))
    options = SparseLinear(precision=precision)
    geometry = Geometry.of(q, k, options, causal, Packing(*packing.values()))
    blocks = blocks_from_map(random_map(geometry, 6, 8, 0.1))
    ratio = torch.rand(6, 8, geometry.n_q, device=DEVICE)
    made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options, causal=causal, **packing)
    wanted = wanted_of(q, k, v, blocks, ratio, options, causal=causal, **packing)
    check(made, wanted, 8e-3, flips=flips_of(options, causal))


@pytest.mark.gpu
def test_no_wait_no_recompile_and_little_memory():
    """A second length neither compiles nor waits; the scratch stays below a tenth of q, k and v."""
    options = SparseLinear()

    def run(length):
        q, k, v = operands(length, length, 12, 12, 128, dtype=torch.bfloat16)
        geometry = Geometry.of(q, k, options, False)
        blocks = select_top_k(pooled_scores(q, k, options, scale=128**-0.5), 0.05, geometry=geometry)
        ratio = torch.full((12, 1), 0.7, device=DEVICE)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        results = sum(x.numel() * x.element_size() for x in made if x is not None)
        return (torch.cuda.max_memory_allocated() - before - results) / (3 * 2 * q.numel())

    from allears.ops.attention.sparse_linear.triton_fwd import sparse_linear_forward_kernel

    run(8 * 1024)
    compiled = [len(cache[0]) for cache in sparse_linear_forward_kernel.device_caches.values()]
    assert run(10_007) < 0.1
    assert [len(cache[0]) for cache in sparse_linear_forward_kernel.device_caches.values()] == compiled
