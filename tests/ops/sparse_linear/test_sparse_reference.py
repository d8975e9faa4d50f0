import math
from functools import partial

import pytest
import torch
from tests.ops.sparse_linear.sparse_textbook import (
    operands,
    plain,
    random_blocks,
    random_map,
    random_ratio,
    textbook,
)

from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.sparse_linear import Blocks, Geometry, blocks_from_map, select_top_k, sla_blocks
from allears.ops.attention.sparse_linear.blocks import check_blocks
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference

close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def projection(size, bias=True, dtype=torch.float64):
    return torch.randn(size, size, dtype=dtype), torch.randn(size, dtype=dtype) if bias else None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
@pytest.mark.parametrize(("queries", "keys", "block_q"), [(1, 1, 64), (100, 150, 64), (150, 100, 128), (130, 193, 128)])
def test_equals_the_textbook(causal, form, queries, keys, block_q):
    q, k, v = operands(queries, keys)
    options = plain(form=form, block_q=block_q)
    map = random_map(q, k, options, causal)
    ratio = random_ratio(q, options) if form == "sla2" else None
    proj = projection(8) if form == "sla" else None
    how = {"proj": proj, "causal": causal, "scale": 0.4}
    out, lse = sparse_linear_reference(q, k, v, blocks_from_map(map), ratio, options, **how)
    wanted, wanted_lse = textbook(q, k, v, map, ratio, options, **how)
    close(out, wanted)
    close(lse, wanted_lse)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_feature_maps_see_the_smoothed_keys(feature_map, smooth_k):
    q, k, v = operands(70, 200, batch=2)
    options = plain(feature_map=feature_map, smooth_k=smooth_k)
    map, ratio = random_map(q, k, options), random_ratio(q, options)
    out, lse = sparse_linear_reference(q, k, v, blocks_from_map(map), ratio, options)
    wanted, wanted_lse = textbook(q, k, v, map, ratio, options)
    close(out, wanted)
    close(lse, wanted_lse)


def test_sla_leaves_the_skipped_blocks_out():
    q, k, v = operands(64, 320)
    options, proj = plain(form="sla"), projection(8, bias=False)
    geometry = Geometry.of(q, k, options, False)
    blocks = sla_blocks(torch.randn(1, 4, 1, 5), 0.2, 0.4, geometry=geometry)
    assert blocks.linear.sum(-1).eq(2).all()
    out, _ = sparse_linear_reference(q, k, v, blocks, None, options, proj=proj)
    map = torch.zeros(1, 4, 1, 5).bool().scatter(-1, blocks.rows.long(), True)
    close(out, textbook(q, k, v, map, None, options, proj=proj, linear=blocks.linear)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (100, 150), (150, 100)])
def test_all_blocks_selected_is_dense_attention(causal, lengths):
    q, k, v = operands(*lengths)
    wanted, wanted_lse = reference_attention(q, k, v, causal=causal, scale=0.3, return_lse=True)
    for form in ("sla2", "sla", "sparse"):
        options = plain(form=form)
        ratio = random_ratio(q, options).requires_grad_() if form == "sla2" else None
        blocks = blocks_from_map(Geometry.of(q, k, options, causal).visible().expand(1, 4, -1, -1).clone())
        proj = projection(8) if form == "sla" else None
        out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options, proj=proj, causal=causal, scale=0.3)
        close(out, wanted)
        close(lse, wanted_lse)
        if ratio is not None:
            (gradient,) = torch.autograd.grad(out.sum(), ratio)
            assert (gradient == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_true_row_mass_puts_dense_attention_together_again(causal):
    """O = a O_s + (1 - a) O_rest, a the softmax mass of the selected keys (SLA2, section 5.1): a test of lse too."""
    q, k, v = operands(150, 200)
    options = plain(form="sparse")
    selected = random_map(q, k, options, causal)
    rest = Geometry.of(q, k, options, causal).visible() & ~selected
    dense, dense_lse = reference_attention(q, k, v, causal=causal, return_lse=True)
    sparse, lse = sparse_linear_reference(q, k, v, blocks_from_map(selected), None, options, causal=causal)
    mass = (lse - dense_lse).exp()
    others, others_lse = dense_over(q, k, v, rest, options)
    close(mass + (others_lse - dense_lse).exp(), torch.ones_like(mass))
    share = mass.transpose(1, 2)[..., None]
    close(share * sparse + (1 - share) * others, dense)
    assert mass.min() < 0.9


def dense_over(q, k, v, map, options):
    """Attention over the tokens of a map that is allowed to have empty rows."""
    tokens = map.repeat_interleave(options.block_q, 2).repeat_interleave(options.block_k, 3)
    mask = tokens[:, :, : q.shape[1], : k.shape[1]]
    return reference_attention(q, k, v, mask, return_lse=True)


def gradients_checked(q, k, v, blocks, ratio, options, proj=None, **how):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    extra = [x.detach().requires_grad_() for x in (ratio, *(proj or ())) if x is not None]

    def run(q, k, v, *extra):
        if options.form == "sla2":
            return sparse_linear_reference(q, k, v, blocks, extra[0], options, **how)
        return sparse_linear_reference(q, k, v, blocks, None, options, proj=extra or None, **how)

    def finite(*inputs):
        out, lse = run(*inputs)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    return torch.autograd.gradcheck(finite, (*inputs, *extra), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (67, 131), (131, 67)])
def test_gradients(causal, form, queries, keys):
    q, k, v = operands(queries, keys, size=4, batch=2)
    options = plain(form=form)
    blocks = random_blocks(q, k, options, causal)
    ratio = random_ratio(q, options) if form == "sla2" else None
    proj = projection(4) if form == "sla" else None
    assert gradients_checked(q, k, v, blocks, ratio, options, proj, causal=causal)


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_gradients_of_other_feature_maps(feature_map):
    q, k, v = operands(67, 131, size=4)
    options = plain(feature_map=feature_map)
    ratio = random_ratio(q, options)[:, :, :1]  # one for each head
    assert gradients_checked(q, k, v, random_blocks(q, k, options), ratio, options)


