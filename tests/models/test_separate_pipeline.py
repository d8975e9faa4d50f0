"""The separator as users call it: talkers in order, kinds, rates, levels, counts, refusals."""

import numpy as np
import pytest
import torch
from tests.models.split_nets import RATE_HZ, GainNet, SplitNet, mix, speech

from allears.audio.activity import Activity
from allears.models.separate import Separator
from allears.models.separate.count import count_talkers


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def gated(sources: np.ndarray, *spans: tuple[float, float]) -> np.ndarray:
    """Each source (J, S) speaks in its span alone, in seconds."""
    at = np.arange(sources.shape[1]) / RATE_HZ
    return sources * np.stack([(at >= begin) & (at < end) for begin, end in spans])


@pytest.mark.parametrize("seed", range(6))
def test_talkers_come_in_the_order_in_which_they_first_speak(seed):
    """Whatever order the network has them in, which the samples decide."""
    sources = gated(speech(3, 6, seed), (2.0, 5.0), (0.5, 1.5), (1.0, 6.0))
    found = Separator(SplitNet(3), "cpu")(mix(sources), RATE_HZ)
    np.testing.assert_array_equal(found.talkers, sources[[1, 2, 0]])
    assert found.count == 3
    rms = [10 * np.log10(np.mean(np.square(row[row != 0]))) for row in sources[[1, 2, 0]]]
    np.testing.assert_allclose(found.levels_db, rms, atol=0.5)
    np.testing.assert_allclose(found.spans, [[(0.5, 1.5)], [(1.0, 6.0)], [(2.0, 5.0)]], atol=0.021)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_silent_outputs_come_last_and_do_not_count(count):
    sources = speech(3, 4, seed=count)
    sources[count:] = 0
    found = Separator(SplitNet(3), "cpu")(mix(sources), RATE_HZ)
    assert found.talkers.shape == sources.shape and found.count == count
    assert not found.talkers[count:].any() and found.talkers[:count].any(axis=1).all()
    assert found.levels_db[count:] == (-200.0,) * (3 - count) and found.spans[count:] == ((),) * (3 - count)


def activity(level_db: float, active_s: float = 2.0, begin_s: float = 0.0) -> Activity:
    return Activity(level_db, active_s, ((begin_s, begin_s + active_s),) if active_s else ())


@pytest.mark.parametrize(
    ("levels", "count"),
    [
        ((-20, -30, -39.9), 3),
        ((-20, -30, -40.1), 2),
        ((-60, -20, -41), 1),
        ((-49.9, -55, -200), 1),  # of a mixture at -20 dB
        ((-50.1, -55, -200), 0),  # nobody is heard beside the noise
        ((-200, -200, -200), 0),
    ],
)
def test_a_talker_is_within_20_db_of_the_loudest_and_30_of_the_mixture(levels, count):
    outputs = [activity(level, 2.0 if level > -200 else 0.0) for level in levels]
    assert count_talkers(outputs, activity(-20)).count == count


def test_counts_can_be_calibrated_and_told():
    outputs = [activity(-30, begin_s=1.0), activity(-20, begin_s=5.0), activity(-22, 0.28, begin_s=0.0)]
    found = count_talkers(outputs, activity(-18))
    assert (found.count, found.order, found.levels_db) == (2, (0, 1, 2), (-30, -20, -22))  # 0.28 s are too short
    assert count_talkers(outputs, activity(-18), count_db=-9.0).order == (1, 2, 0)
    for wanted, order in ((1, (1, 2, 0)), (2, (2, 1, 0)), (3, (2, 0, 1))):
        told = count_talkers(outputs, activity(-18), wanted=wanted)
        assert (told.count, told.order) == (wanted, order)


def test_channels_are_heard_as_their_mean():
    separator = Separator(GainNet(0.75, 0.25), "cpu")
    x = noise(8, 3000)
    found = separator(x, 16_000)
    assert found.talkers.shape == (2, 3000)
    np.testing.assert_allclose(found.talkers[0], 0.75 * x.mean(0), atol=1e-7)
    np.testing.assert_array_equal(separator(x.mean(0), 16_000).talkers, found.talkers)


