"""Losses of separation, against formulas written out, and the choice of the permutation."""

import math
from itertools import permutations

import pytest
import torch

from allears.models.separate.loss import (
    SeparateLoss,
    best_permutations,
    magnitudes,
    pair_losses,
    separation_loss,
    si_snr_improvement_db,
)


def _clips(batch: int = 3, count: int = 3, samples: int = 700) -> torch.Tensor:
    return torch.randn(batch, count, samples, generator=torch.Generator().manual_seed(3))


def _si_snr(estimate: torch.Tensor, source: torch.Tensor) -> float:
    target = (estimate @ source) / (source @ source) * source
    return float(10 * torch.log10((target @ target) / ((estimate - target) @ (estimate - target))))


@pytest.mark.parametrize("measure", ["si_snr", "snr", "both"])
def test_pairs_are_the_formula(measure):
    sources, estimates = _clips(), _clips() + 0.7 * torch.roll(_clips(), 1, 1)
    power = sources.sum(1).square().sum(-1)
    pairs = pair_losses(estimates, sources, power, SeparateLoss(measure, ceiling_db=200.0))
    for i in range(3):
        for j in range(3):
            e, s = estimates[1, i], sources[1, j]
            formulas = {"si_snr": -_si_snr(e, s), "snr": -10 * math.log10(s @ s / ((e - s) @ (e - s)))}
            wanted = formulas.get(measure, sum(formulas.values()) / 2)
            assert float(pairs[1, i, j]) == pytest.approx(wanted, abs=2e-3)


def test_si_snr_ignores_the_level_and_snr_does_not():
    sources = _clips()
    power = sources.sum(1).square().sum(-1)
    estimate = sources + 0.3 * torch.roll(sources, 1, 1)
    near = {m: pair_losses(estimate, sources, power, SeparateLoss(m)) for m in ("si_snr", "snr")}
    far = {m: pair_losses(7 * estimate, sources, power, SeparateLoss(m)) for m in ("si_snr", "snr")}
    torch.testing.assert_close(near["si_snr"], far["si_snr"], atol=1e-4, rtol=0)
    assert (far["snr"].diagonal(dim1=1, dim2=2) > near["snr"].diagonal(dim1=1, dim2=2) + 10).all()


def test_ceiling_bounds_the_loss_and_its_gradient():
    sources = _clips()
    estimates = sources.clone().requires_grad_()
    power = sources.sum(1).square().sum(-1)
    loss = pair_losses(estimates, sources, power, SeparateLoss("snr", ceiling_db=30.0)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(loss, torch.full_like(loss, -30.0), atol=5e-3, rtol=0)
    loss.sum().backward()
    assert torch.isfinite(estimates.grad).all()


def test_an_output_without_talker_is_pushed_to_silence():
    sources = _clips()
    sources[:, 2] = 0
    power = sources.sum(1).square().sum(-1)
    loud, quiet = torch.randn_like(sources), torch.zeros_like(sources)
    options = SeparateLoss("snr", silent_db=20.0)
    assert (pair_losses(loud, sources, power, options)[:, :, 2] > -5).all()
    torch.testing.assert_close(pair_losses(quiet, sources, power, options)[:, :, 2], torch.full((3, 3), -20.0))


def test_best_permutation_is_the_best_of_all():
    pairs = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(1))
    value, order = best_permutations(pairs)
    for b in range(5):
        every = {p: sum(float(pairs[b, p[j], j]) for j in range(3)) / 3 for p in permutations(range(3))}
        best = min(every, key=every.get)
        assert float(value[b]) == pytest.approx(every[best], abs=1e-6)
        assert tuple(order[b].tolist()) == best


def test_the_order_of_the_outputs_does_not_matter():
    sources = _clips()
    mixture = sources.sum(1)
    outputs = (sources + 0.2 * _clips().flip(-1)).requires_grad_()
    aux = [outputs * 0.9 + 0.05 * mixture[:, None]]
    first, parts = separation_loss(outputs, aux, sources, mixture, SeparateLoss())
    order = torch.tensor([2, 0, 1])
    second, _ = separation_loss(outputs[:, order], [aux[0][:, order]], sources, mixture, SeparateLoss())
    torch.testing.assert_close(first, second)
    assert float(parts["main"]) < -10
    first.backward()
    assert float(outputs.grad.abs().sum()) > 0


def test_auxiliary_weight_falls_late():
    loss = SeparateLoss(auxiliary=0.4)
    assert loss.auxiliary_weight(0.0) == loss.auxiliary_weight(0.5) == 0.4
    assert loss.auxiliary_weight(1.0) == pytest.approx(0.4 * 0.8**20, rel=0.01)
    assert 0.4 > loss.auxiliary_weight(0.6) > loss.auxiliary_weight(0.9)


def test_parts_are_weighed():
    sources = _clips()
    mixture = sources.sum(1)
    outputs, aux = sources + 0.2 * mixture[:, None], sources + 0.5 * mixture[:, None]
    total, parts = separation_loss(outputs, [aux], sources, mixture, SeparateLoss(auxiliary=0.25))
    assert float(total) == pytest.approx(0.75 * float(parts["main"]) + 0.25 * float(parts["auxiliary"]), abs=1e-5)


def test_magnitudes_of_a_tone():
    time = torch.arange(4096) / 16_000
    spectrum = magnitudes(torch.sin(2 * torch.pi * 1000 * time)[None], SeparateLoss())
    assert spectrum.shape == (1, 257, 33)
    assert int(spectrum[0, :, 16].argmax()) == 32
    assert float(spectrum[0, 32, 16]) == pytest.approx(128, rel=0.01)


def test_improvement_is_over_the_talkers_who_are_there():
    sources = _clips()
    sources[:, 2] = 0
    mixture = sources.sum(1)
    outputs = torch.stack([0.01 * sources[:, 2], 3 * sources[:, 1], sources[:, 0]], 1)
    outputs = outputs + 0.05 * mixture[:, None]
    gains = si_snr_improvement_db(outputs, sources, mixture)
    for b in range(3):
        centred = [x - x.mean() for x in (outputs[b, 2], outputs[b, 1], sources[b, 0], sources[b, 1], mixture[b])]
        out0, out1, s0, s1, mix = centred
        wanted = (_si_snr(out0, s0) - _si_snr(mix, s0) + _si_snr(out1, s1) - _si_snr(mix, s1)) / 2
        assert float(gains[b]) == pytest.approx(wanted, abs=0.01)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="measure: 'sdr'"):
        SeparateLoss("sdr")
    with pytest.raises(ValueError, match="auxiliary: 1"):
        SeparateLoss(auxiliary=1.0)
