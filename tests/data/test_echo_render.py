from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import bank_of

from allears.audio.metrics.alignment import delay_samples
from allears.audio.rooms import early_part
from allears.core.config import to_dict
from allears.data.echo import EchoMixConfig, EchoSampler
from allears.data.echo_render import EchoRenderer, active_frames
from allears.data.echo_rooms import PLACES, room_with_loudspeaker
from allears.data.echo_spec import DelayJump, EchoSpec, GainStep, PathChange
from allears.data.loudspeaker import Loudspeaker, through_loudspeakers
from allears.data.reverb import RirBank
from allears.data.segments import Segment, Synthetic
from allears.data.waves import active_rms

RATE = 16_000
BANK = bank_of([24_000] * 4, ["speech"] * 4, speakers=4)
ROOM = room_with_loudspeaker(np.random.default_rng(3))
FULL = {"loudspeaker": Loudspeaker(highpass_hz=20.0), "highpass_hz": 20.0}


def at(place):
    return {"room": to_dict(replace(ROOM, mics_m=(ROOM.mics_m[place],))), "source": 0}


def said(item, begin=0, length=16_000):
    return (Segment(f"i{item}", 0, begin, length),)


def db(x):
    return float(20 * torch.log10(x))


def test_microphone_is_the_sum_of_its_parts_to_the_bit():
    config = EchoMixConfig(seconds=1.0, rirs=2, jump=0.5, path_change=0.5, drift=0.5, gain_step=0.5)
    sampler = EchoSampler(BANK, bank_of([9000] * 3, ("noise", "event", "music")), config, np.random.default_rng(1))
    specs = [sampler.sample(str(n)) for n in range(12)]
    rooms = RirBank.simulate(2, 1, talkers=PLACES, draw=room_with_loudspeaker)
    render = EchoRenderer(sampler.speech, sampler.noise, rooms)
    batch = render(specs)
    assert {spec.scenario for spec in specs} == {"near", "far", "double"}
    assert torch.equal(batch.mic, batch.near_reverberant + batch.echo + batch.noise)
    assert all(x.shape == (12, 16_000) and x.dtype == torch.float32 for x in batch[:6])
    assert batch.delay_frames.shape == batch.voice.shape == batch.far_active.shape == (12, 101)
    assert all(torch.isfinite(x).all() and x.abs().max() <= 0.981 for x in batch[:6])
    for row, spec in enumerate(specs):
        assert bool(spec.near) == bool(batch.near[row].any()) == bool(batch.voice[row].any())
        assert (spec.scenario != "near") == bool(batch.reference[row].any()) == bool(batch.far_active[row].any())
        assert bool(batch.echo[row].any()) == (spec.scenario != "near")
        assert bool(batch.noise[row].any()) == (spec.snr_db is not None)
    for one, other in zip(render(specs), batch, strict=True):
        assert torch.equal(one, other)
    alone = render(specs[4:5])
    torch.testing.assert_close(alone.mic[0], batch.mic[4], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("delay_ms", [0.0, 3.7, 250.0])
def test_a_dry_linear_echo_is_the_delayed_reference(delay_ms):
    batch = EchoRenderer(BANK)([EchoSpec("a", 16_000, far=said(0), delay_ms=delay_ms, **FULL)])
    delay = round(delay_ms * 16)
    assert delay_samples(batch.echo[0].numpy(), batch.reference[0].numpy(), 8000) == delay
    echo, reference = batch.echo[0, delay:], batch.reference[0, : 16_000 - delay]
    assert float(torch.corrcoef(torch.stack([echo, reference]))[0, 1]) > 0.996  # two high-passes of 20 Hz
    assert not batch.echo[0, :delay].abs().max() > 1e-6 if delay else True
    assert (batch.delay_frames == round(delay / 160)).all()
    first = int(batch.far_active[0].int().argmax())
    assert abs(first - delay / 160) <= 1


def test_levels():
    spec = EchoSpec(
        "a",
        16_000,
        said(0),
        said(1),
        near_rir=at(2),
        echo_rir=at(0),
        ser_db=-12.0,
        synthetic=Synthetic(2),
        snr_db=9.0,
        far_level_db=-20.0,
        level_db=-31.0,
    )
    far = replace(spec, near=(), near_rir=None, ser_db=None)
    batch = EchoRenderer(BANK, rirs=RirBank())([spec, far, replace(far, far_level_db=5.0)])
    near, echo = (float(active_rms(x)[0]) for x in (batch.near_reverberant, batch.echo))
    assert 20 * np.log10(near / echo) == pytest.approx(-12.0, abs=0.05)
    noise = batch.noise.square().mean(-1).sqrt()
    assert 20 * np.log10(near / float(noise[0])) == pytest.approx(9.0, abs=0.05)
    assert db(active_rms(batch.echo)[1, 0] / noise[1]) == pytest.approx(9.0, abs=0.05)
    assert db(batch.mic[0].square().mean().sqrt()) == pytest.approx(-31.0, abs=0.02)
    assert db(active_rms(batch.reference)[0, 0]) == pytest.approx(-20.0, abs=0.02)
    assert float(batch.reference[2].abs().max()) == pytest.approx(0.98, abs=1e-4)


def test_target_is_the_early_part_and_the_echo_has_the_path_of_its_place():
    spec = EchoSpec("a", 16_000, said(0, length=4000), said(1, length=4000), near_rir=at(2), echo_rir=at(0), ser_db=0.0)
    batch = EchoRenderer(BANK, rirs=RirBank())([replace(spec, **FULL)])
    dry = EchoRenderer(BANK)([replace(spec, near_rir=None, echo_rir=None, **FULL)])
    rir = RirBank().response(at(2))
    for got, taps, source in (
        (batch.near, early_part(rir, RATE), dry.near),
        (batch.near_reverberant, rir, dry.near),
        (batch.echo, RirBank().response(at(0)), dry.echo),
    ):
        wanted = np.convolve(source[0].double().numpy(), taps.double().numpy())[:16_000]
        assert np.corrcoef(wanted, got[0].double().numpy())[0, 1] > 1 - 1e-5


def test_jump_moves_the_echo_and_the_true_delay():
    spec = EchoSpec("a", 16_000, far=said(0), delay_ms=100.0, delay_jump=DelayJump(0.5, 80.0), **FULL)
    batch = EchoRenderer(BANK)([spec, replace(spec, delay_jump=DelayJump(0.5, -60.0))])
    for row, after in ((0, 18), (1, 4)):
        assert batch.delay_frames[row].tolist() == [10] * 50 + [after] * 51
        for part, frames in ((slice(0, 8000), 10), (slice(8100, 16_000), after)):
            shifted = torch.roll(batch.reference[row], frames * 160)
            shifted[: frames * 160] = 0
            assert float(torch.corrcoef(torch.stack([batch.echo[row, part], shifted[part]]))[0, 1]) > 0.996


def test_clocks_that_drift_apart():
    """A thousandth, ten times what occurs: the echo comes 16 samples sooner after a second, and in between too."""
    spec = EchoSpec("a", 16_000, far=said(0), delay_ms=50.0, drift_ppm=1000.0, **FULL)
    batch = EchoRenderer(BANK)([spec, replace(spec, drift_ppm=-1000.0), replace(spec, drift_ppm=0.0)])
    for row, sign in ((0, -1), (1, 1)):
        for begin in (4000, 12_000):
            part = slice(begin, begin + 800)
            late = delay_samples(batch.echo[row, part].numpy(), batch.echo[2, part].numpy(), 40)
            assert late == pytest.approx(sign * (begin + 400) / 1000, abs=0.6)
    assert batch.delay_frames[:, 99].tolist() == [5, 5, 5]
    slow = EchoRenderer(BANK)([replace(spec, drift_ppm=-10_000.0)]).delay_frames[0]
    assert slow[0] == 5 and slow[99] == 6
    time = np.arange(16_000) / RATE
    tone = replace(BANK, audio=np.round(np.tile(8000 * np.sin(2 * np.pi * 1000 * time[:8000]), 12)).astype(np.int16))
    heard = EchoRenderer(tone)([spec]).echo[0, 2000:14_000].double().numpy()
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(12_000), 1 << 18))
    assert np.argmax(spectrum) * RATE / (1 << 18) == pytest.approx(1001.0, abs=0.1)


