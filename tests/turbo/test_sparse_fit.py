import math

import pytest
import torch
from sparse_samples import misleading

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec, attention
from allears.ops.attention.sparse_linear import SparseLinear, map_from_blocks
from allears.turbo.sparse.fit import block_mass, branches, draw_rows, fit_projection, fit_ratio, fit_router, measure
from allears.turbo.sparse.record import LayerFacts
from allears.turbo.sparse.search import SparseSettings, search_layer

B64 = SparseLinear(block_q=64)
CPU = torch.device("cpu")
FACTS = LayerFacts(2, 2, 8, False, 8**-0.5, seen=4, kept=4)


@pytest.fixture(scope="module")
def samples():
    return [misleading(seed) for seed in range(4)]


def new_core(keep=0.25, options=B64, **more):
    return SparseLinearAttention(2, 8, keep, options, **more)


def test_learned_router_finds_the_blocks_that_pooled_means_miss(samples):
    pooled, learned = new_core(), new_core()
    fit_ratio(pooled, samples[:3])
    losses = []
    fit_router(learned, samples[:3], steps=40, lr=0.05, query_blocks=3, watch=lambda step, loss: losses.append(loss))
    fit_ratio(learned, samples[:3])
    before, after = measure(pooled, samples[3:]), measure(learned, samples[3:])
    assert len(losses) == 40 and losses[19] < 0.3 * losses[0] and losses[-1] < 0.02
    assert after.mass > before.mass + 0.2 and after.error < 0.3 * before.error
    assert before.kept == after.kept == 0.25
    assert learned.stage == "hard" and not learned.router.proj_q.requires_grad


def test_straight_through_fit_is_of_the_numbers_asked_for(samples):
    """The losses that it reports are those of the hard map in low bit."""
    core, losses = new_core(options=SparseLinear(block_q=64, precision="int8_fp8")), []
    core.init_from(*(x[None] for x in samples[0]))
    start = measure(core, samples[:1])
    more = {"steps": 2, "query_blocks": 9, "mass_share": 0, "straight_through": True}
    with torch.no_grad():  # as a model is usually called: the fit takes its own gradients
        fit_router(core, samples[:1], **more, watch=lambda step, loss: losses.append(loss))
    exact = new_core()
    exact.init_from(*(x[None] for x in samples[0]))
    assert math.sqrt(losses[0]) == pytest.approx(start.error, rel=1e-4)
    assert measure(exact, samples[:1]).error != pytest.approx(start.error, rel=1e-4)


def test_block_mass_is_that_of_the_softmax():
    draws = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 150, 2, 8, generator=draws), torch.randn(1, 130, 2, 8, generator=draws)
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8)).softmax(-1)
    wanted = torch.stack(
        [torch.stack([part.sum(-1).mean(-1) for part in rows.split(64, -1)], -1) for rows in weights.split(64, 2)], 2
    )
    torch.testing.assert_close(block_mass(new_core(), q, k), wanted)
    causal = block_mass(new_core(causal=True), q[:, :130], k)
    assert causal.sum(-1).sub(1).abs().max() < 1e-5 and causal[0, :, 0, 1:].abs().max() == 0


def test_the_first_part_trains_the_router_alone(samples):
    core = new_core()
    ratio = core.ratio.logit.detach().clone()
    fit_router(core, samples[:1], steps=3, query_blocks=2, mass_share=1.0)
    assert torch.equal(core.ratio.logit, ratio) and (core.router.proj_q - torch.eye(8)).abs().max() > 1e-3
    assert core.temperature == 0.1


@pytest.mark.parametrize("of_query", [False, True])
def test_the_fitted_ratio_is_the_best_one(samples, of_query):
    core = new_core(ratio_of_query=of_query)
    fit_ratio(core, samples[:2])
    best = measure(core, samples[:2]).error
    for parameter in core.ratio.parameters():
        for sign in (-1, 1):
            with torch.no_grad():
                parameter += sign * 0.1
                assert measure(core, samples[:2]).error > best
                parameter -= sign * 0.1
    if of_query:
        plain = new_core()
        fit_ratio(plain, samples[:2])
        assert best < measure(plain, samples[:2]).error


def test_the_fitted_projection_is_the_least_squares_solution(samples):
    core = new_core(options=SparseLinear(form="sla", block_q=64))
    fit_projection(core, samples[:2])
    best = measure(core, samples[:2])
    assert best.error < best.sparse
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in core.proj.parameters():
            shift = 0.02 * torch.randn(parameter.shape, generator=draws)
            with torch.no_grad():
                parameter += shift
                assert measure(core, samples[:2]).error > best.error
                parameter -= shift


def test_measured_errors_are_those_of_the_definition(samples):
    core = new_core()
    found = measure(core, samples[:2])
    off = size = 0.0
    for sample in samples[:2]:
        q, k, v = (x[None] for x in sample)
        wanted = attention(q, k, v)
        off += float((core(q, k, v).detach() - wanted).square().sum())
        size += float(wanted.square().sum())
    assert found.error == pytest.approx(math.sqrt(off / size), rel=1e-5)


