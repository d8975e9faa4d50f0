import numpy as np
import pytest

from allears.audio.metrics import bootstrap_interval, paired_bootstrap_interval


def test_interval_agrees_with_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval.n == 400


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        interval = bootstrap_interval(rng.exponential(1.0, 60), confidence=0.8, resamples=300)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.72 < hits / 300 < 0.86


def test_same_seed_same_interval_and_values_that_are_not_finite_are_left_out():
    values = [1.0, 2.0, float("nan"), 4.0, float("inf")]
    assert bootstrap_interval(values) == bootstrap_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval(values).n == 3
    many = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(many) == bootstrap_interval(many)
    assert bootstrap_interval(many) != bootstrap_interval(many, seed=1)


def test_one_value_and_none():
    assert bootstrap_interval([2.5]) == (2.5, 2.5, 2.5, 1)
    empty = bootstrap_interval([float("nan")])
    assert empty.n == 0 and np.isnan([empty.mean, empty.low, empty.high]).all()


def test_resamples_drawn_in_blocks_are_as_many_as_asked(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    whole = bootstrap_interval(values, resamples=501)
    monkeypatch.setattr("allears.audio.metrics.bootstrap._BLOCK_VALUES", 50 * 7)
    assert bootstrap_interval(values, resamples=501) == pytest.approx(whole)


def test_paired_interval_is_narrow_where_clips_differ_more_than_systems():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 5, 100)
    baseline, better = difficulty, difficulty + 1 + rng.normal(0, 0.1, 100)
    gain = paired_bootstrap_interval(better, baseline)
    assert gain.mean == pytest.approx(1, abs=0.05) and gain.low > 0.95 and gain.high < 1.05
    assert bootstrap_interval(better).high - bootstrap_interval(better).low > 1


def test_paired_leaves_out_clips_that_either_lacks():
    assert paired_bootstrap_interval([1, 2, np.nan, 5], [0, np.nan, 3, 4]) == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence: got 95"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples: got 0"),
        (lambda: bootstrap_interval([[1.0]]), r"values: got shape \(1, 1\)"),
        (lambda: paired_bootstrap_interval([1.0], [1.0, 2.0]), "baseline: got shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