def test_path_changes_after_a_cross_fade():
    spec = EchoSpec("a", 16_000, far=said(0), echo_rir=at(0), path_change=PathChange(at(1), 0.4, 200.0))
    far = replace(spec, path_change=None)
    batch = EchoRenderer(BANK, rirs=RirBank())([spec, far, replace(far, echo_rir=at(1)), replace(far, echo_rir=None)])
    gain = batch.mic.square().mean(-1).sqrt()
    changed, before, after = (batch.echo[:3] / batch.reference[:3].square().sum(-1, keepdim=True).sqrt()).unbind()
    scale = float((changed[:6400] * before[:6400]).sum() / before[:6400].square().sum())
    torch.testing.assert_close(changed[:6400], scale * before[:6400], atol=1e-5, rtol=1e-3)
    back = float((changed[9600:] * after[9600:]).sum() / after[9600:].square().sum())
    torch.testing.assert_close(changed[9600:], back * after[9600:], atol=1e-5, rtol=1e-3)
    assert gain.min() > 0 and (batch.delay_frames == 0).all()
    assert not torch.allclose(before[9600:], after[9600:], atol=1e-3)


def test_gain_steps_turn_the_loudspeaker_not_the_reference():
    spec = EchoSpec("a", 16_000, far=said(0), gain_steps=(GainStep(0.3, 6.0), GainStep(0.6, -10.0)), **FULL)
    batch = EchoRenderer(BANK)([spec, replace(spec, gain_steps=())])
    ratio = [
        db(batch.echo[0, part].norm() / batch.echo[1, part].norm())
        for part in (slice(0, 4800), slice(5200, 9600), slice(10_000, 16_000))
    ]
    assert np.subtract(ratio[1:], ratio[0]) == pytest.approx([6.0, -4.0], abs=0.05)
    assert torch.equal(batch.reference[0], batch.reference[1])


