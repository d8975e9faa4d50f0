import math

import pytest
import torch

from allears.core.errors import WeightsError
from allears.core.weights import check_keys, load_weights, save_weights
from allears.nn import sparse_linear_attention as module
from allears.nn.attention import CrossAttention, SelfAttention
from allears.nn.sparse_linear_attention import BlockRouter, MixingRatio, SparseLinearAttention
from allears.ops.attention import AttentionSpec, attention
from allears.ops.attention.sparse_linear import (
    SparseLinear,
    Statistics,
    key_mean,
    map_from_blocks,
    pool_blocks,
    sparse_linear_attention,
)

B64 = SparseLinear(block_q=64)


def inputs(length_q=300, length_k=None, heads=2, kv_heads=None, size=8, batch=1, seed=0):
    """q, k, v whose keys come in neighbourhoods, so that some blocks matter more than others."""
    draws = torch.Generator().manual_seed(seed)
    length_k = length_q if length_k is None else length_k
    shapes = ((length_q, heads), (length_k, kv_heads or heads), (length_k, kv_heads or heads))
    q, k, v = (torch.randn(batch, n, h, size, generator=draws) for n, h in shapes)
    centres = 1.5 * torch.randn(batch, -(-length_k // 64), k.shape[2], size, generator=draws)
    return q, k + centres.repeat_interleave(64, 1)[:, :length_k], v


def by_hand(core, q, k, v):
    """A query block at a time: the top blocks by pooled and projected means, both branches, mixed."""
    bq, bk, scale = core.options.block_q, core.options.block_k, core.head_dim**-0.5
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            keys, values = k[b, :, g] - k[b, :, g].mean(0), v[b, :, g]
            parts = list(zip(keys.split(bk), values.split(bk), strict=True))
            pooled = torch.stack([part.mean(0) for part, _ in parts]) @ core.router.proj_k[g]
            for at in range(0, q.shape[1], bq):
                rows = q[b, at : at + bq, h]
                mean = rows.mean(0)
                order = (pooled @ (mean @ core.router.proj_q[h])).argsort(descending=True).tolist()
                kept = max(1, int(core.keep * len(parts) + 1e-4))
                near_k, near_v = (torch.cat([parts[j][i] for j in order[:kept]]) for i in (0, 1))
                far_k, far_v = (torch.cat([parts[j][i] for j in order[kept:]]) for i in (0, 1))
                exact = (scale * rows @ near_k.T).softmax(-1) @ near_v
                weights = rows.softmax(-1) @ far_k.softmax(-1).T
                linear = weights @ far_v / weights.sum(-1, keepdim=True)
                logit = core.ratio.logit[h] + (mean @ core.ratio.weight[h] if core.ratio.weight is not None else 0)
                share = torch.sigmoid(logit)
                out[b, at : at + bq, h] = share * exact + (1 - share) * linear
    return out


def shaken(core, seed=1):
    """Parameters away from where they start."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draws)
    return core


@pytest.mark.parametrize("of_query", [False, True])
def test_output_is_that_of_the_equations(of_query):
    core = shaken(SparseLinearAttention(4, 8, 0.4, B64, kv_heads=2, ratio_of_query=of_query))
    q, k, v = inputs(length_q=150, length_k=330, heads=4, kv_heads=2, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(core(q, k, v), by_hand(core, q, k, v), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("of_query", [False, True])
def test_statistics_of_a_fused_kernel_give_what_its_own_passes_do(of_query, monkeypatch):
    """Where a kernel measures q and k itself, the module takes the pools from it and goes past the door."""
    core = shaken(SparseLinearAttention(4, 8, 0.4, B64, kv_heads=2, ratio_of_query=of_query))
    q, k, v = inputs(length_q=150, length_k=330, heads=4, kv_heads=2, batch=2)
    seen = []

    def measured(q, k, v, options, *, trains, causal, kernel):
        seen.append(trains)
        return Statistics(pool_blocks(q, 64), pool_blocks(k, 64), key_mean(k), v.abs().amax(1))

    def attend(q, k, v, blocks, ratio, options, *, scale, statistics):
        assert not statistics.q_pool.numel() and torch.equal(statistics.k_mean, key_mean(k))
        return sparse_linear_attention(q, k, v, blocks, ratio, options, scale=scale)

    with torch.no_grad():
        wanted = core(q, k, v)
        monkeypatch.setattr(module, "fused_statistics", measured)
        monkeypatch.setattr(module, "attend_measured", attend)
        torch.testing.assert_close(core(q, k, v), wanted, atol=1e-6, rtol=1e-5)
        core.ratio.logit.requires_grad_(False)
        core(q, k, v)
    assert seen == [True, of_query]  # a weight that still takes gradients counts as well


def test_everything_kept_is_dense_attention():
    q, k, v = inputs()
    core = SparseLinearAttention(2, 8, 1.0, B64)
    torch.testing.assert_close(core(q, k, v), attention(q, k, v), atol=1e-5, rtol=1e-4)
    causal = SparseLinearAttention(2, 8, 1.0, B64, causal=True)
    wanted = attention(q, k, v, AttentionSpec(causal=True))
    torch.testing.assert_close(causal(q, k, v), wanted, atol=1e-5, rtol=1e-4)


def test_causal_sees_nothing_that_comes_later():
    q, k, v = inputs()
    core = shaken(SparseLinearAttention(2, 8, 0.3, B64, causal=True))
    before = core(q, k, v)
    changed = [torch.cat([x[:, :200], x[:, 200:].flip(1)], 1) for x in (q, k, v)]
    torch.testing.assert_close(core(*changed)[:, :192], before[:, :192], atol=1e-6, rtol=1e-5)


def test_the_identity_is_the_router_of_pooled_means():
    q, k, _ = inputs(length_q=256)
    core = SparseLinearAttention(2, 8, 0.25, B64)
    means = [x.view(1, 4, 64, 2, 8).mean(2).transpose(1, 2) for x in (q, k)]
    wanted = means[0] @ (means[1] - means[1].mean(2, keepdim=True)).mT / math.sqrt(8)
    torch.testing.assert_close(core.scores(q, k), wanted, atol=1e-5, rtol=1e-4)
    best = map_from_blocks(core.route(q, k), 4)
    assert torch.equal(best, torch.nn.functional.one_hot(wanted.argmax(-1), 4).bool())


def test_stages_are_set_by_hand_and_decide_what_trains():
    q, k, v = inputs()
    core = SparseLinearAttention(2, 8, 0.4, B64, ratio_of_query=True)
    core(q, k, v).square().sum().backward()
    assert core.router.proj_q.grad is None and core.ratio.logit.grad.abs().min() > 0
    core.set_stage("soft")
    hard_out = core.attend(q, k, v, core.route(q, k))
    soft_out = core.eval()(q, k, v)
    assert (soft_out - hard_out).abs().max() > 1e-3
    soft_out.square().sum().backward()
    assert core.router.proj_q.grad.abs().max() > 0 and core.router.proj_k.grad.abs().max() > 0
    core.set_stage("hard")
    assert not core.router.proj_q.requires_grad
    torch.testing.assert_close(core.train()(q, k, v), hard_out)
    with pytest.raises(ValueError, match="stage: 'eval' given"):
        core.set_stage("eval")


def test_a_cold_soft_map_is_the_hard_one():
    q, k, v = inputs()
    core = shaken(SparseLinearAttention(2, 8, 0.4, B64, temperature=1e-4))
    hard_out = core(q, k, v)
    core.set_stage("soft")
    torch.testing.assert_close(core(q, k, v), hard_out, atol=1e-4, rtol=1e-3)


def test_soft_gradients_are_the_slope_of_the_error():
    """Finite differences in float64 along a direction, router and ratio."""
    q, k, v = (x.double() for x in inputs(length_q=130))
    core = shaken(SparseLinearAttention(2, 8, 0.4, B64, temperature=0.5, ratio_of_query=True))
    core.set_stage("soft")
    wanted = attention(q, k, v)
    parameters = list(core.parameters())
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in parameters]

    def loss():
        return (core(q, k, v) - wanted).square().sum()

    loss().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    step, found = 1e-2, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            found.append(float(loss()))
    assert slope == pytest.approx((found[0] - found[1]) / (2 * step), rel=2e-2)


def test_the_ratio_starts_at_the_measured_mass():
    q, k, v = inputs(length_q=320, batch=2)
    core = SparseLinearAttention(2, 8, 0.4, B64)
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8)).softmax(-1)
    picked = map_from_blocks(core.route(q, k), 5).repeat_interleave(64, 2).repeat_interleave(64, 3)
    wanted = (weights * picked).sum(-1)
    torch.testing.assert_close(core.mass(q, k, v), wanted, atol=1e-5, rtol=1e-4)
    core.init_from(q, k, v)
    torch.testing.assert_close(core.ratio()[0, :, 0], wanted.mean((0, 2)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="form: 'sparse' has no ratio"):
        SparseLinearAttention(2, 8, 0.4, SparseLinear(form="sparse", block_q=64)).init_from(q, k, v)


def test_ratio_is_kept_off_its_ends_and_asks_for_the_query():
    ratio = MixingRatio(3, 4, of_query=True)
    ratio.set(torch.tensor([0.0, 0.5, 1.0]))
    pools = torch.randn(1, 3, 2, 4)
    torch.testing.assert_close(ratio(pools)[0, :, 0], torch.tensor([0.01, 0.5, 0.99]))
    with pytest.raises(ValueError, match="q_pool: None given"):
        ratio()


def test_form_sla_starts_as_sparse_and_trains_its_projection():
    q, k, v = inputs(length_q=640)
    sla = SparseLinearAttention(2, 8, 0.2, SparseLinear(form="sla", block_q=64), skip=0.3)
    sparse = SparseLinearAttention(2, 8, 0.2, SparseLinear(form="sparse", block_q=64))
    torch.testing.assert_close(sla(q, k, v), sparse(q, k, v))
    blocks = sla.route(q, k)
    assert blocks.count.eq(2).all() and blocks.linear.sum(-1).eq(5).all()  # of ten: two read, three skipped
    sla(q, k, v).square().sum().backward()
    assert sla.proj.weight.grad.abs().max() > 0 and sla.router is None and sla.ratio is None


def test_router_is_computed_in_float32_under_autocast():
    router = BlockRouter(2, 8)
    pools = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(*pools, 0.3), router(*pools, 0.3).float())
        found = router(*pools, 0.3)
    assert torch.equal(found, router(*pools, 0.3))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"keep": 0.2}, "keep=0.4"),
        ({"options": SparseLinear(block_q=128)}, "block_q=64"),
        ({"options": SparseLinear(block_q=64, feature_map="elu")}, "feature_map='softmax'"),
        ({"options": SparseLinear(block_q=64, form="sparse")}, "form='sla2'"),
    ],
)
def test_a_checkpoint_of_other_blocks_is_refused(change, name, tmp_path):
    core = shaken(SparseLinearAttention(2, 8, 0.4, B64))
    save_weights(tmp_path / "core", core.state_dict(), {}, dtype=None)
    state, _ = load_weights(tmp_path / "core")
    same = SparseLinearAttention(2, 8, 0.4, SparseLinear(block_q=64, precision="int8_fp8"))
    check_keys(same, state)
    same.load_state_dict(state)
    assert torch.equal(same.router.proj_q, core.router.proj_q)
    other = SparseLinearAttention(**{"heads": 2, "head_dim": 8, "keep": 0.4, "options": B64} | change)
    with pytest.raises(WeightsError, match=f"trained with {name}"):
        other.load_state_dict(state, strict=False)


def test_keep_out_of_range_and_masks_are_refused():
    with pytest.raises(ValueError, match="keep: 0 given"):
        SparseLinearAttention(2, 8, 0)
    with pytest.raises(ValueError, match="mask: given"):
        SparseLinearAttention(2, 8)(*inputs(length_q=70), torch.ones(70, 70, dtype=torch.bool))


@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"q": (1, 70, 3, 8)}, r"q: shape \(1, 70, 3, 8\) given; this layer was built for \(B, L, 4, 8\)"),
        ({"q": (1, 70, 4, 16)}, r"q: shape \(1, 70, 4, 16\) given"),
        (
            {"k": (1, 70, 4, 8)},
            r"k: shape \(1, 70, 4, 8\) given; this layer was built for \(B, L, 2, 8\): build it with",
        ),
        ({"v": (1, 70, 2, 9)}, r"v: shape \(1, 70, 2, 9\) given"),
        ({"q": (70, 4, 8)}, r"q: shape \(70, 4, 8\) given"),
        ({"v": (1, 60, 2, 8)}, r"v: shape \(1, 60, 2, 8\) differs from k's"),
    ],
)
def test_other_heads_are_named(shapes, words, stage):
    core = SparseLinearAttention(4, 8, options=B64, kv_heads=2)
    core.set_stage(stage)
    given = {"q": (1, 70, 4, 8), "k": (1, 70, 2, 8), "v": (1, 70, 2, 8), **shapes}
    with pytest.raises(ValueError, match=words):
        core(*(torch.ones(*shape) for shape in given.values()))


def test_layers_take_it_as_their_core():
    torch.manual_seed(0)
    x, context = torch.randn(2, 200, 16), torch.randn(2, 130, 16)
    layer, cross = SelfAttention(16, 2), CrossAttention(16, 2, kv_heads=1)
    whole, part = SparseLinearAttention(2, 8, 1.0), SparseLinearAttention(2, 8, 0.3, B64, kv_heads=1)
    dense, dense_cross = layer(x), cross(x, context)
    layer.core, cross.core = whole, part
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-4)
    assert (cross(x, context) - dense_cross).abs().max() > 1e-3
    assert {"core.router.proj_q", "core.ratio.logit"} <= set(layer.state_dict())
    with pytest.raises(ValueError, match="mask: given"):
        layer(x, torch.ones(200, 200, dtype=torch.bool))
    layer.core, cross.core = None, None
    assert torch.equal(layer(x), dense) and set(layer.state_dict()) == {"qkv.weight", "out.weight"}
    causal = SelfAttention(16, 2, causal=True, core=SparseLinearAttention(2, 8))
    with pytest.raises(ValueError, match="has causal=False, this layer causal=True"):
        causal(x)
    with pytest.raises(ValueError, match="step: SparseLinearAttention attends here"):
        causal.step(x)
