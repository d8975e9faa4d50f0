"""Sequences of different lengths in one call of the module: each must come out as it does alone."""

from typing import Any

import pytest
import torch

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear, map_from_blocks
from allears.ops.attention.sparse_linear.inputs import shared_packing

LENGTHS = (1, 63, 0, 64, 65, 200)
KEY_LENGTHS = (130, 1, 70, 64, 0, 257)
LONGEST = 210

FORMS: dict[str, dict[str, Any]] = {
    "sla2": {},
    "of-query": {"ratio_of_query": True},
    "causal": {"causal": True},
    "sla": {"options": SparseLinear(form="sla", block_q=64), "skip": 0.3},
    "sparse": {"options": SparseLinear(form="sparse", block_q=64)},
    "int8": {"options": SparseLinear(block_q=64, precision="int8_fp8")},
    "not-smoothed": {"options": SparseLinear(block_q=128, smooth_k=False)},
}
forms = pytest.mark.parametrize("form", FORMS)


def core_of(form="sla2", seed=1):
    """Four query heads on two, all parameters away from where they start."""
    options: dict[str, Any] = {"options": SparseLinear(block_q=64), "kv_heads": 2} | FORMS[form]
    core = SparseLinearAttention(4, 8, 0.4, **options)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draws)
    return core