def test_sources_are_rid_of_direct_current():
    shifted = replace(BANK, audio=(BANK.audio.astype(np.int32) // 4 + 6000).astype(np.int16))
    spec = EchoSpec("a", 16_000, said(0), said(1), ser_db=0.0, highpass_hz=40.0)
    batch = EchoRenderer(shifted)([spec])
    for x in (batch.near, batch.reference, batch.echo):
        assert x[0, 4000:12_000].mean().abs() < 0.02 * x[0].square().mean().sqrt()


def test_activity_has_a_threshold_and_a_hangover():
    x = torch.zeros(3, 16_000)
    x[0, 3200:4800], x[0, 8000:8160] = 0.5, 0.5 * 10 ** (-36 / 20)
    x[0, 11_200:12_800] = 0.5 * 10 ** (-43 / 20)
    x[1] = 1e-6
    x[2, 15_990:] = 0.1
    plain = active_frames(x, 0)
    assert plain.shape == (3, 101)
    assert plain[0].nonzero()[:, 0].tolist() == [*range(20, 31), 50, 51]
    held = active_frames(x, 10)
    assert held[0].nonzero()[:, 0].tolist() == [*range(20, 41), *range(50, 62)]
    assert not plain[1].any() and plain[2].nonzero()[:, 0].tolist() == [100]
    assert active_frames(torch.ones(1, 161), 0).shape == (1, 3)


def test_loudspeakers():
    time = torch.arange(16_000) / RATE
    tone = 0.3 * torch.sin(2 * torch.pi * 500 * time)[None]

    def harmonics(speaker):
        spectrum = torch.fft.rfft(through_loudspeakers(tone, [speaker])[0, 8000:]).abs()
        return (spectrum[[250, 500, 750]] / 4000).tolist()

    first, second, third = harmonics(Loudspeaker(highpass_hz=20.0))
    assert first == pytest.approx(0.3, rel=0.01) and max(second, third) < 1e-4
    _, second, third = harmonics(Loudspeaker(clip=0.5, highpass_hz=20.0))
    assert second < 1e-4 and third > 0.02
    _, second, third = harmonics(Loudspeaker(polynomial=(0.2, 0.0), highpass_hz=20.0))
    assert second == pytest.approx(0.3 * 0.2 / 2, rel=0.02) and third < 1e-4
    first, second, third = harmonics(Loudspeaker(polynomial=(0.0, 0.2), highpass_hz=20.0))
    assert third == pytest.approx(0.3 * 0.2 / 4, rel=0.02) and first == pytest.approx(0.3 * 1.15, rel=0.01)
    assert harmonics(Loudspeaker(sigmoid=1.0))[1] > 0.01
    low, _, _ = harmonics(Loudspeaker(highpass_hz=500.0))
    assert low == pytest.approx(0.3 / 2**0.5, rel=0.01)
    assert harmonics(Loudspeaker(lowpass_hz=500.0))[0] == pytest.approx(0.3 / 2**0.5, rel=0.01)
    quiet_then_loud = tone * torch.where(time < 0.5, 0.1, 1.0)
    plain, rattling = (
        through_loudspeakers(quiet_then_loud, [Loudspeaker(rattle_db=level, rattle_from=0.3)])[0]
        for level in (None, -20.0)
    )
    rattle = rattling - plain
    assert rattle[:7000].abs().max() < 1e-6
    assert db(rattle[9000:].norm() / plain[9000:].norm()) == pytest.approx(
        -23.0, abs=1.0
    )  # its level counts the quiet half too
    spectrum = torch.fft.rfft(rattle).abs().square()
    assert spectrum[500:3000].sum() > 0.5 * spectrum.sum()


def test_wrong_batches_are_refused():
    spec = EchoSpec("a", 16_000, far=said(0))
    with pytest.raises(ValueError, match="same length"):
        EchoRenderer(BANK)([spec, replace(spec, frames=8000)])
    with pytest.raises(ValueError, match="no room responses"):
        EchoRenderer(BANK)([replace(spec, echo_rir={"bank": 0})])
    silent = EchoRenderer(BANK)([EchoSpec("a", 8000)])
    assert not silent.mic.any() and not silent.voice.any() and not silent.far_active.any()