PACKED = ([70, 0, 130, 1, 5], [100, 3, 65, 0, 130])


def packed_call(options, causal, dtype=torch.float64):
    offsets = [torch.tensor([0, *x]).cumsum(0).int() for x in PACKED]
    q, k, v = operands(sum(PACKED[0]), sum(PACKED[1]), size=4, dtype=dtype)
    lengths = [x.diff() for x in offsets]
    geometry = Geometry(*lengths, options.block_q, options.block_k, causal, longest_q=130, longest_k=130)
    blocks = select_top_k(torch.randn(5, 4, geometry.n_q, geometry.n_k), 0.5, geometry=geometry)
    names = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    return q[0], k[0], v[0], blocks, offsets, names


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["sla2", "sla"])
def test_packed_sequences_are_each_their_own(causal, form):
    options = plain(form=form)
    q, k, v, blocks, offsets, names = packed_call(options, causal)
    ratio = torch.rand(5, 4, 3, dtype=torch.float64) if form == "sla2" else None
    proj = projection(4) if form == "sla" else None
    out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options, proj=proj, causal=causal, **names)
    assert out.shape == q.shape and lse.shape == (4, q.shape[0])
    for s in range(5):
        of_q, of_k = (slice(int(x[s]), int(x[s + 1])) for x in offsets)
        alone = q[None, of_q], k[None, of_k], v[None, of_k]
        geometry = Geometry.of(*alone[:2], options, causal)
        own = Blocks(blocks.rows[s, None, :, : geometry.n_q, : geometry.n_k], blocks.count[s, None, :, : geometry.n_q])
        its_ratio = None if ratio is None else ratio[s, None, :, : geometry.n_q]
        wanted, wanted_lse = sparse_linear_reference(*alone, own, its_ratio, options, proj=proj, causal=causal)
        close(out[None, of_q], wanted)
        close(lse[None, :, of_q], wanted_lse)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_packed_sequences(causal):
    options = plain()
    q, k, v, blocks, _, names = packed_call(options, causal)
    assert gradients_checked(q, k, v, blocks, torch.rand(4, 1, dtype=torch.float64), options, causal=causal, **names)


def test_a_query_block_with_nothing_left_is_its_softmax():
    q, k, v = operands(128, 128)
    options = plain()
    map = torch.tensor([[True, True], [True, False]]).expand(1, 4, 2, 2).clone()
    ratio = torch.full((1, 4, 2), 0.3, dtype=torch.float64, requires_grad=True)
    out, _ = sparse_linear_reference(q, k, v, blocks_from_map(map), ratio, options)
    close(out[:, :64], reference_attention(q[:, :64], k, v))
    (gradient,) = torch.autograd.grad(out.sum(), ratio)
    assert (gradient[..., 0] == 0).all() and (gradient[..., 1] != 0).all()
    proj = projection(8)
    out, _ = sparse_linear_reference(q, k, v, blocks_from_map(map), None, plain(form="sla"), proj=proj)
    close(out[:, :64], reference_attention(q[:, :64], k, v))  # and no bias either


def test_queries_without_keys_are_zero():
    q, k, v = operands(150, 100)
    options, ratio = plain(), torch.full((4, 1), 0.5, dtype=torch.float64)
    q.requires_grad_()
    blocks = random_blocks(q, k, options, causal=True)
    out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options, causal=True)
    assert (out[:, :50] == 0).all() and (lse[..., :50] == -math.inf).all() and lse[..., 50:].isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert (gradient[:, :50] == 0).all() and gradient.isfinite().all()
    none = k[:, :0], v[:, :0]
    out, lse = sparse_linear_reference(q, *none, random_blocks(q, none[0], options), ratio, options)
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = sparse_linear_reference(q[:, :0], k, v, random_blocks(q[:, :0], k, options), ratio, options)
    assert out.shape == (1, 0, 4, 8) and lse.shape == (1, 4, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_short_inputs_are_never_nan(causal, length):
    """The released SLA rounds its count to 0 there and divides 0 by 0."""
    q, k, v = operands(length, length, dtype=torch.float32)
    options = plain()
    geometry = Geometry.of(q, k, options, causal)
    blocks = select_top_k(torch.randn(1, 4, geometry.n_q, geometry.n_k), 0.01, geometry=geometry)
    check_blocks(blocks, geometry)
    out, lse = sparse_linear_reference(q, k, v, blocks, torch.full((4, 1), 0.5), options, causal=causal)
    assert out.isfinite().all() and lse.isfinite().all()
    if length == 1:
        torch.testing.assert_close(out[0, 0], v[0, 0].repeat_interleave(2, 0))


def test_features_without_a_common_channel_give_no_nan():
    q, k, v = operands(64, 192, dtype=torch.float32)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[:, :128, :, 1], k[:, 128:, :, 2] = 3e4, 3e4, 3e4
    map = torch.tensor([True, False, False]).expand(1, 4, 1, 3).clone()
    q.requires_grad_()
    out, _ = sparse_linear_reference(q, k, v, blocks_from_map(map), torch.full((4, 1), 0.5), plain())
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in operands(100, 150))
    options = plain()
    blocks, ratio = random_blocks(q, k, options), random_ratio(q.float(), options)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide = (x.double() for x in (q, k, v))
    wanted, wanted_lse = sparse_linear_reference(*wide, blocks, ratio.double(), options)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, atol=max(step / 2, 1e-5), rtol=max(step / 2, 1e-5))
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)
