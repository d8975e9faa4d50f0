import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.metrics import align, delay_samples

SIGNAL = np.random.default_rng(0).standard_normal(3000).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(delay=st.integers(-200, 200), extra=st.integers(0, 300))
def test_a_known_delay_is_found_and_taken_off(delay, extra):
    late = np.concatenate([np.zeros(max(0, delay), np.float32), SIGNAL[max(0, -delay) :], np.zeros(extra, np.float32)])
    noisy = late + 0.3 * np.random.default_rng(1).standard_normal(len(late)).astype(np.float32)
    assert delay_samples(noisy, SIGNAL, 200) == delay
    aligned = align(late, SIGNAL, 200)
    assert aligned.shape == SIGNAL.shape and aligned.dtype == np.float32
    start = max(0, -delay)
    np.testing.assert_array_equal(aligned[start:], SIGNAL[start:])
    assert not aligned[:start].any()


def test_a_delay_beyond_the_limit_is_not_looked_for():
    late = np.concatenate([np.zeros(50, np.float32), SIGNAL])
    assert abs(delay_samples(late, SIGNAL, 20)) <= 20
    assert delay_samples(late, SIGNAL, 50) == 50


def test_a_tone_takes_the_smallest_of_its_delays():
    tone = np.sin(2 * np.pi * np.arange(20_000) / 100)
    assert delay_samples(np.roll(tone, 10), tone, 150) == 10


def test_silence_and_the_end_of_short_signals():
    assert delay_samples(np.zeros(10), SIGNAL, 5) == 0
    assert align(SIGNAL[:4], SIGNAL, 0).tolist() == [*SIGNAL[:4].tolist(), *[0.0] * 2996]
    assert align(np.array([0.0, 0.0, 1.0]), np.array([1.0]), 10).tolist() == [1.0]


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="max_lag: got -1"):
        delay_samples(SIGNAL, SIGNAL, -1)
