"""The echo canceller on waveforms and live chunks: both give the same, whatever the rate, length and chunking."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import SMALL, make
from tests.models.one_thread import one_thread  # noqa: F401

from allears.core.config import to_dict
from allears.core.errors import WeightsError
from allears.core.weights import save_weights
from allears.models.echo import EchoCanceller
from allears.models.echo.model import EchoNet
from allears.models.echo.stream import EchoSession, resampling_ms

CANCELLER = EchoCanceller(make(), "cpu")
RATE = 16_000


def noise(*shape, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def close(a, b, tolerance=2e-4):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, float(np.abs(b).max())))


def test_the_waveform_gets_what_the_network_gives():
    mic, reference = noise(3, 2000), noise(3, 2000, seed=1)
    with torch.no_grad():
        wanted = make()(torch.from_numpy(mic), torch.from_numpy(reference)).near.numpy()
    close(CANCELLER(mic, reference, RATE), wanted)
    assert np.abs(wanted - mic).max() > 0.01


def test_the_network_that_was_given_stays_as_it_is():
    net = make().train()
    EchoCanceller(net, "cpu")
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert any("running_mean" in name for name in net.state_dict())


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([8_000, 16_000, 44_100]),
    st.integers(1, 1500),
    st.lists(st.integers(0, 400), max_size=8),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_chunks_of_any_two_sizes_give_what_the_whole_gives(rate, length, mic_sizes, reference_sizes):
    mic, reference = noise(length), noise(length, seed=1)
    session = CANCELLER.stream(rate, patience_s=9.0)
    parts, m, r = [], 0, 0
    for index in range(max(len(mic_sizes), len(reference_sizes))):
        more, played = ((s[index] if index < len(s) else 0) for s in (mic_sizes, reference_sizes))
        parts.append(session.push(mic[m : m + more], reference[r : r + played]))
        m, r = min(length, m + more), min(length, r + played)
    parts += [session.push(mic[m:], reference[r:]), session.flush()]
    near, at_once = np.concatenate(parts), CANCELLER.stream(rate)
    assert near.shape == mic.shape and near.dtype == np.float32
    close(near, np.concatenate([at_once.push(mic, reference), at_once.flush()]))
    if rate == RATE:
        close(near, CANCELLER(mic, reference, rate))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_nothing_shifts_at_any_rate(rate):
    """What an untrained network, which returns the microphone, makes of a chirp: a file and a live stream."""
    same = EchoCanceller(EchoNet(SMALL), "cpu")
    time_s = np.arange(int(0.3 * rate) + 1) / rate
    x = (0.3 * np.sin(2 * np.pi * (300 + 0.6 * min(rate, RATE) * time_s) * time_s)).astype(np.float32)
    inner = slice(rate // 20, -rate // 20)
    np.testing.assert_allclose(same(x, 0 * x, rate)[inner], x[inner], atol=2e-3)
    session = same.stream(rate)
    np.testing.assert_allclose(np.concatenate([session.push(x, None), session.flush()])[inner], x[inner], atol=2e-3)


@pytest.mark.parametrize(
    ("rate", "conversion_ms"),
    [(8_000, 0.0), (16_000, 0.0), (24_000, 0.0), (32_000, 0.0), (44_100, 1.338), (48_000, 0.0), (96_000, 0.0)],
)
def test_latency_is_what_is_told(rate, conversion_ms):
    """With chunks of whole hops (of 2 ms here, which at 44.1 kHz are no whole samples; windows of 4): what has not come
    back after a chunk, and an impulse."""
    assert resampling_ms(rate, SMALL) == pytest.approx(conversion_ms, abs=1e-3)
    session = EchoCanceller(EchoNet(SMALL), "cpu").stream(rate)
    assert session.latency_ms == SMALL.latency_ms + resampling_ms(rate, SMALL)
    assert CANCELLER.latency_ms == SMALL.latency_ms
    size = rate // 100
    x = np.zeros(40 * size, np.float32)
    at = 20 * size + 3
    x[at] = 1.0
    sent = got = 0
    behind, y = set(), []
    for chunk in np.split(x, 40):
        y.append(session.push(chunk, None))
        sent, got = sent + size, got + len(y[-1])
        behind.add(sent - got)
    late = (SMALL.latency_ms - 1000 * SMALL.hop_s) * rate / 1000 + round(conversion_ms * rate / 1000)
    assert max(behind) == pytest.approx(late, abs=1)  # the oldest sample of a hop waits for the whole of it, too
    assert np.abs(np.concatenate(y)).argmax() == at


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_live_and_file_differ_by_the_edge_of_the_band_alone(rate):
    """Noise up to 6 kHz through a network that returns the microphone."""
    same = EchoCanceller(EchoNet(SMALL), "cpu")
    spectrum = np.fft.rfft(noise(rate // 2))
    spectrum[np.fft.rfftfreq(rate // 2, 1 / rate) > 6_000] = 0
    x = np.fft.irfft(spectrum, rate // 2).astype(np.float32)
    session, inner = same.stream(rate), slice(rate // 20, -rate // 20)
    live = np.concatenate([session.push(x, None), session.flush()])[inner]
    error = np.abs(live - same(x, 0 * x, rate)[inner]).max()
    assert error < 3e-3 * np.abs(x).max()


def test_a_reference_that_is_not_there_is_silence():
    mic, silence = noise(1000), np.zeros(1000, np.float32)
    wanted = CANCELLER(mic, silence, RATE)
    session = CANCELLER.stream(RATE)
    close(np.concatenate([session.push(mic, None), session.flush()]), wanted)
    session = CANCELLER.stream(RATE, patience_s=0.01)
    parts = [session.push(part, silence[:0]) for part in np.split(mic, 10)]
    assert session.waiting_s[0] <= 0.01 and sum(map(len, parts)) > 500
    close(np.concatenate([*parts, session.flush()]), wanted)
    close(CANCELLER(mic, silence[:7], RATE), wanted)


def test_a_reference_that_comes_late_keeps_its_place():
    """320 samples are missed; silence stands for them; what comes of them later is dropped, and the rest is in time."""
    mic, reference = noise(3200), noise(3200, seed=1)
    heard = reference.copy()
    heard[640:960] = 0
    session = CANCELLER.stream(RATE, patience_s=0.01)
    parts = [session.push(mic[:640], reference[:640]), session.push(mic[640:960], reference[:0])]
    assert session.waiting_s == (0.0, 0.0)
    parts.append(session.push(mic[960:1000], reference[640:1000]))  # what was late comes with what is due
    parts.append(session.push(mic[1000:], reference[1000:]))
    close(np.concatenate([*parts, session.flush()]), CANCELLER(mic, heard, RATE))


def test_a_reference_that_was_lost_is_not_waited_for():
    """Nothing came for 320 samples, and what comes then is what is due."""
    mic, reference = noise(3200), noise(3200, seed=1)
    reference[640:960] = 0
    session = CANCELLER.stream(RATE, patience_s=0.01)
    parts = [session.push(mic[:640], reference[:640]), session.push(mic[640:960], reference[:0])]
    parts += [session.push(m, r) for m, r in zip(np.split(mic[960:], 7), np.split(reference[960:], 7), strict=True)]
    assert session.waiting_s == (0.0, 0.0)
    close(np.concatenate([*parts, session.flush()]), CANCELLER(mic, reference, RATE))


def test_a_reference_that_was_lost_longer_than_one_wait_is_in_time_again_at_once():
    """An outage of 400 samples in chunks of 80, with a patience of 160: none of it waits when the reference is back."""
    mic, reference = noise(3200), noise(3200, seed=1)
    reference[640:1040] = 0
    session = CANCELLER.stream(RATE, patience_s=0.01)
    parts = [session.push(mic[:640], reference[:640])]
    parts += [session.push(mic[at : at + 80], reference[:0]) for at in range(640, 1040, 80)]
    assert session.waiting_s == (0.0, 0.0)
    parts += [session.push(mic[at : at + 80], reference[at : at + 80]) for at in range(1040, 3200, 80)]
    close(np.concatenate([*parts, session.flush()]), CANCELLER(mic, reference, RATE))


def test_a_refused_chunk_changes_nothing():
    mic, reference = noise(2000), noise(2000, seed=1)
    session = CANCELLER.stream(RATE)
    first = session.push(mic[:700], reference[:700])
    bad = {
        "mic: 1 samples are NaN or infinite": (np.float32([0, np.nan]), reference[:2]),
        "reference: 2 samples are NaN": (mic[:2], np.float32([np.inf, np.nan])),
        r"mic: shape \(2, 5\) given; \(n,\) or \(1, n\) is wanted": (np.zeros((2, 5), np.float32), reference[:5]),
        r"reference: shape \(2, 5\) given": (mic[:5], np.zeros((2, 5), np.float32)),
        "mic: dtype int16 given; floating samples": (np.zeros(5, np.int16), reference[:5]),
        "mic: list given": ([0.0], reference[:1]),
        r"mic: a sample of size 1.0e\+20": (np.float32([1e20]), reference[:1]),
        r"reference: 1[0-9]\.[0-9] s ahead of the microphone; at most 10 s": (mic[:0], np.zeros(170_000, np.float32)),
    }
    for message, chunks in bad.items():
        with pytest.raises(ValueError, match=message):
            session.push(*chunks)
    rest = session.push(mic[700:], torch.from_numpy(reference[700:]).double())
    close(np.concatenate([first, rest, session.flush()]), CANCELLER(mic, reference, RATE))
    for call in (lambda: session.push(mic, None), session.flush):
        with pytest.raises(ValueError, match="this session has been flushed"):
            call()


def test_sessions_do_not_meet_and_channels_are_rows():
    mic, reference = noise(2, 1500), noise(1500, seed=1)
    both, one = CANCELLER.stream(RATE, channels=2), CANCELLER.stream(RATE)
    parts, alone = [], []
    for m, r in zip(np.split(mic, 5, axis=1), np.split(reference, 5), strict=True):
        parts.append(both.push(m, r))
        alone.append(one.push(m[1], r))
    parts.append(both.flush())
    alone.append(one.flush())
    close(np.concatenate(parts, axis=1), CANCELLER(mic, reference, RATE))
    close(np.concatenate(parts, axis=1)[1], np.concatenate(alone))
    empty = CANCELLER.stream(RATE)
    assert empty.push(mic[0, :0], None).shape == (0,) and empty.flush().shape == (0,)


def test_facts_are_told():
    mic, reference = noise(2, 3200), noise(3200, seed=1)
    told = []
    CANCELLER(mic, reference, RATE, on_facts=told.append)
    with torch.no_grad():
        out = make()(torch.from_numpy(mic), torch.from_numpy(reference).expand(2, -1))
    voice, delay = (np.concatenate([getattr(f, name) for f in told], axis=1) for name in ("voice", "delay_ms"))
    np.testing.assert_allclose(voice, out.voice.sigmoid().numpy(), atol=1e-4)
    assert (delay == 2.0 * out.alignment.argmax(-1).numpy()).mean() > 0.95
    best = out.alignment.argmax(-1)
    for t in (0, 50, 100):
        around = out.alignment[0, t, max(0, best[0, t] - 1) : best[0, t] + 2].sum()
        assert told[0].confidence.shape[0] == 2
        confidence = np.concatenate([f.confidence for f in told], axis=1)[0, t]
        assert confidence == pytest.approx(float(around), abs=1e-3)
    session = CANCELLER.stream(RATE)
    assert session.facts is None
    session.push(mic[0], reference)
    np.testing.assert_allclose(session.facts.voice[0, -1], voice[0, 99], atol=1e-4)


def test_shapes_and_kinds_come_back():
    mic, reference = noise(2, 3, 600), noise(2, 3, 600, seed=1)
    full = CANCELLER(mic, reference, RATE)
    assert full.shape == mic.shape
    close(CANCELLER(mic[1], reference[1], RATE), full[1])
    close(CANCELLER(mic[1, 2], reference[1, 2], RATE), full[1, 2])
    close(CANCELLER(mic[0], reference[0, 1], RATE)[1], full[0, 1])
    close(CANCELLER(mic, reference[:, :1], RATE)[1, 0], full[1, 0])
    y = CANCELLER(torch.from_numpy(mic).double(), torch.from_numpy(reference), RATE)
    assert isinstance(y, torch.Tensor) and y.dtype == torch.float64
    close(y.numpy(), full)
    longer = np.concatenate([reference[0, 0], noise(50)])
    close(CANCELLER(mic[0, 0], longer, RATE), full[0, 0])


@pytest.mark.parametrize(
    ("mic", "reference", "message"),
    [
        (np.zeros(5, np.int16), noise(5), "mic: dtype int16 given"),
        (noise(5), np.zeros(5, np.int16), "reference: dtype int16 given"),
        (noise(0), noise(5), r"mic: shape \(0,\) given"),
        (noise(5), noise(0), r"reference: shape \(0,\) given"),
        (noise(5), np.float32([0, np.nan]), "reference: 1 samples are NaN"),
        (noise(1, 1, 1, 5), noise(5), r"mic: shape \(1, 1, 1, 5\) given"),
        (noise(5), noise(2, 5), r"reference: shape \(2, 5\) given for microphones \(5,\); one channel"),
        (noise(3, 5), noise(2, 5), r"mix a stereo reference with reference.mean\(0\)"),
        (noise(2, 5), noise(3, 2, 5), r"reference: shape \(3, 2, 5\) given"),
        (np.float32([1e25]), noise(1), r"a sample of size 1.0e\+25"),
    ],
)
def test_bad_waveforms_are_refused(mic, reference, message):
    with pytest.raises(ValueError, match=message):
        CANCELLER(mic, reference, RATE)


def test_bad_options_are_refused():
    for rate in (0, 500_000):
        with pytest.raises(ValueError, match=f"sample_rate_hz: {rate} given"):
            CANCELLER(noise(5), noise(5), rate)
        with pytest.raises(ValueError, match=f"sample_rate_hz: {rate} given"):
            CANCELLER.stream(rate)
    with pytest.raises(ValueError, match="channels: 0 given"):
        CANCELLER.stream(RATE, channels=0)
    with pytest.raises(ValueError, match="patience_s: -1 given"):
        CANCELLER.stream(RATE, patience_s=-1)
    assert isinstance(CANCELLER.stream(RATE), EchoSession)


def test_weights_are_found_and_checked(tmp_path):
    net = make(replace(SMALL, voice_gate=False))
    save_weights(tmp_path / "weights", net.state_dict(), {"model": "echo", "config": to_dict(net.config)}, dtype=None)
    mic, reference = noise(800), noise(800, seed=1)
    loaded = EchoCanceller.from_pretrained(tmp_path, "cpu")
    close(loaded(mic, reference, RATE), EchoCanceller(net, "cpu")(mic, reference, RATE))
    gated = EchoCanceller.from_pretrained(tmp_path, "cpu", voice_gate=True)
    close(gated(mic, reference, RATE), CANCELLER(mic, reference, RATE))
    assert loaded.name == "weights" and loaded.parameters < sum(p.numel() for p in net.parameters())
    save_weights(tmp_path / "weights", net.state_dict(), {"model": "enhance", "config": {}}, dtype=None)
    with pytest.raises(WeightsError, match="made for model 'enhance', wanted 'echo'"):
        EchoCanceller.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="neither shipped weights"):
        EchoCanceller.from_pretrained("no-such-model")
