"""PESQ, ESTOI and DNSMOS: known values, order, and the clips that they cannot judge. Skipped without the eval extra."""

import numpy as np
import pytest

from allears.audio.metrics import Dnsmos, collect_reasons, dnsmos, estoi, pesq_wb
from allears.audio.metrics.non_intrusive import _windows

RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Three seconds of a buzz with moving formants in syllables: enough of a voice for PESQ's speech detector."""
    time_s = np.arange(3 * RATE) / RATE
    phase = 2 * np.pi * np.cumsum(130 + 25 * np.sin(2 * np.pi * 0.7 * time_s)) / RATE
    formant_hz = 1200 + 600 * np.sin(2 * np.pi * 1.9 * time_s)
    weight = [1 / k + np.exp(-(((k * 130 - formant_hz) / 250) ** 2)) for k in range(1, 40)]
    buzz = sum(w * np.sin(k * phase) for k, w in enumerate(weight, 1))
    return (0.08 * buzz * np.clip(np.sin(2 * np.pi * 2.5 * time_s), 0, 1)).astype(np.float32)


def noise(like: np.ndarray, snr_db: float) -> np.ndarray:
    white = np.random.default_rng(0).standard_normal(len(like)).astype(np.float32)
    return white * np.sqrt(np.mean(like**2)) * 10 ** (-snr_db / 20)


def test_pesq_of_the_clean_clip_is_its_maximum_and_falls_with_noise(speech):
    pytest.importorskip("pesq")
    assert pesq_wb(speech, speech) == pytest.approx(4.6439, abs=1e-3)
    scores = [pesq_wb(speech + noise(speech, snr_db), speech) for snr_db in (40, 20, 0)]
    assert 4.6 > scores[0] > scores[1] > scores[2] > 1


def test_pesq_of_a_long_file_is_the_mean_over_pieces_and_ends_no_process(speech):
    pytest.importorskip("pesq")
    clip = np.concatenate([speech[: 2 * RATE], np.zeros(RATE // 2, np.float32)])
    long = np.tile(clip, 40)  # 100 s, more utterances than the C code has room for
    assert pesq_wb(long, long) == pytest.approx(4.6439, abs=1e-3)
    silent_start = np.concatenate([np.zeros(20 * RATE, np.float32), long[: 20 * RATE]])
    assert pesq_wb(silent_start, silent_start) == pytest.approx(4.6439, abs=1e-3)


def test_estoi_of_the_clean_clip_is_one_and_falls_with_noise(speech):
    pytest.importorskip("pystoi")
    assert estoi(speech, speech) == pytest.approx(1, abs=1e-9)
    scores = [estoi(speech + noise(speech, snr_db), speech) for snr_db in (20, 0, -20)]
    assert 1 > scores[0] > scores[1] > scores[2]
    assert estoi(np.zeros_like(speech), speech) == 0


@pytest.mark.parametrize(
    ("length", "silent", "why"),
    [(3 * RATE, "reference", "reference is silent"), (100, "", "100 samples"), (0, "", "0 samples")],
)
def test_clips_that_cannot_be_judged_give_nan_and_a_reason(speech, length, silent, why):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    clip = speech[:length]
    with collect_reasons() as reasons:
        values = [metric(clip, clip * 0 if silent else clip) for metric in (pesq_wb, estoi)]
    assert np.isnan(values).all()
    assert why in reasons["pesq_wb"] and why in reasons["estoi"]


def test_a_silent_estimate_has_no_pesq(speech):
    pytest.importorskip("pesq")
    with collect_reasons() as reasons:
        assert np.isnan(pesq_wb(np.zeros_like(speech), speech))
    assert reasons == {"pesq_wb": "the estimate is silent"}


def test_dnsmos_of_noise_is_far_below_that_of_a_voice(speech):
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    voice, rush = dnsmos(speech), dnsmos(noise(speech, 0))
    assert rush.ovrl < 1.5 < voice.ovrl and rush.bak < 1.5 < voice.bak - 1
    assert dnsmos(100 * speech) == dnsmos(np.clip(100 * speech, -1, 1))


def test_dnsmos_equals_the_package_it_comes_from(speech):
    pytest.importorskip("librosa")
    package = pytest.importorskip("speechmos.dnsmos")
    clip = speech[:RATE]
    theirs = package.run(clip, RATE)
    assert dnsmos(clip) == pytest.approx(Dnsmos(theirs["sig_mos"], theirs["bak_mos"], theirs["ovrl_mos"]), abs=1e-5)


def test_dnsmos_windows_are_those_of_the_package():
    def starts(seconds: float) -> list[int]:
        return [int(window[0]) for window in _windows(np.arange(int(seconds * RATE)))]

    assert starts(9.01) == starts(10.9) == [0]
    assert starts(11.0) == [0, RATE]
    # the windows at 7 to 23 s end a hair before the whole sample in floating point, and the package skips those
    assert [start // RATE for start in starts(35.0)] == [*range(7), 24, 25]
    assert len(_windows(np.zeros(5000))[0]) == 144_160


def test_dnsmos_of_nothing_is_nan():
    with collect_reasons() as reasons:
        assert np.isnan(dnsmos(np.zeros(0))).all()
    assert reasons == {"dnsmos": "no samples"}


@pytest.mark.parametrize("call", [lambda x, hz: pesq_wb(x, x, hz), dnsmos])
def test_a_rate_other_than_16_khz_is_refused(speech, call):
    with pytest.raises(ValueError, match=r"got 48000.*16000"):
        call(speech, 48_000)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((2, 100)), r"shape \(2, 100\)"),
        (np.full(100, np.nan), "NaN"),
        (np.zeros(100, np.int16), "int16.*full scale"),
        (np.zeros(100, complex), "complex128"),
    ],
)
def test_bad_audio_is_refused(clip, message):
    with pytest.raises(ValueError, match=message):
        pesq_wb(clip, clip)
