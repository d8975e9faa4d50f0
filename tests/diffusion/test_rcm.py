import math
from itertools import pairwise

import pytest
import torch
from gaussian_flow import GaussianFlow

from allears.diffusion.angles import ShiftedTimes
from allears.diffusion.critic import critic_loss, roll_out, score_loss, squared_error
from allears.diffusion.rcm import RcmNets, RcmSettings, RcmStep
from allears.diffusion.trigflow import Field, TrigFlow, mix

WORLD = GaussianFlow(0.7, 0.4)
PLAIN = RcmSettings(score_weight=0.0, warmup_steps=0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int, seed: int = 1) -> torch.Tensor:
    return WORLD.mean + WORLD.scale * torch.randn(batch, 2, generator=rng(seed), dtype=torch.float64)


def test_exact_consistency_function_has_no_loss():
    nets = RcmNets(WORLD.consistent, WORLD.velocity)
    loss, parts = RcmStep(PLAIN).loss(nets, data(32), None, 0, rng())
    assert float(loss) < 1e-20
    wrong, _ = RcmStep(PLAIN).loss(RcmNets(GaussianFlow(0.0, 1.0).consistent, WORLD.velocity), data(32), None, 0, rng())
    assert 0.1 < float(wrong) < 1.0
    assert list(parts) == ["consistency"]


