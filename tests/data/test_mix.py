import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import bank_of
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.shoebox import Room
from allears.core.config import to_dict
from allears.core.errors import CorpusError
from allears.data.bank import AudioBank
from allears.data.mix import MixConfig, MixSampler, MixSpec, Segment, Synthetic, read_specs, write_specs
from allears.data.mixsets import judging_set
from allears.data.render import Renderer, active_rms, render_test_set
from allears.data.reverb import RirBank

NOISES = ("noise", "event", "music", "babble")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(30, 30_000), min_size=4, max_size=8), st.integers(0, 2**32 - 1), st.integers(4_000, 40_000))
def test_sampler_ends_and_stays_inside(lengths, seed, frames):
    """Whatever the items' lengths, every segment lies in its item and in the clip (an endless loop was once here)."""
    noise = bank_of(lengths, [NOISES[n % 4] for n in range(len(lengths))])
    speech = bank_of(lengths, ["speech"] * len(lengths), 1)
    sampler = MixSampler(speech, noise, MixConfig(seconds=frames / 16_000), np.random.default_rng(seed))
    for _ in range(5):
        spec = sampler.sample("x")
        for bank, segments in ((speech, spec.speech), (noise, spec.noise)):
            for segment in segments:
                assert segment.length > 0 and 0 <= segment.at <= spec.frames - segment.length
                assert segment.start + (segment.length - 1) * segment.speed < bank.lengths[bank.index_of(segment.item)]


def test_same_seed_same_specs_and_file_round_trip(tmp_path):
    speech, noise = bank_of([9000, 20_000], ["speech"] * 2), bank_of([5000] * 4, NOISES)
    first, again = (
        [MixSampler(speech, noise, MixConfig(rirs=3), np.random.default_rng(5)).sample(str(n)) for n in range(4)]
        for _ in range(2)
    )
    assert first == again
    write_specs(tmp_path / "set.jsonl", first)
    assert read_specs(tmp_path / "set.jsonl") == first
    (tmp_path / "bad.jsonl").write_text(json.dumps(to_dict(first[0]) | {"snr": 3}) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:1: unknown key 'snr'"):
        read_specs(tmp_path / "bad.jsonl")


def test_a_seed_means_what_it_meant():
    """The draws, in this order, are those that the shipped enhancer was trained with."""
    sampler = MixSampler(
        bank_of([9000, 20_000], ["speech"] * 2),
        bank_of([5000] * 4, NOISES),
        MixConfig(rirs=3),
        np.random.default_rng(5),
    )
    drawn = json.dumps([to_dict(sampler.sample(str(n))) for n in range(20)])
    assert hashlib.sha256(drawn.encode()).hexdigest().startswith("e6d16bc94b253597")


def test_an_unfiltered_segment_arrives_sample_for_sample():
    speech, noise = bank_of([9000], ["speech"]), bank_of([9000], ["noise"])
    spec = MixSpec("a", 8000, (Segment("i0", 500, 1000, 6000),), level_db=-20.0)
    noisy, target = Renderer(speech, noise)([spec])
    torch.testing.assert_close(noisy, target)
    middle = noisy[0, 1100:6900] / noisy[0, 1100:6900].norm()
    wanted = torch.from_numpy(speech.crop(0, 600, 5800))
    torch.testing.assert_close(middle, wanted / wanted.norm(), atol=2e-5, rtol=1e-3)
    assert noisy[0, :1000].abs().max() < 1e-4 * noisy.abs().max()
    assert abs(20 * torch.log10(noisy.square().mean().sqrt()) + 20) < 1e-3


def test_speed_moves_the_pitch():
    time = np.arange(16_000) / 16_000
    tone = (8000 * np.sin(2 * np.pi * 1000 * time)).astype(np.int16)
    bank = replace(bank_of([16_000], ["speech"]), audio=tone)
    for speed in (0.8, 1.25):
        noisy, _ = Renderer(bank, bank)([MixSpec("a", 8000, (Segment("i0", 0, 0, 8000, speed=speed),))])
        assert abs(int(torch.fft.rfft(noisy[0]).abs().argmax()) * 2 - 1000 * speed) <= 2


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.0])
def test_snr_and_level_are_what_was_asked(snr):
    speech, noise = bank_of([9000], ["speech"]), bank_of([9000], ["noise"], 1)
    spec = MixSpec("a", 8000, (Segment("i0", 0, 0, 8000),), (Segment("i0", 0, 0, 8000),), snr_db=snr, level_db=-30.0)
    noisy, target = Renderer(speech, noise)([spec])
    ratio = 20 * torch.log10(active_rms(target) / (noisy - target).square().mean(-1, keepdim=True).sqrt())
    assert abs(float(ratio) - snr) < 0.05
    assert abs(20 * float(torch.log10(noisy.square().mean().sqrt())) + 30) < 0.01


