import numpy as np
import pytest

from allears.audio.metrics import collect_reasons
from allears.audio.metrics.echo import erle_db, sdr_filtered_db, time_to_erle_s

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
