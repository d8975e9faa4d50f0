"""The echo canceller on files: what a waveform and a live stream get, whatever the rates, lengths, channels and blocks;
bad files leave nothing behind, and what a user should know of two files is told.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import SMALL, make
from tests.models.one_thread import one_thread  # noqa: F401

from allears.audio.resample import resample
from allears.core.errors import AudioFileError
from allears.models.echo import EchoCanceller, files
from allears.models.echo.files import compare_lengths, opened
from allears.models.echo.model import EchoNet
from allears.models.echo.result import Kept
from allears.models.echo.stream import Facts

CANCELLER = EchoCanceller(make(), "cpu")
RATE = 16_000


def noise(*shape, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def close(a, b, tolerance=2e-4):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, float(np.abs(b).max())))


def write(path, samples, rate=RATE, subtype="FLOAT"):
    """(T,) or (C, T)."""
    soundfile.write(path, samples.T, rate, subtype=subtype)
    return path


def read(path):
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.sampled_from([8_000, 16_000, 44_100]),
    channels=st.integers(1, 2),
    length=st.integers(1, 900),
    played=st.integers(1, 1200),
    block=st.integers(1, 700),
    chunks=st.lists(st.integers(0, 400), max_size=6),
)
def test_file_stream_and_waveform_are_one(tmp_path, rate, channels, length, played, block, chunks):
    mic, reference = noise(channels, length), noise(played, seed=1)
    write(tmp_path / "mic.wav", mic, rate)
    write(tmp_path / "ref.wav", reference, rate)
    paths = tmp_path / "mic.wav", tmp_path / "ref.wav", tmp_path / "out.wav"
    CANCELLER.process_file(*paths, block_frames=block)
    whole = CANCELLER(mic, reference, rate)
    close(read(tmp_path / "out.wav"), whole)
    heard = np.pad(reference, (0, max(0, length - played)))[:length]
    session, at, parts = CANCELLER.stream(rate, channels=channels), 0, []
    for size in [*chunks, length]:
        parts.append(session.push(mic[:, at : at + size], heard[at : at + size]))
        at = min(length, at + size)
    live = np.concatenate([*parts, session.flush()], axis=1)
    assert live.shape == whole.shape
    if rate == RATE:  # other rates are converted with little delay, live: see test_echo_stream.py
        close(live, whole)


@pytest.mark.parametrize(
    ("rate", "channels", "played_rate", "played_channels", "played_s"),
    [(16_000, 1, 16_000, 1, 0.4), (44_100, 8, 16_000, 1, 0.2), (8_000, 1, 96_000, 2, 0.9), (192_000, 1, 8_000, 1, 0.4)],
)
def test_any_rates_depths_and_channels(tmp_path, rate, channels, played_rate, played_channels, played_s):
    write(tmp_path / "mic.wav", 0.1 * noise(channels, int(0.3 * rate)), rate, "PCM_24")
    write(tmp_path / "ref.flac", noise(played_channels, int(played_s * played_rate), seed=1), played_rate, "PCM_16")
    mic, reference = read(tmp_path / "mic.wav"), read(tmp_path / "ref.flac").mean(0, keepdims=True)
    events = []
    result = CANCELLER.process_file(
        tmp_path / "mic.wav", tmp_path / "ref.flac", tmp_path / "out.wav", on_progress=events.append
    )
    written = soundfile.info(tmp_path / "out.wav")
    assert (written.samplerate, written.channels, written.frames) == (rate, channels, mic.shape[1])
    assert written.subtype == "PCM_24"
    close(read(tmp_path / "out.wav"), CANCELLER(mic, resample(reference, played_rate, rate)[0], rate))
    assert (result.frames, result.channels, result.sample_rate_hz) == (mic.shape[1], channels, rate)
    assert events[-1].done == events[-1].total == result.duration_s and events[-1].message == "mic.wav"
    frames = -(-round(mic.shape[1] * RATE / rate) // SMALL.hop) + 1
    assert result.facts.delay_ms.shape == result.facts.voice.shape == (1, frames)
    assert len(result.alignment.weights) == frames and result.facts.alignment is None


@pytest.mark.parametrize(
    ("channels", "asked", "at"), [(2, None, 1), (2, 1, 0), (2, 2, 1), (3, 2, 1), (8, 8, 7)], ids=str
)
def test_one_file_holds_both(tmp_path, channels, asked, at):
    both = noise(channels, 1500)
    write(tmp_path / "both.wav", both)
    out = tmp_path / "out.wav"
    result = CANCELLER.process_file(tmp_path / "both.wav", None, out, reference_channel=asked)
    assert result.channels == channels - 1 and result.notes == ()
    close(read(out), CANCELLER(np.delete(both, at, axis=0), both[at], RATE))


@pytest.mark.parametrize(
    ("channels", "asked", "message"),
    [
        (1, None, "in.wav: has 1 channel; give a reference too, or a stereo file"),
        (8, None, "in.wav: has 8 channels; give a reference too"),
        (1, 1, "has 1 channel, but the reference is wanted in channel 1, and a microphone beside it"),
        (2, 3, "has 2 channels, but the reference is wanted in channel 3"),
        (2, 0, "the reference is wanted in channel 0, .*channels count from 1"),
    ],
)
def test_a_file_without_the_channel_is_refused(tmp_path, channels, asked, message):
    write(tmp_path / "in.wav", noise(channels, 50))
    with pytest.raises(AudioFileError, match=message):
        CANCELLER.process_file(tmp_path / "in.wav", None, tmp_path / "out.wav", reference_channel=asked)
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


def test_bad_files_leave_nothing_and_take_nothing(tmp_path):
    bad = noise(3000)
    bad[2500] = np.nan
    write(tmp_path / "mic.wav", noise(3000))
    write(tmp_path / "nan.wav", bad)
    write(tmp_path / "slow.wav", noise(50), rate=2_000)
    write(tmp_path / "none.wav", noise(0))
    (tmp_path / "text.wav").write_text("this is text, not sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "out.wav").write_text("what stood there before")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    faults = {
        "nan": "nan.wav: sample 2500 is NaN or infinite",
        "none": r"none.wav: holds no samples",
        "text": "text.wav: ",
        "empty": r"empty.wav: is empty \(0 bytes\)",
        "folder": "folder.wav: is a folder",
        "missing": "missing.wav: there is no such file",
    }
    for name, message in faults.items():
        for mic, reference in ((name, "mic"), ("mic", name)):
            with pytest.raises(AudioFileError, match=message):
                CANCELLER.process_file(*(tmp_path / f"{n}.wav" for n in (mic, reference, "out")), block_frames=500)
    with pytest.raises(ValueError, match="sample_rate_hz: 2000 given"):
        CANCELLER.process_file(tmp_path / "slow.wav", tmp_path / "mic.wav", tmp_path / "out.wav")
    with pytest.raises(ValueError, match=r"mic\.wav is the microphone's file too; give what the loudspeaker played"):
        CANCELLER.process_file(tmp_path / "mic.wav", tmp_path / "mic.wav", tmp_path / "out.wav")
    with pytest.raises(ValueError, match="reference_channel: 2 given beside the reference"):
        CANCELLER.process_file(tmp_path / "mic.wav", tmp_path / "slow.wav", tmp_path / "o.wav", reference_channel=2)
    for name in ("mic.wav", "slow.wav"):
        with pytest.raises(ValueError, match=f"dst: .*{name} is an input"):
            CANCELLER.process_file(tmp_path / "mic.wav", tmp_path / "slow.wav", tmp_path / name)

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CANCELLER.process_file(tmp_path / "mic.wav", tmp_path / "slow.wav", tmp_path / "out.wav", on_progress=stop)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("mic_s", "reference_s", "message"),
    [
        (60.0, 60.005, None),
        (
            60.0,
            60.3,
            "0.30 s longer than the microphone (0.50%). If both cover the same time, their clocks ",
        ),
        (3600.0, 3599.64, "0.36 s shorter than the microphone (0.01%)"),
        (3600.0, 3599.64, "drift apart by 100 ppm, and the delay moves by 0.36 s from begin to end"),
        (300.0, 120.0, "ends after 120.00 s, 180.00 s before the microphone: silence stands in its place there"),
        (120.0, 300.0, "goes on for 180.00 s after the microphone's end: that part is not used"),
    ],
)
def test_what_lengths_tell(mic_s, reference_s, message):
    assert message in compare_lengths(mic_s, reference_s) if message else compare_lengths(mic_s, reference_s) is None


@pytest.mark.parametrize(
    ("mic", "reference", "notes"),
    [
        (noise(3200), noise(1600), ["the reference ends after 0.10 s, 0.10 s before the microphone"]),
        (noise(3200), noise(RATE * 150), ["the reference goes on for 149.80 s after the microphone's end"]),
        (noise(32_000), noise(32_256), ["the reference is 0.02 s longer than the microphone (0.80%)"]),
        (noise(3200), 0 * noise(3200), ["the reference is silent throughout (peak 0.0e+00): there is no echo of it"]),
        (0 * noise(3200), noise(3200), ["the microphone is silent throughout (peak 0.0e+00): so is the output"]),
        (noise(1), noise(1), []),
    ],
    ids=["short", "long", "drift", "silent", "deaf", "one"],
)
def test_what_a_user_should_know_is_told(tmp_path, caplog, mic, reference, notes):
    write(tmp_path / "mic.wav", mic)
    write(tmp_path / "ref.wav", reference)
    with caplog.at_level(logging.WARNING):
        result = CANCELLER.process_file(*(tmp_path / f"{name}.wav" for name in ("mic", "ref", "out")))
    assert len(result.notes) == len(notes) and all(n in got for n, got in zip(notes, result.notes, strict=True))
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{tmp_path / 'mic.wav'}: {note}" for note in result.notes]
    close(read(tmp_path / "out.wav")[0], CANCELLER(mic, reference, RATE))
    if not mic.any():
        assert not read(tmp_path / "out.wav").any()


def test_what_no_header_tells_is_told_at_the_end(tmp_path, monkeypatch):
    """A stream that was written without a length is measured as it is read."""

    class Headless(files.AudioReader):
        def __init__(self, *args):
            super().__init__(*args)
            self.info = replace(self.info, frames=None)

    monkeypatch.setattr(files, "AudioReader", Headless)
    write(tmp_path / "mic.wav", noise(3200))
    write(tmp_path / "ref.wav", noise(1600))
    with opened(tmp_path / "mic.wav", tmp_path / "ref.wav", block_frames=1000) as recording:
        assert recording.notes == []
        assert sum(block.shape[1] for block in recording) == 3200
    assert len(recording.notes) == 1 and "the reference ends after 0.10 s" in recording.notes[0]


def test_the_delay_of_a_file_is_found():
    """An untrained aligner finds delays of noise already; what a file keeps of it points there."""
    kept, net = Kept(SMALL.hop_s), EchoCanceller(EchoNet(SMALL), "cpu")
    reference = noise(16_000)
    mic = np.concatenate([np.zeros(5 * SMALL.hop, np.float32), reference])[:16_000]
    net(mic, reference, RATE, on_facts=kept.push)
    delays = kept.alignment()
    assert delays.delay_ms == 2.0 and delays.weights[-100:].mean(0).argmax() == 5
    assert np.median(kept.facts().delay_ms[0, -100:]) == 10.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([2, 3, 8]))
def test_columns_of_the_alignment_are_means(sizes, most):
    """Whatever the pieces: every column but the last is the mean of as many frames, and there are not too many."""
    rows = np.random.default_rng(0).random((2, sum(sizes), 3)).astype(np.float32)
    kept, at = Kept(0.01, most), 0
    for size in sizes:
        kept.push(Facts(None, None, rows[:, at : at + size, 0], rows[:, at : at + size]))
        at += size
    found = kept.alignment()
    each = round(found.column_s / 0.01)
    assert len(found.weights) == -(-sum(sizes) // each) <= most + 1
    assert each == 1 or sum(sizes) // (each // 2) > most - 1
    for index, column in enumerate(found.weights):
        np.testing.assert_allclose(column, rows[0, index * each : (index + 1) * each].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(kept.facts().voice, rows[:1, :, 0])
    assert kept.facts().delay_ms is None and Kept(0.01).alignment() is None
