"""Who speaks when: levels, spans and leaks of signals made to measure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.activity import PowerMeter, activities, block_powers, loud_power

RATE_HZ = 1000
BLOCK = 20


def tone(seconds: float, *spans: tuple[float, float], level_db: float = 0.0) -> np.ndarray:
    """Samples of alternating sign with this RMS level within the spans, 0 elsewhere."""
    x = np.zeros(round(seconds * RATE_HZ), np.float32)
    for begin, end in spans:
        x[round(begin * RATE_HZ) : round(end * RATE_HZ)] = 10 ** (level_db / 20)
    x[1::2] *= -1
    return x


def measured(*signals: np.ndarray):
    meter = PowerMeter(len(signals), RATE_HZ)
    meter.push(np.stack(signals))
    return meter.activities()


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, 700), sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8))
def test_powers_do_not_depend_on_the_chunks(length, sizes):
    x = np.random.default_rng(length).standard_normal((2, length)).astype(np.float32)
    meter, at, turn = PowerMeter(2, RATE_HZ), 0, 0
    while at < length:
        size = sizes[turn % len(sizes)] or 1
        meter.push(x[:, at : at + size])
        meter.powers()  # asking in between changes nothing
        at, turn = at + size, turn + 1
    expected = [
        [np.mean(np.square(row[i : i + BLOCK], dtype=np.float64)) for i in range(0, length, BLOCK)] for row in x
    ]
    np.testing.assert_allclose(meter.powers(), np.reshape(expected, (2, -1)), rtol=1e-12)


def test_blocks_leave_the_rest_out_and_loud_is_one_second():
    x = np.concatenate([np.full((1, 20), 2.0), np.full((1, 20), 1.0), np.full((1, 19), 9.0)], axis=1)
    np.testing.assert_array_equal(block_powers(x, BLOCK), [[4.0, 1.0]])
    powers = np.zeros((2, 5000))
    powers[0, 1000:1050], powers[1, 7] = 0.25, 5.0
    np.testing.assert_allclose(loud_power(powers), [0.25, 0.1])
    np.testing.assert_allclose(loud_power(powers[:, 1000:1025]), [0.25, 0])


def test_level_time_and_spans_of_a_turn():
    (one,) = measured(tone(10, (1.0, 2.0), (2.2, 3.0), (5.0, 6.5), level_db=-12))
    assert one.level_db == pytest.approx(-12, abs=1e-5)
    assert one.active_s == pytest.approx(1.0 + 0.8 + 1.5)
    np.testing.assert_allclose(one.spans, [(1.0, 3.0), (5.0, 6.5)])  # the gap of 0.2 s is closed


def test_clicks_and_silence_are_no_speech():
    click, silent = measured(tone(10, (4.0, 4.06)), tone(10))
    assert click.spans == () and click.active_s == 0 and click.level_db == -200
    assert silent == click


def test_the_gate_follows_the_talker_whatever_the_length():
    x = tone(600, (100, 101.5), level_db=-60) + tone(600, (300, 310), level_db=-90)
    (one,) = measured(x)
    np.testing.assert_allclose(one.spans, [(100, 101.5)])
    (louder,) = measured(1000 * x)
    assert louder.spans == one.spans and louder.level_db == pytest.approx(one.level_db + 60, abs=1e-4)


def test_what_leaks_from_a_louder_signal_is_not_activity():
    own, leak_db = tone(10, (6.0, 8.0), level_db=-15), -22
    other = tone(10, (1.0, 4.0))
    leaking = own + 10 ** (leak_db / 20) * other
    alone, beside = measured(leaking)[0], measured(leaking, other)[0]
    assert len(alone.spans) == 2
    np.testing.assert_allclose(beside.spans, [(6.0, 8.0)])


def test_no_span_ends_after_the_signal():
    (one,) = measured(tone(1.005, (0.5, 1.005)))
    np.testing.assert_allclose(one.spans, [(0.5, 1.005)])
    assert activities(np.ones((1, 10)))[0].spans == ((0.0, pytest.approx(0.2)),)