def test_gradient_moves_the_field_along_the_normalised_tangent():
    """The gradient with respect to a shift of the student's velocity, by a network call that is written out here."""
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    other = GaussianFlow(0.0, 1.0)
    nets = RcmNets(lambda x, t, c: other.consistent(x, t) + shift, WORLD.velocity)
    RcmStep(PLAIN).loss(nets, data(16), None, 0, rng())[0].backward()
    draws = rng()
    x0 = data(16)
    angle = PLAIN.consistency_angles.draw(16, draws)
    x = mix(x0, torch.randn(16, 2, generator=draws, dtype=torch.float64), angle)
    flow = TrigFlow(WORLD.velocity)(x, angle).field
    h = 1e-5
    net = TrigFlow(other.consistent)
    moved = (net(x + h * flow, angle + h).clean - net(x - h * flow, angle - h).clean) / (2 * h)
    g = angle.cos()[:, None] * moved
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    share = 1 / (angle.cos() + angle.sin())[:, None]  # of the velocity in the field
    torch.testing.assert_close(shift.grad, (-2 * g * share).mean(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("derivative", ["exact", "finite"])
def test_training_finds_the_consistency_function(derivative):
    """A student with a wrong mean and scale, as two numbers, comes to the world's."""
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    step = RcmStep(RcmSettings(score_weight=0.0, warmup_steps=20, derivative=derivative))
    optimiser = torch.optim.Adam([mean, scale], lr=0.03)
    draws, x0 = rng(), data(256)
    for index in range(80):
        nets = RcmNets(GaussianFlow(mean, scale).consistent, WORLD.velocity)
        optimiser.zero_grad()
        step.loss(nets, x0, None, index, draws)[0].backward()
        optimiser.step()
    found = mean.item(), scale.item()
    assert found == (pytest.approx(0.7, abs=0.06), pytest.approx(0.4, abs=0.06))


def test_score_distillation_moves_samples_to_the_teacher():
    """Its gradient is that of made -> 2 (x0_critic - x0_teacher) / mean |made - x0_teacher|."""
    made = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    critic, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    score_loss(made, Field(critic, critic), Field(teacher, teacher)).sum().backward()
    size = (made.detach() - teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(made.grad, 2 * (critic - teacher) / size)


def test_score_distillation_alone_finds_the_mean():
    """Critic and teacher exact: the student's mean goes to the teacher's."""
    mean = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    step = RcmStep(RcmSettings(warmup_steps=0, student_every=1, score_weight=1.0, rollout_calls=2))
    optimiser = torch.optim.Adam([mean], lr=0.1)
    draws = rng()
    for index in range(40):
        student = GaussianFlow(mean, WORLD.scale)
        nets = RcmNets(student.consistent, WORLD.velocity, GaussianFlow(mean.detach(), WORLD.scale).velocity)
        optimiser.zero_grad()
        step.score_loss(nets, data(64), None, index, draws).mean().backward()
        optimiser.step()
    assert float(mean.detach()) == pytest.approx(0.7, abs=0.1)


def test_critic_loss_is_the_clean_error_over_the_noise_and_least_at_the_posterior():
    made = data(4000)
    angle = ShiftedTimes().draw(4000, rng(3))
    noise = torch.randn(4000, 2, generator=rng(4), dtype=torch.float64)
    critic = TrigFlow(WORLD.velocity)
    loss = critic_loss(critic, made, None, angle, noise)
    clean = critic(mix(made, noise, angle), angle).clean
    torch.testing.assert_close(loss, (clean - made).square().sum(1) / angle.sin() ** 2)
    for other in (GaussianFlow(0.8, 0.4), GaussianFlow(0.7, 0.6)):
        assert critic_loss(TrigFlow(other.velocity), made, None, angle, noise).mean() > loss.mean()


def test_roll_out_has_the_gradient_of_its_last_call():
    gain = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    calls = []

    def student(x, t, condition):
        calls.append(t)
        return gain * WORLD.consistent(x, t)

    noise = torch.randn(500, 2, generator=rng(), dtype=torch.float64)
    made = roll_out(TrigFlow(student), noise, None, 3, ShiftedTimes(), rng(2))
    assert len(calls) == 3 and (calls[0] == 1.0).all()
    assert all((later <= before).all() for before, later in pairwise(calls)) and (calls[2] < calls[1]).any()
    assert (made.mean().item(), made.std().item()) == (pytest.approx(0.7, abs=0.06), pytest.approx(0.4, abs=0.04))
    (gradient,) = torch.autograd.grad(made.sum(), gain)
    one = roll_out(TrigFlow(student), noise, None, 1, ShiftedTimes(), rng(2))
    torch.testing.assert_close(one, WORLD.mean + WORLD.scale * noise)
    assert torch.isfinite(gradient) and gradient != 0


def test_turns_and_roll_outs():
    step = RcmStep(RcmSettings(warmup_steps=3, student_every=4, rollout_calls=2))
    assert [step.turn(index)[0] for index in range(12)] == list("ssssccc") + list("sccc") + ["s"]
    assert [step.rollout_calls(index) for index in (3, 7, 11)] == [1, 2, 1]  # the student's
    assert [step.rollout_calls(index) for index in (4, 5, 6, 8, 9)] == [1, 2, 1, 2, 1]  # the critic's
    assert {RcmStep(PLAIN).turn(index) for index in range(9)} == {"student"}


def test_only_the_network_whose_turn_it_is_gets_a_gradient():
    gains = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in ("student", "teacher", "critic")}
    nets = RcmNets(
        lambda x, t, c: gains["student"] * WORLD.consistent(x, t),
        lambda x, t, c: gains["teacher"] * WORLD.velocity(x, t),
        lambda x, t, c: gains["critic"] * WORLD.velocity(x, t),
    )
    step = RcmStep(RcmSettings(warmup_steps=0, student_every=2))
    for index, owner, names in ((0, "student", ["consistency", "score"]), (1, "critic", ["critic"])):
        loss, parts = step.loss(nets, data(8), None, index, rng())
        loss.backward()
        assert list(parts) == names
        assert [name for name, gain in gains.items() if gain.grad is not None] == [owner]
        gains[owner].grad = None


def test_entry_that_is_not_finite_counts_nothing():
    x = torch.tensor([[1.0, 2.0], [math.nan, 1.0]], requires_grad=True)
    loss = squared_error(x, torch.zeros(2, 2))
    loss.sum().backward()
    assert loss.tolist() == [5.0, 0.0] and x.grad.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_bad_settings_are_named():
    for change, words in (
        ({"student_every": 0}, "student_every: 0 given"),
        ({"score_weight": -1.0}, "score_weight"),
        ({"rollout_calls": 0}, "rollout_calls"),
        ({"derivative": "none"}, "derivative: 'none' given"),
        ({"tangent_floor": 0.0}, "tangent_floor"),
    ):
        with pytest.raises(ValueError, match=words):
            RcmSettings(**change)
    with pytest.raises(ValueError, match="critic: None given"):
        RcmStep().loss(RcmNets(WORLD.consistent, WORLD.velocity), data(2), None, 0, rng())
