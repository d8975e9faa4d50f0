"""The enhancer on files, and the files it is loaded from."""

import json

import numpy as np
import pytest
import soundfile

from allears.core.config import to_dict
from allears.core.errors import AudioFileError, WeightsError
from allears.core.weights import save_weights
from allears.models.enhance import Enhancer


def recording(path, rate, channels, subtype, seconds=0.6):
    x = 0.02 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))
    soundfile.write(path, x, rate, subtype=subtype)
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype", "bits", "seconds"),
    [
        ("a.wav", 16_000, 1, "PCM_16", 16, 7.3),  # two windows
        ("a.flac", 44_100, 2, "PCM_24", 24, 0.6),
        ("a.wav", 8_000, 3, "PCM_24", 24, 0.6),
        ("a.wav", 48_000, 1, "FLOAT", 24, 0.6),
        ("a.wav", 96_000, 1, "PCM_16", 16, 1.6),  # more than one block
    ],
)
def test_a_file_gets_what_a_waveform_gets(small_enhancer, tmp_path, name, rate, channels, subtype, bits, seconds):
    x = recording(tmp_path / name, rate, channels, subtype, seconds)
    events = []
    result = small_enhancer.process_file(tmp_path / name, tmp_path / f"out-{name}", on_progress=events.append)
    written = soundfile.info(tmp_path / f"out-{name}")
    assert (written.samplerate, written.channels, written.frames) == (rate, channels, x.shape[1])
    assert written.subtype == subtype
    y = soundfile.read(tmp_path / f"out-{name}", dtype="float32", always_2d=True)[0].T
    expected = small_enhancer(x, rate)
    assert 0.01 < np.abs(expected).max() < 1
    np.testing.assert_allclose(y, expected, atol=0.51 / 2 ** (bits - 1) + 2e-6)
    assert (result.frames, result.channels, result.sample_rate_hz) == (x.shape[1], channels, rate)
    assert result.duration_s == pytest.approx(seconds, abs=1e-3) and result.rtf == result.elapsed_s / result.duration_s
    assert events[-1].done == events[-1].total == result.duration_s and events[-1].message == name


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_aborted_file_leaves_nothing(small_enhancer, tmp_path, error):
    recording(tmp_path / "a.wav", 16_000, 1, "PCM_16", seconds=5)

    def stop(event):
        raise error

    with pytest.raises(error):
        small_enhancer.process_file(tmp_path / "a.wav", tmp_path / "b.wav", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    (tmp_path / "b.wav").write_bytes(b"earlier")
    with pytest.raises(error):
        small_enhancer.process_file(tmp_path / "a.wav", tmp_path / "b.wav", on_progress=stop)
    assert (tmp_path / "b.wav").read_bytes() == b"earlier"


def test_bad_files_and_options_leave_nothing(small_enhancer, tmp_path):
    x = recording(tmp_path / "a.wav", 16_000, 1, "FLOAT")[0]
    x[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, 16_000, subtype="FLOAT")
    with pytest.raises(AudioFileError, match="NaN"):
        small_enhancer.process_file(tmp_path / "nan.wav", tmp_path / "b.wav")
    with pytest.raises(AudioFileError, match="no such file"):
        small_enhancer.process_file(tmp_path / "none.wav", tmp_path / "b.wav")
    with pytest.raises(ValueError, match="steps: 0 given"):
        small_enhancer.process_file(tmp_path / "a.wav", tmp_path / "b.wav", steps=0)
    soundfile.write(tmp_path / "slow.wav", x[:5000], 2_000, subtype="PCM_16")
    with pytest.raises(ValueError, match="sample_rate_hz: 2000 given"):
        small_enhancer.process_file(tmp_path / "slow.wav", tmp_path / "b.wav")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "nan.wav", "slow.wav"]


@pytest.fixture
def saved(perturbed_net, tmp_path):
    record = {"model": "enhance", "config": to_dict(perturbed_net.config)}
    save_weights(tmp_path / "weights", perturbed_net.state_dict(), record, dtype=None)
    return tmp_path


def test_every_way_to_name_weights_finds_them(small_enhancer, saved, monkeypatch):
    x = 0.1 * np.random.default_rng(0).standard_normal(3000)
    monkeypatch.chdir(saved)
    expected = small_enhancer(x, 16_000)
    for name in (saved, str(saved), ".", "weights", "weights.safetensors", "weights.json", saved / "weights"):
        np.testing.assert_array_equal(Enhancer.from_pretrained(name, "cpu")(x, 16_000), expected)


@pytest.mark.parametrize("name", ["no-such-model", "", ".", "/"])
def test_unknown_weights_are_told_with_the_shipped_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"neither shipped weights \(.*enhance-base.*\) nor a folder"):
        Enhancer.from_pretrained(name)


def test_corrupt_weights_are_told(saved):
    path = saved / "weights.safetensors"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=f"{len(whole) - 100} bytes where {len(whole)} were written"):
        Enhancer.from_pretrained(saved)
    whole[-50] ^= 1
    path.write_bytes(whole)
    with pytest.raises(WeightsError, match=r"sha256 is .* corrupt"):
        Enhancer.from_pretrained(saved)
    path.unlink()
    with pytest.raises(WeightsError, match=r"weights\.safetensors': no such file"):
        Enhancer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "separate"}, "made for model 'separate', wanted 'enhance'"),
        ({"config": None}, "config: expected an object, got None"),
        ({"config": {"colour": 1}}, "unknown key 'colour'"),
        ({"config": {"heads": 3}}, "heads: 3 must divide"),
        ({"config": {}}, "state_dict does not fit EnhanceNet: missing blocks.1"),
    ],
)
def test_weights_of_another_model_are_told(saved, change, message):
    record = json.loads((saved / "weights.json").read_text())
    (saved / "weights.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(WeightsError, match=message):
        Enhancer.from_pretrained(saved)
