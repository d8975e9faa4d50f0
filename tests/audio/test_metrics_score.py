import logging

import numpy as np
import pytest

from allears.audio.metrics import METRICS, collect_reasons, score_clip, si_sdr_db
from allears.audio.resample import resample
from allears.core.errors import MissingDependencyError

RATE = 16_000
RNG = np.random.default_rng(0)
CLEAN = (0.1 * RNG.standard_normal(RATE)).astype(np.float32)
NOISY = CLEAN + (0.05 * RNG.standard_normal(RATE)).astype(np.float32)


def test_scores_come_in_the_order_asked_for():
    pytest.importorskip("pystoi")
    scores = score_clip(CLEAN, NOISY, RATE, ["estoi", "si_sdr_db"])
    assert list(scores) == ["estoi", "si_sdr_db"]
    assert scores["si_sdr_db"] == si_sdr_db(NOISY, CLEAN)


def test_channels_are_scored_one_by_one_and_averaged():
    reference, estimate = np.stack([CLEAN, CLEAN]), np.stack([NOISY, CLEAN + 0.1 * (NOISY - CLEAN)])
    expected = (si_sdr_db(estimate[0], CLEAN) + si_sdr_db(estimate[1], CLEAN)) / 2
    assert score_clip(reference, estimate, RATE, ["si_sdr_db"]) == {"si_sdr_db": pytest.approx(expected)}


def test_metrics_defined_at_16_khz_get_16_khz(monkeypatch):
    heard = {}

    def listen(estimate, reference, rate):
        heard.update(lengths=(len(estimate), len(reference)), rate=rate)
        return 1.5

    monkeypatch.setitem(__import__("allears.audio.metrics.score", fromlist=["x"])._AT_16_KHZ, "pesq_wb", listen)
    wide = resample(NOISY[None], RATE, 48_000)[0]
    scores = score_clip(wide, wide, 48_000, ["pesq_wb", "si_sdr_db"])
    assert scores["pesq_wb"] == 1.5
    assert heard == {"lengths": (RATE, RATE), "rate": RATE}


def test_without_a_reference_only_dnsmos_is_given():
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    scores = score_clip(None, NOISY, RATE)
    assert list(scores) == ["dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl"]
    assert all(1 <= value <= 5 for value in scores.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, NOISY, RATE, ["pesq_wb"]), "pesq_wb needs a reference"),
        ((CLEAN, NOISY, RATE, ["pesq"]), "'pesq' is unknown; known are " + ", ".join(METRICS)),
        ((CLEAN[:-1], NOISY, RATE, ["si_sdr_db"]), "align and trim"),
        ((CLEAN, NOISY * np.nan, RATE, ["si_sdr_db"]), "NaN"),
        ((CLEAN[:0], NOISY[:0], RATE, ["si_sdr_db"]), "at least one sample"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_clip(*arguments)


def test_reasons_are_logged_outside_the_collector_and_kept_inside(caplog):
    silent = np.zeros(RATE)
    with caplog.at_level(logging.WARNING):
        score_clip(silent, NOISY, RATE, ["si_sdr_db"])
    assert "reference is silent" in caplog.text
    caplog.clear()
    with collect_reasons() as reasons:
        score_clip(silent, NOISY, RATE, ["si_sdr_db"])
    assert reasons == {"si_sdr_db": "the reference is silent"} and not caplog.text


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    with pytest.raises(MissingDependencyError, match=r"pesq_wb needs the package 'pesq'.*allears\[eval\]"):
        score_clip(CLEAN, NOISY, RATE, ["pesq_wb"])
