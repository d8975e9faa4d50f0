"""Losses of the echo canceller against closed forms, and on silence.

Shapes: B clips, S samples, T frames, D delays.
"""

import math

import pytest
import torch

from allears.audio.stft import Stft
from allears.models.echo.loss import (
    LossWeights,
    alignment_loss,
    echo_loss,
    progressive_targets,
    quiet_level_db,
    spectral_loss,
    voice_loss,
    waveform_level_db,
)
from allears.models.echo.model import EchoOutput

STFT = Stft(320, 160)
ONE = torch.ones(2)


def noise(seed=0, samples=8000):
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))


def test_no_error_no_loss():
    x = noise()
    assert spectral_loss(x, x, ONE, STFT) == 0
    assert spectral_loss(torch.zeros_like(x), torch.zeros_like(x), ONE, STFT) == 0


def test_spectral_loss_of_a_gain():
    """Of g times the target: magnitudes differ by the factor g^0.3, phases not; too quiet costs more than too loud."""
    x = noise()
    size = (torch.view_as_real(STFT.forward(x)).square().sum(-1) / 160 + 1e-6).pow(0.3).mean()
    for gain, over in ((0.25, 1.5), (4.0, 1.0)):
        wanted = (1 - gain**0.3) ** 2 * over * size
        torch.testing.assert_close(spectral_loss(gain * x, x, ONE, STFT), wanted, rtol=1e-2, atol=0)


def test_a_turned_phase_costs_only_the_complex_part():
    x = noise()
    torch.testing.assert_close(spectral_loss(-x, x, ONE, STFT, complex_share=0.0), torch.tensor(0.0))
    size = (torch.view_as_real(STFT.forward(x)).square().sum(-1) / 160 + 1e-6).pow(0.3).mean()
    torch.testing.assert_close(spectral_loss(-x, x, ONE, STFT, complex_share=0.3), 0.3 * 4 * size, rtol=1e-3, atol=0)


def test_loud_and_quiet_clips_count_the_same():
    x, y = noise(), noise(1)
    wanted = spectral_loss(y, x, ONE, STFT)
    torch.testing.assert_close(spectral_loss(1e-3 * y, 1e-3 * x, 1e-3 * ONE, STFT), wanted)


def test_gradients_are_finite_at_silence():
    x = torch.zeros(2, 2000, requires_grad=True)
    for target in (torch.zeros(2, 2000), noise(samples=2000)):
        loss = spectral_loss(x, target, torch.zeros(2), STFT) + quiet_level_db(x, target, noise(1, 2000))
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all()