def test_filters_clipping_codec_and_synthetic_noise():
    bank = bank_of([9000], ["speech"])
    base = MixSpec("a", 8000, (Segment("i0", 0, 0, 8000),))
    render = Renderer(bank, bank)
    plain = torch.fft.rfft(render([base])[0][0]).abs()
    low = torch.fft.rfft(render([replace(base, lowpass_hz=3000.0)])[0][0]).abs()
    assert low[2500:].max() < 2e-3 * plain[2500:].max() and low[:1000].sum() > 0.5 * plain[:1000].sum()
    lifted = torch.fft.rfft(render([replace(base, eq_db=(0, 0, 0, 12.0, 0, 0, 0))])[0][0]).abs() / plain
    assert 10 < 20 * torch.log10(lifted[480:520].median() / lifted[3000:3500].median()) < 12.5
    clipped, target = render([replace(base, clip_db=6.0)])
    assert abs(float(clipped.abs().max() / target.abs().max()) - 10 ** (-6 / 20)) < 1e-3
    for codec in ("mulaw", "opus", "mp3"):
        coded, target = render([replace(base, codec=codec)])
        assert 0.5 < float((coded * target).sum() / target.square().sum()) < 1.1 and not torch.equal(coded, target)
    hum = render([replace(base, speech=(), synthetic=Synthetic(3, 0.0, 100.0), snr_db=0.0)])
    assert hum[1].abs().max() == 0
    spectrum = torch.fft.rfft(hum[0][0]).abs()
    assert int(spectrum.argmax()) == 50
    with pytest.raises(ValueError, match="codec"):
        render([replace(base, codec="gsm")])


def test_reverberant_target_is_the_early_part():
    bank = bank_of([9000], ["speech"])
    room = to_dict(Room.with_rt60((5.0, 4.0, 3.0), 0.5, (1.0, 1.0, 1.5), ((3.0, 2.0, 1.5), (4.0, 1.0, 1.2))))
    spec = MixSpec("a", 8000, (Segment("i0", 0, 0, 4000),), rir={"room": room})
    noisy, target = Renderer(bank, bank, RirBank())([spec])
    assert noisy[0, 6000:].square().mean() > 100 * target[0, 6000:].square().mean()
    torch.testing.assert_close(noisy[0, :700], target[0, :700], atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="no room responses"):
        Renderer(bank, bank)([spec])
    for reference in ({"bank": 0}, {"item": "x#0"}, {"hall": 1}):
        with pytest.raises(CorpusError, match="rirs"):
            RirBank().response(reference, "talker")


def test_judging_set_renders_alike_alone_and_in_order(small_corpus, tmp_path):
    speech, noise = (AudioBank.from_corpus(small_corpus, kinds=k, splits=("test",)) for k in (("speech",), NOISES))
    specs = judging_set(speech, noise, 8, seed=1, recorded_rooms=("stairs#0",))
    assert sum(spec.rir is not None for spec in specs) == 4
    assert sorted(spec.snr_db for spec in specs) == pytest.approx(np.arange(8) * 15 / 8 + 15 / 16, abs=0.01)
    write_specs(tmp_path / "set.jsonl", specs)
    every = list(render_test_set(small_corpus, tmp_path / "set.jsonl"))
    (alone,) = render_test_set(small_corpus, tmp_path / "set.jsonl", keep=lambda spec: spec.id == specs[3].id)
    assert np.array_equal(every[3][1], alone[1]) and np.array_equal(every[3][2], alone[2])
    assert np.array_equal(np.round(alone[1] * 32767), alone[1] * 32767)
    assert alone[3]["reverberant"] == (specs[3].rir is not None)
