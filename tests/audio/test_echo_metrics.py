import numpy as np
import pytest

from allears.audio.metrics import collect_reasons
from allears.audio.metrics.aecmos import aecmos
from allears.audio.metrics.echo import aligned_share, erle_db, recovery_s, sdr_filtered_db, time_to_erle_s
from allears.audio.metrics.voice import voice_probability, voiced_share

RATE = 16_000


def noise(seconds=1.0, seed=0):
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE))


def test_erle_is_the_energy_ratio_within_the_mask():
    mic = noise()
    output = mic * np.where(np.arange(RATE) < 4000, 1.0, 0.01)
    late = np.arange(RATE) >= 4000
    assert erle_db(mic, output, late) == pytest.approx(40.0)
    assert erle_db(mic, output, ~late) == pytest.approx(0.0)
    energy = mic**2
    wanted = 10 * np.log10(energy.sum() / (energy[~late].sum() + 1e-4 * energy[late].sum()))
    assert erle_db(mic, output) == pytest.approx(wanted)
    assert erle_db(mic, 2 * mic) == pytest.approx(-20 * np.log10(2))
    assert erle_db(mic, 0 * mic) == np.inf
    with collect_reasons() as reasons:
        assert np.isnan(erle_db(0 * mic, mic)) and np.isnan(erle_db(mic, mic, late & ~late))
    assert "silent" in reasons["erle_db"]


@pytest.mark.parametrize(("silence_s", "learned_s"), [(0.0, 0.0), (0.0, 0.43), (0.7, 0.25), (0.25, 1.1)])
def test_time_to_erle_counts_from_the_first_echo(silence_s, learned_s):
    mic = np.concatenate([np.zeros(int(silence_s * RATE)), noise(3.0)])
    at = int((silence_s + learned_s) * RATE)
    output = mic * np.where(np.arange(len(mic)) < at, 0.5, 0.05)
    # A window counts as echo as soon as 1 of its 20 blocks is, and as learned when nearly all of it is.
    wanted = learned_s + (min(0.19, silence_s) if learned_s else 0.0)
    assert time_to_erle_s(mic, output, RATE) == pytest.approx(wanted, abs=0.021)
    assert time_to_erle_s(mic, output, RATE, level_db=6.0) == 0.0
    assert time_to_erle_s(mic, output, RATE, level_db=30.0) == np.inf


def test_time_to_erle_from_a_change_on():
    mic, time = noise(4.0), np.arange(4 * RATE) / RATE
    output = mic * np.where((time > 0.5) & (time < 2.0) | (time > 2.6), 0.01, 1.0)
    assert time_to_erle_s(mic, output, RATE) == pytest.approx(0.5, abs=0.011)
    assert time_to_erle_s(mic, output, RATE, start_s=2.0) == pytest.approx(0.6, abs=0.011)
    with collect_reasons():
        assert np.isnan(time_to_erle_s(0 * mic, output, RATE))
    with pytest.raises(ValueError, match=r"0.20 s given|wanted 0.2 s"):
        time_to_erle_s(mic, output, RATE, start_s=3.9)


def test_a_filter_is_forgiven_but_no_more_than_it():
    reference = noise(0.5, 1)
    taps = np.random.default_rng(2).standard_normal(512) * np.exp(-np.arange(512) / 80)
    through = np.convolve(reference, taps)[: len(reference)]
    assert sdr_filtered_db(reference, reference) > 100
    # The end of the response is cut off with the clip, so it is not a filter's to the last bit.
    assert sdr_filtered_db(np.concatenate([through, np.zeros(600)]), np.pad(reference, (0, 600))) > 23
    whole = np.convolve(reference, taps)
    assert sdr_filtered_db(np.pad(whole, (0, 89)), np.pad(reference, (0, 600))) > 100
    late = np.concatenate([np.zeros(600), reference[:-600]])
    assert sdr_filtered_db(late, reference) < -8  # 512 of 8000 samples fit by chance
    assert sdr_filtered_db(late, reference, taps=601) > 10  # 600 samples are cut off


@pytest.mark.parametrize("sdr_db", [0.0, 20.0, 40.0])
def test_what_is_no_filter_is_distortion(sdr_db):
    """Other noise: 512 taps fit a share 512 / T of it."""
    reference, other = noise(2.0, 3), noise(2.0, 4)
    other *= np.linalg.norm(reference) / np.linalg.norm(other) * 10 ** (-sdr_db / 20)
    assert sdr_filtered_db(reference + other, reference) == pytest.approx(sdr_db, abs=0.3)
    assert sdr_filtered_db(3 * (reference + other), 0.1 * reference) == pytest.approx(sdr_db, abs=0.3)


