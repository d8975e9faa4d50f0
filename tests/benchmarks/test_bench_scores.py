import csv
import math

import numpy as np
import pytest
from benchmarks.scores import ClipScore, score, score_in_background, summarise, write_csv

RNG = np.random.default_rng(0)
VOICE = RNG.standard_normal(4000)
NOISY = VOICE + RNG.standard_normal(4000)


def entries():
    values = {"noisy": [1.0, 2.0, 3.0], "mine": [2.0, 4.0, math.nan]}
    return [
        ClipScore(f"c{i}", system, {"reverberant": i == 0, "snr_db": 5 * i}, {"pesq_wb": value}, 0.25)
        for system, row in values.items()
        for i, value in enumerate(row)
    ]


def test_summary_has_means_and_paired_gains_by_case():
    cases = (
        ("test", lambda facts: True),
        ("dry", lambda facts: not facts["reverberant"]),
        ("none", lambda facts: False),
    )
    rows = summarise(entries(), ["noisy", "mine"], ["pesq_wb"], cases, baseline="noisy")
    found = {(r["case"], r["system"], r["metric"]): (r["value"], r["n"]) for r in rows}
    assert found == {
        ("test", "noisy", "pesq_wb"): (2.0, 3),
        ("test", "mine", "pesq_wb"): (3.0, 2),
        ("test", "mine", "pesq_wb_gain"): (1.5, 2),
        ("dry", "noisy", "pesq_wb"): (2.5, 2),
        ("dry", "mine", "pesq_wb"): (4.0, 1),
        ("dry", "mine", "pesq_wb_gain"): (2.0, 1),
    }


def test_csv_has_a_line_for_each_clip_and_system(tmp_path):
    write_csv(tmp_path / "new" / "x.csv", entries(), ["pesq_wb"])
    with (tmp_path / "new" / "x.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[4] == {
        "clip": "c1",
        "system": "mine",
        "reverberant": "False",
        "snr_db": "5",
        "pesq_wb": "4",
        "seconds": "0.25",
        "note": "",
    }


def test_an_estimate_that_cannot_be_scored_is_nan_with_a_note():
    scores, note = score(VOICE, NOISY * np.nan, ["si_sdr_db"])
    assert math.isnan(scores["si_sdr_db"]) and "NaN" in note
    scores, note = score(np.zeros(4000), NOISY, ["si_sdr_db"])
    assert math.isnan(scores["si_sdr_db"]) and note == "si_sdr_db: the reference is silent"


def test_background_scoring_keeps_the_order_and_passes_failures_through():
    jobs = [(ClipScore(str(i), "a", {}), VOICE, VOICE + 10.0**-i * (NOISY - VOICE)) for i in range(12)]
    jobs[5] = (ClipScore("5", "a", {}, note="failed: x"), VOICE, None)
    done = list(score_in_background(jobs, ["si_sdr_db"], workers=1))
    assert [entry.clip for entry in done] == [str(i) for i in range(12)]
    assert math.isnan(done[5].scores["si_sdr_db"]) and done[5].note == "failed: x"
    direct = score(*jobs[3][1:], ["si_sdr_db"])[0]["si_sdr_db"]
    assert done[3].scores["si_sdr_db"] == direct == pytest.approx(60, abs=2)