def test_branches_mix_to_the_output(samples):
    q, k, v = (x[None] for x in samples[0])
    core = new_core()
    exact, linear = branches(core, q, k, v)
    share = core.ratio()[..., None].transpose(1, 2)
    torch.testing.assert_close(share * exact + (1 - share) * linear, core(q, k, v), atol=1e-5, rtol=1e-4)
    sla = new_core(options=SparseLinear(form="sla", block_q=64))
    torch.nn.init.eye_(sla.proj.weight)
    exact, linear = branches(sla, q, k, v)
    torch.testing.assert_close(exact + linear, sla(q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_drawn_rows_attend_as_they_do_in_the_whole(causal):
    """Dense output and routed blocks of some query blocks are those rows of the whole; the tail is one of them."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 8, generator=draws) for _ in range(3))
    spec = AttentionSpec(causal=causal)
    whole, core = attention(q, k, v, spec), new_core(causal=causal)
    route, seen = map_from_blocks(core.route(q, k), 5), set()
    for _ in range(12):
        some_q, some_k, some_v = draw_rows(q, k, v, 64, 2, causal, draws)
        rows = [int((q[0] == row).all((1, 2)).nonzero()) for row in some_q[0]]
        assert len(rows) in (64 + 44, 128)
        seen |= set(rows)
        torch.testing.assert_close(attention(some_q, some_k, some_v, spec), whole[:, rows], atol=1e-5, rtol=1e-4)
        if not causal:
            blocks = sorted({row // 64 for row in rows})
            assert torch.equal(map_from_blocks(core.route(some_q, some_k), 5), route[:, :, blocks])
    assert len(seen) == 300


def test_search_takes_the_sparsest_that_is_good_enough(samples):
    settings = SparseSettings(
        keeps=(0.5, 0.13, 0.25), max_error=0.3, options=B64, steps=30, lr=0.05, query_blocks=3, ratio_of_query=False
    )
    steps = []
    report, core = search_layer("x", FACTS, samples, settings, CPU, lambda keep, step, loss: steps.append((keep, step)))
    assert [trial.keep for trial in report.trials] == [0.13, 0.25] and report.keep == core.keep == 0.25
    assert report.trials[0].error > 0.3 >= report.trials[1].error and report.sparsity == 0.75
    assert steps == [(keep, step) for keep in (0.13, 0.25) for step in range(1, 31)]
    last = report.trials[1]
    assert last.router == "learned" and last.error < last.error_pooled < last.error_sparse
    assert measure(core, samples[3:]).error == pytest.approx(last.error)  # a quarter is held out


def test_layers_that_cannot_be_sparse_stay_dense(samples):
    settings = SparseSettings(keeps=(0.13,), max_error=1e-3, options=B64, steps=1)
    report, core = search_layer("x", FACTS, samples, settings, CPU)
    assert core is None and report.keep is None and report.sparsity == 0
    assert report.reason == f"error {report.trials[0].error:.3f} is above 0.001"
    short = [type(s)(*(x[:100] for x in s)) for s in samples]
    report, core = search_layer("x", FACTS, short, SparseSettings(keeps=(0.1,), options=B64, steps=1), CPU)
    assert core is None or report.trials[0].kept == 0.5
    shorter = [type(s)(*(x[:60] for x in s)) for s in samples]
    report, core = search_layer("x", FACTS, shorter, SparseSettings(keeps=(0.1,), options=B64, steps=1), CPU)
    assert core is None and report.reason == "too short: at keep 0.1 its blocks hold 100% of the keys"
    masked = LayerFacts(2, 2, 8, False, 8**-0.5, dense_because="it attends with a mask")
    report, core = search_layer("x", masked, [], settings, CPU)
    assert core is None and report.reason == "it attends with a mask" and report.trials == ()


def test_wrong_settings_and_samples_are_named(samples):
    for change, name in (
        ({"keeps": ()}, "keeps"),
        ({"max_error": 0}, "max_error"),
        ({"steps": 0}, "steps"),
        ({"holdout": 1.0}, "holdout"),
        ({"keeps": (2.0,)}, "keeps"),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            SparseSettings(**change)
    with pytest.raises(ValueError, match=r"samples: \(H, G, D\) = \(2, 2, 8\) given, the layer has \(4, 4, 8\)"):
        fit_ratio(SparseLinearAttention(4, 8), samples)
    with pytest.raises(ValueError, match="samples: none given"):
        measure(new_core(), [])
    with pytest.raises(ValueError, match="form: 'sla' trains no router"):
        fit_router(new_core(options=SparseLinear(form="sla", block_q=64)), samples, steps=1)
    with pytest.raises(ValueError, match="form: 'sla2' has no projection"):
        fit_projection(new_core(), samples)