def test_refusals():
    x = noise(0.1)
    with collect_reasons():
        assert np.isnan(sdr_filtered_db(x, 0 * x))
    assert sdr_filtered_db(0 * x, x) == -np.inf
    for call in (
        lambda: erle_db(x, x[1:]),
        lambda: time_to_erle_s(x, x[1:], RATE),
        lambda: sdr_filtered_db(x, x[1:]),
        lambda: erle_db(x, np.full_like(x, np.nan)),
        lambda: sdr_filtered_db(x, x, taps=0),
        lambda: erle_db(x, x, np.ones(3, bool)),
        lambda: erle_db(x, x, np.ones(len(x))),
    ):
        with pytest.raises(ValueError, match=r"mic|output|estimate|taps|mask"):
            call()


def test_an_echo_that_is_gone_for_a_moment_has_to_stay_gone():
    mic, time = noise(4.0), np.arange(4 * RATE) / RATE
    output = mic * np.where((time > 0.5) & (time < 0.9) | (time > 2.0), 0.01, 1.0)
    assert time_to_erle_s(mic, output, RATE) == pytest.approx(0.5, abs=0.011)
    assert time_to_erle_s(mic, output, RATE, hold_s=0.5) == pytest.approx(2.0, abs=0.011)
    assert time_to_erle_s(mic, output, RATE, hold_s=9.0) == pytest.approx(2.0, abs=0.011)  # the clip ends before


@pytest.mark.parametrize(("before_db", "after_db", "wanted_s"), [(30, 21, 0.6), (30, 18, np.inf), (15, 13, 0.6)])
def test_recovery_is_to_20_db_or_to_what_was_there(before_db, after_db, wanted_s):
    mic, time = noise(5.0), np.arange(5 * RATE) / RATE
    down = np.where(time < 2.5, 10 ** (-before_db / 20), np.where(time < 3.1, 1.0, 10 ** (-after_db / 20)))
    assert recovery_s(mic, mic * down, RATE, 2.5) == pytest.approx(wanted_s, abs=0.021)


def test_nothing_recovers_that_was_not_there():
    mic = noise(2.0)
    with collect_reasons() as reasons:
        assert np.isnan(recovery_s(mic, 0.6 * mic, RATE, 1.0)) and np.isnan(recovery_s(0 * mic, 0 * mic, RATE, 1.0))
    assert "before the change" in reasons["recovery_s"]
    with pytest.raises(ValueError, match="changed_s: got 0"):
        recovery_s(mic, mic, RATE, 0)


def test_aligned_share_counts_active_frames_within_the_tolerance():
    active = np.array([True, True, True, True, False])
    assert aligned_share([3, 5, 4, 6, 4], [4, 4, 4, 4, 90], active) == 0.75
    assert aligned_share([3, 5, 4, 6, 4], [4, 4, 4, 4, 90], active, tolerance=0) == 0.25
    with collect_reasons() as reasons:
        assert np.isnan(aligned_share([1], [1], [False]))
    assert "never heard" in reasons["aligned_share"]
    with pytest.raises(ValueError, match="wanted one shape"):
        aligned_share([1, 2], [1], [True])


def test_aecmos_is_that_of_its_package():
    theirs = pytest.importorskip("speechmos.aecmos")
    mic, far = 0.1 * noise(2.0, 1), 0.1 * noise(2.0, 2)
    output = 0.5 * mic
    for scenario, name in (("far", "st"), ("near", "nst"), ("double", "dt")):
        signals = {"lpb": far.astype(np.float32), "mic": mic.astype(np.float32), "enh": output.astype(np.float32)}
        wanted = theirs.run(signals, 16_000, name)
        found = aecmos(mic, far, output, scenario)
        assert found == pytest.approx((wanted["echo_mos"], wanted["deg_mos"]), abs=1e-4)
    with collect_reasons() as reasons:
        assert np.isnan(aecmos(mic[:0], far[:0], output[:0], "far").echo)
    assert "aecmos" in reasons


def test_aecmos_refuses():
    x = noise(0.1)
    for call, message in (
        (lambda: aecmos(x, x, x[1:], "far"), "samples, wanted as many"),
        (lambda: aecmos(x, x, x, "both"), "scenario: got 'both'"),
        (lambda: aecmos(x, x, x, "far", 48_000), "sample_rate_hz: got 48000"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_voiced_share_counts_the_chosen_moments(monkeypatch):
    monkeypatch.setattr("allears.audio.metrics.voice.voice_probability", lambda audio: np.array([0.1, 0.9, 0.6, 0.2]))
    at = np.zeros(13, bool)
    at[[1, 4, 7, 12]] = True  # samples 160, 640, 1120, 1920: frames 0, 1, 2, 3
    assert voiced_share(np.zeros(2048), at) == 0.5 and voiced_share(np.zeros(2048), at, threshold=0.7) == 0.25
    assert np.isnan(voiced_share(np.zeros(2048), ~np.ones(13, bool)))


def test_the_voice_detector_hears_no_voice_in_silence_and_hiss():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("silero_vad")
    found = voice_probability(np.concatenate([np.zeros(8_000), 1e-3 * noise(0.5)]))
    assert found.shape == (32,) and (found < 0.5).all() and (found >= 0).all()
    assert voice_probability(np.zeros(0)).shape == (0,)
    with pytest.raises(ValueError, match="sample_rate_hz"):
        voice_probability(np.zeros(10), 8_000)
