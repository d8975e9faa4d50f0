import pytest
import torch
from torch import nn

from allears.models.enhance import PRESETS
from allears.models.enhance.loss import LossWeights, draw_times, flow_loss, waveform_terms
from allears.models.enhance.state import level_of, to_state

CONFIG = PRESETS["test"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fixed(nn.Module):
    """Predicts the same state whatever it is shown."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self.state = nn.Parameter(state)

    def forward(self, x_t, y, t):
        return self.state


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    clean = 0.1 * torch.randn(2, 4000, generator=generator(1))
    return clean + 0.05 * torch.randn(2, 4000, generator=generator(2)), clean


def test_perfect_estimate_costs_nothing():
    noisy, clean = clips()
    _, terms = flow_loss(Fixed(to_state(clean / level_of(noisy), CONFIG)), CONFIG, noisy, clean, generator())
    assert terms["complex"] == 0 and terms["magnitude"] == 0
    assert terms["wave"] < 1e-4 and terms["spectra"] < 1e-3
    assert terms["snr_db"] == pytest.approx(-30, abs=0.05)


def test_terms_have_the_stated_sizes():
    """A state off by d everywhere costs 2 d^2; waveforms of half the size, 6 dB of error below the signal."""
    noisy, clean = clips()
    state = to_state(clean / level_of(noisy), CONFIG)
    _, terms = flow_loss(Fixed(state + 0.1), CONFIG, noisy, clean, generator())
    assert terms["complex"] == pytest.approx(0.02, rel=1e-4)
    x = torch.randn(1, 4000, generator=generator(3))
    terms = waveform_terms(0.5 * x, x)
    assert terms["snr_db"].item() == pytest.approx(-6.02, abs=0.05)
    assert terms["wave"].item() == pytest.approx(0.5 * x.abs().mean().item(), rel=1e-4)


def test_total_is_the_weighted_sum():
    """At t = 1 the emphasis 1.1 / (t + 0.1) is 1, so the total is the plain weighted sum of the terms."""
    noisy, clean = clips()
    net = Fixed(to_state(clean, CONFIG) * 0.9)
    weights = LossWeights(complex=2.0, magnitude=0.5, wave=0.3, spectra=0.7, snr_db=0.01, at_prior=1.0)
    total, terms = flow_loss(net, CONFIG, noisy, clean, generator(), weights)
    assert total.item() == pytest.approx(sum(getattr(weights, k) * v.item() for k, v in terms.items()), rel=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_silent_targets_give_finite_loss_and_gradients(perturbed_net, noise):
    noisy = noise * torch.randn(2, 3000, generator=generator(4))
    total, terms = flow_loss(perturbed_net, CONFIG, noisy, torch.zeros_like(noisy), generator())
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(value) for value in terms.values())
    for name, parameter in perturbed_net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_gradient_at_a_perfectly_silent_estimate_is_finite():
    state = to_state(torch.zeros(2, 2000), CONFIG)
    net = Fixed(state)
    flow_loss(net, CONFIG, 0.1 * torch.ones(2, 2000), torch.zeros(2, 2000), generator())[0].backward()
    assert torch.isfinite(net.state.grad).all()


def test_training_steps_lower_the_loss(perturbed_net):
    noisy, clean = clips()
    optimizer = torch.optim.Adam(perturbed_net.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        total, _ = flow_loss(perturbed_net, CONFIG, noisy, clean, generator())
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.9 * losses[0]


def test_times_are_drawn_as_told():
    device = torch.device("cpu")
    assert (draw_times(100, 1.0, generator(), device) == 1).all()
    t = draw_times(4000, 0.4, generator(), device)
    assert 0.37 < (t == 1).float().mean() < 0.43
    rest = t[t < 1]
    assert rest.min() >= 0.02 and rest.mean().item() == pytest.approx(0.51, abs=0.03)
