import math
from dataclasses import replace

import pytest
import torch

from allears.models.language import LanguageConfig, LanguageModel
from allears.models.language.loss import next_token_loss
from allears.ops.attention import LowBit
from allears.recipes.pretrain_trace import (
    Q_SMOOTHING,
    TENSORS,
    Activations,
    cosine,
    exact_tensors,
    record_activations,
    rel_l2,
    sagebwd_tensors,
    trace_errors,
)

CONFIG = LanguageConfig(vocabulary=40, context=150, layers=2, channels=32, heads=4, kv_heads=2, hidden=48)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(40, (2, 151), generator=torch.Generator().manual_seed(0))


def _random(length=70, heads=4, groups=2):
    rng = torch.Generator().manual_seed(3)
    shapes = ((2, length, h, 16) for h in (heads, groups, groups, heads))
    return Activations(*(torch.randn(shape, generator=rng) for shape in shapes))


def test_cosine_and_relative_error():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert cosine(x, y) == pytest.approx(24 / 25) and rel_l2(x, y) == pytest.approx(math.sqrt(2) / 5)
    assert cosine(x, 2 * x) == pytest.approx(1.0) and rel_l2(2 * x, x) == pytest.approx(1.0)


def test_exact_tensors_are_those_of_autograd():
    act = _random()
    q, k, v = (x.clone().requires_grad_() for x in (act.q, act.k, act.v))
    keys, values = (x.transpose(1, 2).repeat_interleave(2, dim=1) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) / 4
    scores.retain_grad()
    weights = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).softmax(-1)
    weights.retain_grad()
    out = weights @ values
    out.backward(act.d_out.transpose(1, 2))
    found = exact_tensors(act, smooth_k=True)
    below = torch.ones(70, 70).tril()
    wanted = {"P": weights, "O": out, "dP": weights.grad * below, "dS": scores.grad}
    wanted |= {name: x.grad.transpose(1, 2) for name, x in (("dQ", q), ("dK", k), ("dV", v))}
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x.detach(), rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(exact_tensors(act, smooth_k=False)["S"], scores.detach() * below, rtol=1e-4, atol=1e-5)
    means = act.k.mean(1).repeat_interleave(2, dim=1)
    moved = torch.einsum("blhd,bhd->bhl", act.q, means).unsqueeze(-1) / 4
    torch.testing.assert_close(found["S"], (scores.detach() - moved) * below, rtol=1e-4, atol=1e-5)


def test_recorded_activations_give_the_gradients_of_the_model(model, tokens):
    """dQ, dK, dV from what was recorded, carried through the projection, are the gradient of its weights."""
    acts = record_activations(model, tokens)
    assert all(parameter.grad is None for parameter in model.parameters())
    inputs = []
    hooks = [a.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach())) for a in model.attentions()]
    next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    for hook in hooks:
        hook.remove()
    for attention, act, x in zip(model.attentions(), acts, inputs, strict=True):
        wanted = attention.qkv.weight.grad.clone()
        found = exact_tensors(act, smooth_k=True)
        parts = attention._project(x, 0)
        grads = [found[name].transpose(1, 2) for name in ("dQ", "dK", "dV")]
        (carried,) = torch.autograd.grad(parts, attention.qkv.weight, grads)
        torch.testing.assert_close(carried, wanted, rtol=1e-3, atol=1e-7)
    model.zero_grad(set_to_none=True)


def test_sagebwd_tensors_are_exact_where_integers_are():
    """Rows of integers that reach 127 are their own INT8: S, P, dP are exact, and the rest close."""
    rng = torch.Generator().manual_seed(5)
    q, k = (torch.randint(-5, 6, (1, 70, 2, 16), generator=rng).float() for _ in range(2))
    for x in (q, k):
        x.scatter_(-1, torch.randint(16, (1, 70, 2, 1), generator=rng), 127.0)
    scale = 1 / 64
    act = Activations(q * scale, k * scale, *(torch.randn(1, 70, 2, 16, generator=rng) for _ in range(2)))
    found, exact = sagebwd_tensors(act, LowBit(smooth_k=False)), exact_tensors(act, smooth_k=False)
    for name in ("S", "P", "dP"):
        torch.testing.assert_close(found[name], exact[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in TENSORS:
        assert found[name].shape == exact[name].shape and rel_l2(found[name], exact[name]) < 0.05, name


def test_finer_scales_err_less_and_errors_are_those_of_eight_bits(model, tokens):
    rows = trace_errors(model, tokens)
    assert model.attentions()[0].spec.numerics == "exact"
    errors = {(r["layer"], r["grad_scales"], r["tensor"], r["metric"]): r["value"] for r in rows}
    assert len(errors) == len(rows) == 2 * (6 + 3 * 2 * len(TENSORS))
    for layer in range(2):
        assert errors[layer, "row", "dP", "rel_l2"] < 1e-6
        for name in ("S", "P", "O", "dS", "dQ", "dK", "dV"):
            fine, coarse = (errors[layer, scales, name, "rel_l2"] for scales in ("row", "tile"))
            assert 1e-5 < fine < 0.2 and fine < 1.05 * coarse, name
            assert errors[layer, "row", name, "cosine"] == pytest.approx(1 - fine**2 / 2, abs=5e-3)
        assert errors[layer, "row", "dQ", "rel_l2"] < errors[layer, "tile", "dQ", "rel_l2"]
    first = record_activations(model, tokens)[0]
    assert errors[0, None, "Q", "sigma"] == pytest.approx(float(first.q.std()))
    weights = exact_tensors(first, True)["P"]
    shown = weights[..., torch.ones(150, 150).tril().bool()]
    assert errors[0, None, "P", "rms"] == pytest.approx(float(shown.square().mean().sqrt()), rel=1e-5)


def test_smoothed_queries_err_less_where_they_share_an_offset():
    act = _random(150)
    act = replace(act, q=act.q + 4 * torch.randn(16, generator=torch.Generator().manual_seed(8)))
    exact = exact_tensors(act, smooth_k=True)
    plain, smoothed = (sagebwd_tensors(act, LowBit(smooth_q=smooth_q)) for smooth_q in (None, True))
    for name in ("S", "P", "dS", "O", "dQ"):
        assert rel_l2(smoothed[name], exact[name]) < 0.8 * rel_l2(plain[name], exact[name]), name


def test_the_trace_has_smoothed_queries_too(model, tokens):
    """Its rows are the errors of the tensors that the reference has with them."""
    rows = {(r["layer"], r["grad_scales"], r["tensor"], r["metric"]): r["value"] for r in trace_errors(model, tokens)}
    act = record_activations(model, tokens)[1]
    found = sagebwd_tensors(act, LowBit(smooth_q=True))["dK"]
    assert rows[1, Q_SMOOTHING, "dK", "rel_l2"] == pytest.approx(
        rel_l2(found, exact_tensors(act, True)["dK"]), rel=1e-3
    )