def test_quiet_level_looks_where_the_target_is_silent():
    mic = noise()
    target = torch.zeros_like(mic)
    torch.testing.assert_close(quiet_level_db(0.1 * mic, target, mic), torch.tensor(-20.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(quiet_level_db(0.0 * mic, target, mic), torch.tensor(-60.0))
    target[:, 4800:] = mic[:, 4800:]  # of five pieces, three are silent
    out = mic.clone()
    out[0, :1600] *= 0.01
    wanted = torch.tensor(-40.0 / 6)
    torch.testing.assert_close(quiet_level_db(out, target, mic), wanted, rtol=1e-2, atol=0)
    assert quiet_level_db(mic, mic, mic) == 0 and quiet_level_db(0 * mic, 0 * mic, 0 * mic) == 0


def test_alignment_loss_of_known_weights():
    weights = torch.full((1, 4, 10), 0.01)
    weights[0, :, 4] = 0.91
    delays = torch.tensor([[4.0, 5.0, 6.0, 9.0]])
    heard = torch.ones(1, 4, dtype=torch.bool)
    caught = [0.93, 0.93, 0.03, 0.02]
    wanted = -sum(math.log(c) for c in caught) / 4
    assert alignment_loss(weights, delays, heard).item() == pytest.approx(wanted, rel=1e-3)
    heard[0, 2:] = False
    assert alignment_loss(weights, delays, heard).item() == pytest.approx(-math.log(0.93), rel=1e-3)
    unknown = torch.tensor([[4.0, float("nan"), -1.0, 10.0]])
    assert alignment_loss(weights, unknown, torch.ones(1, 4)).item() == pytest.approx(-math.log(0.93), rel=1e-3)
    assert alignment_loss(weights, unknown, torch.zeros(1, 4)) == 0


def test_alignment_loss_pulls_to_the_delay():
    logits = torch.zeros(1, 3, 8, requires_grad=True)
    alignment_loss(logits.softmax(-1), torch.full((1, 3), 5), torch.ones(1, 3)).backward()
    assert (logits.grad[..., 4:7] < 0).all() and (logits.grad[..., :4] > 0).all() and (logits.grad[..., 7] > 0).all()


def test_voice_loss_and_frames_that_differ():
    logits, voice = torch.tensor([[2.0, -1.0, 7.0]]), torch.tensor([[True, False]])
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert voice_loss(logits, voice).item() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="voice: 9 frames given, the network made 3"):
        voice_loss(logits, torch.zeros(1, 9))
    with pytest.raises(ValueError, match="delay_frames: 9 frames given"):
        alignment_loss(torch.ones(1, 3, 4), torch.zeros(1, 9), torch.ones(1, 9))


def test_progressive_targets_leave_some_echo():
    near, reverberant, echo, rest = (noise(seed) for seed in range(4))
    first, last = progressive_targets(near, reverberant, echo, rest, echo_left_db=-20.0)
    torch.testing.assert_close(first, reverberant + rest + 0.1 * echo)
    assert last is near


def test_the_last_target_keeps_a_share_of_the_reverberation():
    near, reverberant, echo, rest = (noise(seed) for seed in range(4))
    first, last = progressive_targets(near, reverberant, echo, rest, reverberation=0.25)
    torch.testing.assert_close(last, 0.75 * near + 0.25 * reverberant)
    torch.testing.assert_close(first, progressive_targets(near, reverberant, echo, rest)[0])
    torch.testing.assert_close(progressive_targets(near, reverberant, echo, rest, reverberation=1.0)[1], reverberant)


def test_waveform_error_is_in_decibels_of_the_target():
    x = noise()
    assert float(waveform_level_db(0.9 * x, x, x, ceiling_db=90.0)) == pytest.approx(-20.0, abs=1e-3)
    assert float(waveform_level_db(x, x, x)) == pytest.approx(-30.0, abs=1e-3)
    assert float(waveform_level_db(1.1 * x, x, x, ceiling_db=20.0)) == pytest.approx(-16.99, abs=1e-2)


def test_clips_without_a_target_have_no_waveform_error():
    x = noise()
    silent = x * torch.tensor([[1.0], [0.0]])
    estimate = 0.9 * x
    wanted = waveform_level_db(estimate[:1], x[:1], x[:1])
    torch.testing.assert_close(waveform_level_db(estimate, silent, x), wanted)
    assert float(waveform_level_db(estimate, 0 * x, x)) == 0.0


def output(near, stages, frames=51):
    return EchoOutput(near, stages, torch.full((2, frames, 10), 0.1), torch.zeros(2, frames))


LABELS = (torch.full((2, 51), 3), torch.ones(2, 51), torch.ones(2, 51))


def test_the_whole_is_the_sum_of_its_terms():
    mic, near, first, last = (noise(seed) for seed in range(4))
    weights = LossWeights(stages=(0.2, 0.8), quiet=0.0, alignment=2.0, voice=3.0)
    total, terms = echo_loss(output(last, (first, near)), mic, (mic, near), *LABELS, weights=weights)
    level = mic.square().mean(-1).sqrt()
    torch.testing.assert_close(terms["stage_1"], spectral_loss(first, mic, level, STFT))
    torch.testing.assert_close(terms["stage_2"], spectral_loss(last, near, level, STFT))  # behind the gate
    assert terms["alignment"].item() == pytest.approx(-math.log(0.3), rel=1e-3)
    assert terms["voice"].item() == pytest.approx(math.log(2))
    wanted = 0.2 * terms["stage_1"] + 0.8 * terms["stage_2"] + 2 * terms["alignment"] + 3 * terms["voice"]
    torch.testing.assert_close(total, wanted)


def test_one_stage_takes_the_last_target_with_all_the_weight():
    mic, near, last = (noise(seed) for seed in range(3))
    weights = LossWeights(quiet=0.0)
    out = EchoOutput(last, (last,), None, None)
    total, terms = echo_loss(out, mic, (mic, near), *LABELS, weights=weights)
    assert set(terms) == {"stage_1", "quiet_db"}
    torch.testing.assert_close(total, spectral_loss(last, near, mic.square().mean(-1).sqrt(), STFT))
    with pytest.raises(ValueError, match="2 stages want one each"):
        echo_loss(output(last, (last, last)), mic, (near,), *LABELS)