@pytest.mark.parametrize("kind", [np.float16, np.float64, torch.float16, torch.bfloat16, torch.float32])
def test_the_kind_comes_back(kind):
    separator = Separator(GainNet(0.75, 0.25), "cpu")
    x = noise(4000)
    given = torch.from_numpy(x).to(kind) if isinstance(kind, torch.dtype) else x.astype(kind)
    found = separator(given, 16_000).talkers
    assert type(found) is type(given) and found.dtype == kind
    single = np.asarray(given.float() if isinstance(given, torch.Tensor) else given, np.float32)
    wide = np.asarray(found.float() if isinstance(found, torch.Tensor) else found, np.float32)
    np.testing.assert_allclose(wide, single * np.float32([[0.75], [0.25]]), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("seconds", [0.7, 23.0])
def test_nothing_shifts_at_any_rate(rate, seconds):
    length = int(seconds * rate) + 1
    x = (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / rate)).astype(np.float32)
    found = Separator(GainNet(0.75, 0.25), "cpu")(x, rate, one_pass_s=10)
    inner = slice(rate // 20, -rate // 20)
    assert found.talkers.shape == (2, length) and found.count == 2
    np.testing.assert_allclose(found.talkers[0][inner], 0.75 * x[inner], atol=1e-3)
    np.testing.assert_allclose(found.talkers[1][inner], 0.25 * x[inner], atol=1e-3)


@pytest.mark.parametrize("rate", [4_000, 8_000, 16_000, 44_100, 384_000])
@pytest.mark.parametrize("length", [1, 2, 129])
def test_the_shortest_signals(rate, length):
    found = Separator(GainNet(0.75, 0.25, 0.0), "cpu")(np.full(length, 0.3, np.float32), rate)
    assert found.talkers.shape == (3, length) and np.isfinite(found.talkers).all() and found.count == 0


def test_one_pass_or_windows_as_asked():
    x = mix(speech(2, 45, 1))
    lengths = {}
    for one_pass_s in (None, 45, 10.0, 1e9):
        separator = Separator(SplitNet(2), "cpu")
        separator(x, RATE_HZ, one_pass_s=one_pass_s)
        lengths[one_pass_s] = [count / RATE_HZ for count in separator.net.windows]
    assert lengths == {None: [30, 20], 45: [45], 10.0: [10.0] * 8, 1e9: [45]}


def test_the_network_is_left_in_evaluation_without_gradients():
    net = GainNet(1.0)
    net.layer = torch.nn.BatchNorm1d(3)
    separator = Separator(net, "cpu")
    assert not net.layer.training and not any(p.requires_grad for p in net.parameters())
    assert separator.parameters == 6 and separator.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.ones(10, np.int16), r"dtype int16 given.*divide by 32768"),
        (np.float32([0.1, np.nan, np.inf]), "2 samples are NaN or infinite"),
        (torch.tensor([0.1, float("nan")]), "1 samples are NaN or infinite"),
        (np.zeros(0, np.float32), r"shape \(0,\) given; \(T,\) or \(C, T\) with at least one sample"),
        (np.zeros((1, 1, 9), np.float32), r"shape \(1, 1, 9\) given; \(T,\) or \(C, T\) with at least one sample"),
        (np.float32([1e25, -1e25]), r"a sample of size 1.0e\+25; full scale is 1"),
    ],
)
def test_bad_audio_is_refused(audio, message):
    with pytest.raises(ValueError, match=message):
        Separator(GainNet(1.0, 1.0), "cpu")(audio, 16_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate_hz": 3_999}, "sample_rate_hz: 3999 given; rates from 4000 to 384000"),
        ({"sample_rate_hz": 500_000}, "sample_rate_hz: 500000 given"),
        ({"one_pass_s": 9}, "one_pass_s: 9 given; at least 10 s"),
    ],
)
def test_bad_options_are_refused_also_for_silence(options, message):
    with pytest.raises(ValueError, match=message):
        Separator(GainNet(1.0, 1.0), "cpu")(np.zeros(100, np.float32), **{"sample_rate_hz": 16_000, **options})


def test_there_is_no_live_stream_and_it_says_why():
    with pytest.raises(ValueError, match=r"stream: .* hear the whole window, .* record, then call it or process_file"):
        Separator(GainNet(1.0), "cpu").stream(sample_rate_hz=16_000)
