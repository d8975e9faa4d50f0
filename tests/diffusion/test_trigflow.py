import math

import pytest
import torch
from gaussian_flow import GaussianFlow

from allears.diffusion.angles import LogNormalTimes, ShiftedTimes, published_mean
from allears.diffusion.tangent import consistency_tangent, normalise_tangent, tangent_error, velocity_tangent
from allears.diffusion.trigflow import TrigFlow, angle_of_time, from_clean, guided, mix, rectified_time

WORLD = GaussianFlow(0.7, 0.4)


def state(batch: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    angle = torch.rand(batch, generator=rng, dtype=torch.float64) * 1.4 + 0.1
    return torch.randn(batch, 3, generator=rng, dtype=torch.float64), angle


def rough(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """A velocity with no symmetry at all."""
    return torch.sin(2 * x) * t[:, None] + condition * x.roll(1, dims=1) + torch.cos(3 * t)[:, None]


def test_times_and_angles_are_inverse_and_keep_the_ratio_of_noise_to_data():
    angle = torch.linspace(0, math.pi / 2, 50, dtype=torch.float64)
    t = rectified_time(angle)
    torch.testing.assert_close(angle_of_time(t), angle)
    assert t[0] == 0 and t[-1] == 1
    torch.testing.assert_close((t / (1 - t))[:-1], angle.tan()[:-1])


def test_field_is_the_mean_of_what_flows():
    """F = E[cos z - sin x_0 | x_a], by the posterior of a Gaussian; the clean state is E[x_0 | x_a]."""
    x, angle = state()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    share = (x - cos * WORLD.mean) / (cos**2 * WORLD.scale**2 + sin**2)
    clean, noise = WORLD.mean + cos * WORLD.scale**2 * share, sin * share
    found = TrigFlow(WORLD.velocity)(x, angle)
    torch.testing.assert_close(found.clean, clean)
    torch.testing.assert_close(found.field, cos * noise - sin * clean)


@pytest.mark.parametrize("angle", [0.0, math.pi / 2])
def test_field_is_finite_at_both_ends(angle):
    x = torch.randn(2, 3, dtype=torch.float64)
    at = torch.full((2,), angle, dtype=torch.float64)
    found = TrigFlow(WORLD.velocity)(x, at)
    assert torch.isfinite(found.field).all()
    if angle == 0:
        torch.testing.assert_close(found.clean, x)


@pytest.mark.parametrize(("how", "error"), [("exact", 1e-7), ("semi", 2e-5), ("finite", 2e-5)])
def test_tangent_of_the_field_equals_a_finite_difference(how, error):
    x, angle = state()
    d_x, d_angle = torch.randn_like(x), torch.randn_like(angle)
    flow, condition = TrigFlow(rough), torch.tensor(0.3, dtype=torch.float64)
    found, tangent = flow.with_tangent(x, angle, condition, d_x, d_angle, velocity_tangent(how))
    torch.testing.assert_close(found.field, flow(x, angle, condition).field)
    h = 1e-5
    ahead = flow(x + h * d_x, angle + h * d_angle, condition).field
    behind = flow(x - h * d_x, angle - h * d_angle, condition).field
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=error, atol=error)


def test_consistency_function_has_no_tangent():
    """The exact one stands still along the teacher's flow, and another one moves as a finite difference says."""
    x, angle = state()
    teacher, student = TrigFlow(WORLD.velocity), TrigFlow(WORLD.consistent)
    other = TrigFlow(GaussianFlow(0.5, 0.9).consistent)
    flow, speed = teacher(x, angle).field, angle.cos() * angle.sin()
    for net in (student, other):
        found, change = net.with_tangent(x, angle, None, speed[:, None] * flow, speed, velocity_tangent())
        g = consistency_tangent(x, angle, found.field, flow, change)
        h = 1e-5
        moved = (net(x + h * flow, angle + h).clean - net(x - h * flow, angle - h).clean) / (2 * h)
        torch.testing.assert_close(g, angle.cos()[:, None] * moved, rtol=1e-6, atol=1e-8)
    assert g.abs().max() > 0.1
    found, change = student.with_tangent(x, angle, None, speed[:, None] * flow, speed, velocity_tangent())
    assert consistency_tangent(x, angle, found.field, flow, change).abs().max() < 1e-12


def test_warm_up_starts_at_the_teacher():
    x, angle = state()
    student, teacher, change = (torch.randn_like(x) for _ in range(3))
    cold = consistency_tangent(x, angle, student, teacher, change, 0.0)
    torch.testing.assert_close(cold, angle.cos()[:, None] * (teacher - student))


def test_normalised_tangent_has_a_norm_below_one():
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.06, 0.08]])
    norms = normalise_tangent(g, 0.1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([5 / 5.1, 0.0, 0.5]))


def test_cut_tangent_is_found():
    x, t = torch.randn(8, 3), torch.rand(8)
    d_x, d_t = torch.randn(8, 3), torch.randn(8)
    whole = tangent_error(rough, x, t, 0.3, d_x, d_t)
    cut = tangent_error(lambda x, t, c: rough(x, t, c).detach(), x, t, 0.3, d_x, d_t)
    assert whole < 1e-3 and cut == pytest.approx(1.0)


def test_guidance_and_clean_predictions_are_velocities():
    x, t = torch.randn(4, 3), torch.tensor([0.2, 0.5, 1.0, 0.0])
    both = guided(rough, 3.0, 0.1)(x, t, 0.4)
    torch.testing.assert_close(both, 3 * rough(x, t, 0.4) - 2 * rough(x, t, 0.1))
    velocity = from_clean(lambda x, t, c: x - t[:, None] * rough(x, t, c))(x, t, 0.4)
    torch.testing.assert_close(velocity[:3], rough(x, t, 0.4)[:3])
    assert torch.isfinite(velocity).all()


def test_draws_follow_their_laws():
    rng = torch.Generator().manual_seed(0)
    logs = LogNormalTimes(0.7, 1.6).draw(20_000, rng).tan().log()
    assert float(logs.mean()) == pytest.approx(0.7, abs=0.05) and float(logs.std()) == pytest.approx(1.6, abs=0.05)
    t = rectified_time(ShiftedTimes(5.0).draw(20_000, rng))
    assert float(t.median()) == pytest.approx(2.5 / 3, abs=0.01)  # 5 u / (1 + 4 u) at u = 0.5
    assert t.min() > 0 and t.max() <= 1
    assert published_mean(20) == pytest.approx(0.70, abs=0.005)


def test_bad_settings_are_named():
    for make, words in (
        (lambda: LogNormalTimes(0.0, 0.0), "std: 0.0 given"),
        (lambda: ShiftedTimes(0.5), "shift: 0.5 given"),
        (lambda: published_mean(0), "latent_frames: 0 given"),
        (lambda: velocity_tangent("fast"), "derivative: 'fast' given; known are exact, semi, finite"),
        (lambda: velocity_tangent("semi", 0.0), "derivative_step: 0.0 given"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_mix_is_a_rotation():
    x, angle = state()
    torch.testing.assert_close(mix(x, -x, angle), (angle.cos() - angle.sin())[:, None] * x)
