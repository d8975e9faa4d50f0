from dataclasses import replace

import pytest
import torch

from allears.models.video.config import PRESETS
from allears.models.video.loss import FlowLoss, draw_times, flow_loss
from allears.models.video.sample import calls_of, draw_noise, generate, guided, shifted_times

TEST = PRESETS["test"]
WORDS = torch.tensor([[1, 2, 0], [3, 0, 0]])


def to_one(value):
    """The exact velocity where all videos are one: (x - x0) / t."""

    def velocity(x, t, tokens):
        return (x - value) / t.view(-1, 1, 1, 1, 1)

    return velocity


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_velocity_leads_to_its_video(solver, steps):
    wanted = torch.rand(2, 3, *TEST.video_shape, generator=torch.Generator().manual_seed(0))
    made = generate(to_one(2 * wanted - 1), TEST, WORDS, draw_noise(TEST, [1, 2]), steps, 1.0, solver)
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)


def test_the_flow_of_gaussian_data_is_solved():
    """Data N(0.3, 0.2^2): the velocity has a closed form, and samples have that mean and spread."""

    def velocity(x, t, tokens):
        t = t.view(-1, 1, 1, 1, 1)
        centred = (x - (1 - t) * 0.3) / ((1 - t).square() * 0.04 + t.square())
        clean, noise = 0.3 + (1 - t) * 0.04 * centred, t * centred
        return noise - clean

    made = generate(velocity, TEST, WORDS, draw_noise(TEST, [4, 5]), 60, 1.0, "midpoint")
    signal = 2 * made - 1
    assert float(signal.mean()) == pytest.approx(0.3, abs=0.01) and float(signal.std()) == pytest.approx(0.2, abs=0.01)


def test_guidance_moves_away_from_no_caption():
    def velocity(x, t, tokens):
        return x * 0 + tokens.sum(1).float().view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1)

    x, t = torch.zeros(2, 3, 2, 2, 2), torch.tensor([0.5, 1.0])
    found = guided(velocity, 3.0)(x, t, WORDS)[:, 0, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([9.5, 10.0]))
    assert guided(velocity, 1.0) is velocity
    none = guided(velocity, 0.0)(x, t, WORDS)[:, 0, 0, 0, 0]
    torch.testing.assert_close(none, t)


def test_times_are_shifted():
    assert shifted_times(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert shifted_times(2, 3.0) == pytest.approx([1, 0.75, 0])
    with pytest.raises(ValueError, match="shift: 0"):
        shifted_times(2, 0.0)


def test_noise_follows_the_seed_and_not_the_batch():
    three = draw_noise(TEST, [7, 8, 7])
    assert torch.equal(three[0], three[2]) and not torch.equal(three[0], three[1])
    assert torch.equal(draw_noise(TEST, [8])[0], three[1])


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_every_call_is_told(solver):
    told = []
    generate(to_one(0.0), TEST, WORDS[:1], draw_noise(TEST, [0]), 3, 2.0, solver, told.append)
    assert told == list(range(1, calls_of(3, solver) + 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"steps": 1001}, "1001"),
        ({"guidance": -1.0}, "guidance"),
        ({"solver": "rk4"}, "rk4"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        generate(to_one(0.0), TEST, WORDS, draw_noise(TEST, [0, 1]), **options)


def test_the_loss_of_the_exact_velocity_is_nought_and_that_of_none_is_its_size():
    videos = torch.rand(64, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = torch.ones(64, 3, dtype=torch.long)
    found = {}

    def exact(x, t, words):
        found.update(t=t, words=words)
        return (x - videos) / t.view(-1, 1, 1, 1, 1)

    loss, parts = flow_loss(exact, videos, tokens, FlowLoss(drop_caption=0.3), torch.Generator().manual_seed(1))
    assert float(loss) < 1e-6 and set(parts) == {"early", "late"}
    dropped = (found["words"] == 0).all(1)
    assert 8 < int(dropped.sum()) < 32 and bool((found["words"][~dropped] == 1).all())
    loss, parts = flow_loss(
        lambda x, t, w: 0 * x, videos, tokens, FlowLoss(least_t=0.0), torch.Generator().manual_seed(1)
    )
    assert float(loss) == pytest.approx(1 + float(videos.square().mean()), abs=0.05)
    share = float((found["t"] > 0.7).float().mean())
    assert float(share * parts["early"] + (1 - share) * parts["late"]) == pytest.approx(float(loss), rel=1e-4)


def test_times_of_training():
    drawn = draw_times(20_000, FlowLoss(mean=0.8, deviation=1.0, uniform=0.0), torch.Generator().manual_seed(0))
    logits = torch.logit(drawn)
    assert float(logits.mean()) == pytest.approx(0.8, abs=0.03) and float(logits.std()) == pytest.approx(1.0, abs=0.03)
    even = draw_times(20_000, FlowLoss(uniform=1.0), torch.Generator().manual_seed(0))
    assert float(even.mean()) == pytest.approx(0.5, abs=0.01) and float(even.std()) == pytest.approx(12**-0.5, abs=0.01)
    wrong_by = {}
    for least in (0.0, 0.25):
        loss, _ = flow_loss(
            lambda x, t, w: (x - 0.9 * videos) / t.view(-1, 1, 1, 1, 1),
            videos := torch.ones(400, 3, 1, 1, 1),
            torch.zeros(400, 2, dtype=torch.long),
            FlowLoss(uniform=1.0, least_t=least),
            torch.Generator().manual_seed(0),
        )
        wrong_by[least] = float(loss)
    # an error of 0.1 in the clean video: the mean of 0.01 / max(t, 0.25)^2 over t is 0.01 (4 + 4 - 1)
    assert wrong_by[0.25] == pytest.approx(0.07, rel=0.1) and wrong_by[0.0] > 0.1
    for wrong in ({"deviation": 0.0}, {"uniform": 1.5}, {"drop_caption": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(FlowLoss(), **wrong)