def sequences(lengths=LENGTHS, key_lengths=None, seed=0):
    """(q, k, v) of each sequence; the keys of each stand somewhere else, so that a mean over all of them is seen."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for i, (n_q, n_k) in enumerate(zip(lengths, key_lengths or lengths, strict=True)):
        q, k, v = (torch.randn(n, h, 8, generator=draws) for n, h in ((n_q, 4), (n_k, 2), (n_k, 2)))
        near = torch.randn(-(-n_k // 64), 2, 8, generator=draws).repeat_interleave(64, 0)[:n_k]
        found.append((q, k + 1.5 * near + 2.0 * i - 3.0, v))
    return found


def packed_rows(each):
    return [torch.cat(parts).requires_grad_() for parts in zip(*each, strict=True)]


def padded_rows(each, longest=LONGEST, filling=float("nan")):
    """(B, L, heads, D) with ``filling`` behind each sequence."""
    return [
        torch.stack(
            [torch.cat((x, x.new_full((longest - len(x), *x.shape[1:]), filling))) for x in parts]
        ).requires_grad_()
        for parts in zip(*each, strict=True)
    ]


def offsets(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def loss(out):
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + out.square().sum()


def alone(core, each):
    """Outputs of each sequence, the gradients of q, k and v, and those of the parameters, of one call for each."""
    rows = packed_rows(each)
    cuts = [x.split([len(part) for part in parts]) for x, parts in zip(rows, zip(*each, strict=True), strict=True)]
    out = torch.cat([core(*(x[None] for x in one))[0] for one in zip(*cuts, strict=True)])
    return out, *gradients(core, out, rows)


def gradients(core, out, rows):
    parameters = [p for p in core.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(out), rows + parameters)
    return found[:3], found[3:]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


@forms
def test_packed_sequences_are_each_as_alone(form):
    core, each = core_of(form), sequences()
    out, of_rows, of_parameters = alone(core, each)
    rows = packed_rows(each)
    found = core(*rows, cu_seqlens=offsets(LENGTHS))
    close(found, out)
    close(gradients(core, found, rows), (of_rows, of_parameters))
    assert len(of_parameters) == {"sparse": 0, "sla": 2, "of-query": 2}.get(form, 1)
    assert all(x.abs().max() > 0 for x in of_parameters)


@forms
def test_rows_behind_a_length_change_nothing_and_give_zeros(form):
    core, each = core_of(form), sequences()
    out, of_rows, of_parameters = alone(core, each)
    rows = padded_rows(each)
    lengths = torch.tensor(LENGTHS)
    found = core(*rows, lengths=lengths)
    there = torch.arange(LONGEST) < lengths[:, None]
    assert found.shape == (len(LENGTHS), LONGEST, 4, 8) and not found[~there].any()
    close(found[there], out)
    behind = gradients(core, found[there], rows)
    close(([x[there] for x in behind[0]], behind[1]), (list(of_rows), of_parameters))
    assert not any(x[~there].any() for x in behind[0])


@pytest.mark.parametrize("form", ["of-query", "sla", "sparse"])
def test_packed_keys_may_have_other_lengths(form):
    core, each = core_of(form), sequences(LENGTHS, KEY_LENGTHS)
    more = {"cu_seqlens": offsets(LENGTHS), "cu_seqlens_k": offsets(KEY_LENGTHS).long()}
    rows = packed_rows(each)
    found = core(*rows, **more)
    out, *wanted = alone(core, each)
    close(found, out)
    close(list(gradients(core, found, rows)), wanted)
    close(core(*rows, **more, max_seqlen=300, max_seqlen_k=257), out)


def test_the_router_scores_and_picks_for_each_sequence_as_alone():
    core, each = core_of(), sequences()
    q, k, _ = packed_rows(each)
    packing = shared_packing(q, k, offsets(LENGTHS), None, None, None)
    scores, picked = core.scores(q, k, packing=packing), map_from_blocks(core.route(q, k, packing=packing), 4)
    for i, (one_q, one_k, _) in enumerate(each):
        of_one = core.scores(one_q[None], one_k[None])[0]
        n = of_one.shape[-1]
        close(scores[i, :, :n, :n], of_one)
        wanted = map_from_blocks(core.route(one_q[None], one_k[None]), n)[0]
        assert torch.equal(picked[i, :, :n, :n], wanted) and picked[i].sum() == wanted.sum()


def test_full_lengths_are_a_plain_call():
    core = core_of("of-query")
    q, k, v = padded_rows(sequences((70, 70)), 70)
    plain = core(q, k, v)
    assert torch.equal(core(q, k, v, lengths=torch.tensor([70, 70])), plain)
    assert torch.equal(core(q, k, v, None, torch.tensor([70, 70], dtype=torch.int32)), plain)
    empty = [x.detach()[:, :0] for x in (q, k, v)]
    assert core(*empty, lengths=torch.tensor([0, 0])).shape == (2, 0, 4, 8)
    assert not core(q, k, v, lengths=torch.tensor([0, 0])).any()


def test_soft_stage_refuses_what_it_has_no_form_for():
    core, each = core_of(), sequences((70, 20))
    core.set_stage("soft")
    with pytest.raises(ValueError, match=r"lengths: given in the soft stage.*set_stage\('hard'\)"):
        core(*padded_rows(each, 70), lengths=torch.tensor([70, 20]))
    with pytest.raises(ValueError, match="cu_seqlens: given in the soft stage"):
        core(*packed_rows(each), cu_seqlens=offsets((70, 20)))
    sla = core_of("sla")
    sla.set_stage("soft")  # it has no router to fit, and one way to attend
    rows = packed_rows(each)
    close(sla(*rows, cu_seqlens=offsets((70, 20))), alone(sla, each)[0])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"lengths": torch.tensor([70])}, r"lengths: torch.int64 \(1,\) given; it must be .* \(B,\) = \(2,\)"),
        ({"lengths": torch.tensor([70.0, 2.0])}, "lengths: torch.float32"),
        ({"lengths": torch.tensor([71, 2])}, r"lengths: \[71, 2\] given; each must be from 0 to .* 70"),
        ({"lengths": [70, 2]}, "lengths: list given"),
        ({"max_seqlen": 70}, "max_seqlen_q, max_seqlen_k: given without cu_seqlens"),
        ({"cu_seqlens": offsets((70, 70))}, r"q: shape \(2, 70, 4, 8\) given; this layer was built for \(T, 4, 8\)"),
    ],
)
def test_bad_lengths_are_named(more, words):
    with pytest.raises(ValueError, match=words):
        core_of()(*padded_rows(sequences((70, 70)), 70), **more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cu_seqlens": [0, 90]}, "cu_seqlens_q: list given"),
        ({"cu_seqlens": torch.tensor([0, 70, 80])}, r"cu_seqlens_q: \[0, 70, 80\] given; it must rise from 0 to .* 90"),
        ({"cu_seqlens": torch.tensor([0.0, 90.0])}, "cu_seqlens_q: torch.float32"),
        ({"cu_seqlens": offsets((70, 20)), "max_seqlen": 60}, "max_seqlen_q: 60 given; the longest sequence has 70"),
        ({"cu_seqlens_k": offsets((70, 20))}, "one given without the other"),
        ({"cu_seqlens": offsets((70, 20)), "cu_seqlens_k": offsets((90,))}, "cu_seqlens_k: 2 offsets"),
        ({"cu_seqlens": offsets((70, 20)), "lengths": torch.tensor([70, 20])}, "lengths: given with cu_seqlens"),
        ({"cu_seqlens": offsets((70, 20)), "mask": torch.ones(90, 90).bool()}, "mask: given"),
        ({}, r"q: shape \(90, 4, 8\) given; this layer was built for \(B, L, 4, 8\)"),
    ],
)
def test_bad_offsets_are_named(more, words):
    with pytest.raises(ValueError, match=words):
        core_of()(*packed_rows(sequences((70, 20))), **more)


def test_other_lengths_of_keys_need_their_own_offsets():
    each = sequences((70, 20), (30, 40))
    with pytest.raises(ValueError, match="cu_seqlens: given alone with 90 rows of q and 70 of k; give cu_seqlens_k"):
        core_of()(*packed_rows(each), cu_seqlens=offsets((70, 20)))
    q, k, v = (x[:, :n] for x, n in zip(padded_rows(each, 70), (70, 40, 40), strict=True))
    with pytest.raises(ValueError, match=r"lengths: given with q \(2, 70, 4, 8\), k \(2, 40, 2, 8\)"):
        core_of()(q, k, v, lengths=torch.tensor([30, 20]))
