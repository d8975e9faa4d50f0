"""The echo canceller's transforms at the stream's own rate: what the network sees, what comes out, when, and where."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import SMALL, make
from tests.models.one_thread import one_thread  # noqa: F401

from allears.audio.stft import Stft
from allears.models.echo import EchoCanceller
from allears.models.echo.config import PRESETS
from allears.models.echo.model import EchoNet
from allears.models.echo.own_rate import OwnRate, whole_hop
from allears.models.echo.stream import EchoCore, resampling_ms

TEN_MS = PRESETS["test"]
SAME = EchoCanceller(EchoNet(TEN_MS), "cpu")  # untrained: returns the microphone
NET = EchoCanceller(make(), "cpu").net
RATES = [8_000, 16_000, 24_000, 32_000, 44_100, 48_000, 96_000]


def noise(*shape, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_multiples_of_100_hz_have_whole_hops():
    wanted = {4_000: 40, 8_000: 80, 16_000: 160, 44_100: 441, 48_000: 480, 384_000: 3840}
    assert {rate: whole_hop(rate, TEN_MS) for rate in wanted} == wanted
    assert [whole_hop(rate, TEN_MS) for rate in (0, -100, 100, 3_900, 11_025, 22_050, 44_150, 384_100)] == [None] * 8
    assert whole_hop(48_000, SMALL) == 96 and whole_hop(44_100, SMALL) is None  # hops of 2 ms
    for rate in RATES:
        assert resampling_ms(rate, TEN_MS) == 0.0 and SAME.stream(rate).latency_ms == 20.0
    assert SAME.stream(11_025).latency_ms == pytest.approx(21.995, abs=1e-3)
    assert SAME.stream(22_050).latency_ms == pytest.approx(21.361, abs=1e-3)


@pytest.mark.parametrize("rate", RATES)
def test_an_impulse_comes_back_in_its_place_exactly_20_ms_later(rate):
    """It is the first sample of a hop, which waits longest; which output sample it is, and how many samples had gone in
    from it on when that came."""
    hop, session = rate // 100, SAME.stream(rate)
    at = 3 * hop
    x = np.zeros(7 * hop, np.float32)
    x[at] = 1.0
    y, came = [session.push(x[:at], None)], []
    came += [at] * len(y[0])
    for n in range(at, len(x)):
        y.append(session.push(x[n : n + 1], None))
        came += [n + 1] * len(y[-1])
    late = np.array(came) - np.arange(len(came))
    assert late[at] == late[2 * hop :].max() == rate // 50  # before that, all went in at once
    y = np.concatenate([*y, session.flush()])
    assert len(y) == len(x) and np.abs(y).argmax() == at
    assert y[at] == pytest.approx(min(1.0, (2 * TEN_MS.bins - 1) / (2 * hop)), abs=1e-5)  # bins kept, of all
    if rate <= TEN_MS.sample_rate_hz:
        np.testing.assert_allclose(y, x, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_the_network_sees_what_it_would_at_its_own_rate(rate):
    """A tone of 1 kHz and one of 3 kHz, half as loud, have the same spectra at every rate; bins it lacks are zeros."""

    def spectra(rate):
        times = np.arange(6 * rate // 100) / rate
        tones = torch.from_numpy(np.sin(2 * np.pi * 1000 * times) + 0.5 * np.cos(2 * np.pi * 3000 * times)).float()
        hop = whole_hop(rate, TEN_MS)
        return OwnRate(TEN_MS.bins, hop, 1).analyse(tones[None], 0.5 * tones[None]), hop

    found, hop = spectra(rate)
    wanted, _ = spectra(16_000)
    assert found.shape == wanted.shape == (1, 2, 2, 6, 161)
    kept, peak = min(161, hop + 1), float(wanted.abs().max())
    np.testing.assert_allclose(found[..., 1:, : kept - 1], wanted[..., 1:, : kept - 1], atol=3e-3 * peak)
    assert not found[..., kept:].any()
    size = found[0, 0, :, 3].square().sum(0)  # bins are 50 Hz apart
    assert size.argmax() == 20 and size[60] == pytest.approx(0.25 * float(size[20]), rel=1e-2)
    torch.testing.assert_close(found[:, 1], 0.5 * found[:, 0])


@pytest.mark.parametrize("rate", [24_000, 44_100, 48_000])
def test_the_band_reaches_to_8_khz_and_ends_there(rate):
    times = np.arange(rate // 2) / rate
    inner = slice(rate // 10, -rate // 10)
    for hz, passes in ((100, True), (7_000, True), (7_800, True), (8_200, False), (0.49 * rate, False)):
        x = np.sin(2 * np.pi * hz * times).astype(np.float32)
        session = SAME.stream(rate)
        y = np.concatenate([session.push(x, None), session.flush()])
        rest = np.std((y - x if passes else y)[inner]) / np.std(x)
        assert 20 * np.log10(rest) < -30, hz


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8_000, 16_000, 24_500, 48_000]),
    length=st.integers(1, 900),
    sizes=st.lists(st.integers(0, 250), max_size=8),
)
def test_a_stream_is_the_network_on_the_whole_signal(rate, length, sizes):
    """For any chunks: the core at the stream's rate run at once, and whole transforms around the network."""
    mic, reference = noise(2, length, seed=length)
    session, parts, at = EchoCanceller(NET, "cpu").stream(rate), [], 0
    for size in [*sizes, length]:
        parts.append(session.push(mic[at : at + size], reference[at : at + size]))
        at = min(length, at + size)
    live = np.concatenate([*parts, session.flush()])
    core = EchoCore(NET, 1, rate_hz=rate)
    both = np.stack([mic, reference])
    np.testing.assert_allclose(live, np.concatenate([core.push(both), core.flush()], axis=1)[0], atol=1e-5)
    hop = whole_hop(rate, SMALL)
    stft, bins, scale = Stft(2 * hop, hop), min(SMALL.bins, hop + 1), SMALL.hop / hop
    spectra = torch.zeros(1, 2, 2, stft.frames(length), SMALL.bins)
    spectra[..., :bins] = scale * EchoNet.spectra(stft.forward(torch.from_numpy(both)[None]))[..., :bins]
    with torch.no_grad():
        made, _, _ = NET.cancel(spectra, NET.initial_state(1))
    whole = torch.zeros(1, hop + 1, stft.frames(length), dtype=torch.complex64)
    whole[:, :bins] = torch.complex(made[:, 0], made[:, 1]).transpose(1, 2)[:, :bins] / scale
    np.testing.assert_allclose(live, stft.inverse(whole, length)[0].numpy(), atol=1e-5)


def test_rows_and_references_are_apart():
    """Two microphones with a reference each, and with one for both, at 48 kHz."""
    mic, reference = noise(2, 1000), noise(2, 1000, seed=1)

    def run(*rows, references):
        core = EchoCore(NET, len(rows) - references, references, rate_hz=48_000)
        return np.concatenate([core.push(np.stack(rows)), core.flush()], axis=1)

    both, shared = run(*mic, *reference, references=2), run(*mic, reference[0], references=1)
    for row in range(2):
        np.testing.assert_allclose(both[row], run(mic[row], reference[row], references=1)[0], atol=1e-5)
        np.testing.assert_allclose(shared[row], run(mic[row], reference[0], references=1)[0], atol=1e-5)
    assert np.abs(both[1] - shared[1]).max() > 1e-3


def test_a_rate_without_a_whole_hop_is_refused_by_the_core():
    with pytest.raises(ValueError, match=r"rate_hz: 22050 given; .* of which 10 ms are whole samples .* to 16000 Hz"):
        EchoCore(EchoNet(replace(TEN_MS)).eval(), 1, rate_hz=22_050)
