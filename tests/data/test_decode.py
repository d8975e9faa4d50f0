import io

import debs
import numpy as np
import pytest

from allears.core.errors import AudioFileError
from allears.data import decode as d


def test_wav_and_raw_als():
    left, right = debs.tone(0.1), debs.tone(0.1, 900.0)
    audio, rate = d.decode("a.wav", debs.wav_bytes(np.stack([left, right], 1), 22_050, subtype="FLOAT"))
    assert rate == 22_050 and np.array_equal(audio, np.stack([left, right], 1))
    raw = bytes(32) + bytes([0, 128, 255, 192]) + bytes(32)
    audio, rate = d.decode("N.ALS", raw)
    assert rate == 11_025 and audio[:, 0].tolist() == [-1.0, 0.0, 127 / 128, 0.5]


def test_g722():
    av = pytest.importorskip("av")
    wave = debs.tone(1.0, 1000.0)
    out = io.BytesIO()
    with av.open(out, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert len(out.getvalue()) == 8000
    audio, rate = d.decode("a.g722", out.getvalue())
    assert rate == 16_000 and audio.shape == (16_000, 1)
    spectrum = np.abs(np.fft.rfft(audio[:, 0]))
    assert np.argmax(spectrum) == 1000 and np.sqrt((audio**2).mean()) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    "data", [b"", b"not audio at all", debs.wav_bytes(np.full(100, np.nan, np.float32), subtype="FLOAT")]
)
def test_what_is_no_audio_is_refused(data):
    with pytest.raises(AudioFileError, match=r"a\.wav"):
        d.decode("a.wav", data)


def test_mono():
    x = debs.tone(0.01)
    assert np.array_equal(d.to_mono(np.stack([x, x], 1)), x)
    assert np.allclose(d.to_mono(np.stack([x, 3 * x], 1)), 2 * x)


def test_trim_keeps_the_margin():
    x = np.concatenate([np.zeros(5000), np.ones(100), np.zeros(700)]).astype(np.float32)
    assert len(d.trim_silence(x, 16_000)) == 320 + 100 + 320
    assert len(d.trim_silence(x[:5120], 16_000)) == 320 + 100 + 20
    assert len(d.trim_silence(np.zeros(1000, np.float32), 16_000)) == 0


def test_measurements():
    rng = np.random.default_rng(0)
    white = rng.standard_normal(64_000).astype(np.float32) * 0.1
    low = np.fft.irfft(np.where(np.arange(32_001) / 4.0 < 3000, np.fft.rfft(white), 0)).astype(np.float32)
    assert d.bandwidth_hz(white, 16_000) > 7900
    assert d.bandwidth_hz(low, 16_000) == pytest.approx(3000, abs=40)
    assert d.bandwidth_hz(np.zeros(100, np.float32), 16_000) == 0.0
    x = np.concatenate([white, white * 0.01])
    assert d.noise_floor_db(x, 16_000) == pytest.approx(-60, abs=0.7)
    assert d.noise_floor_db(np.zeros(3, np.float32), 16_000) == -120
    assert d.clipped_fraction(np.array([0.0, 1.0, -1.0, 0.5])) == 0.5


def test_to_int16_resamples_and_never_clips():
    x = debs.tone(1.0, 440.0, 48_000, level=0.5)
    y = d.to_int16(x, 48_000) / 32767
    assert len(y) == 16_000 and np.abs(y[500:-500] - debs.tone(1.0, level=0.5)[500:-500]).max() < 2e-4
    loud = d.to_int16(debs.tone(1.0, level=4.0), 16_000)
    assert np.abs(loud.astype(int)).max() == round(32767 * 0.999)
    assert (np.abs(loud.astype(int)) > 32700).mean() < 0.05
