import json
import time

import numpy as np
import pytest
import torch

from allears.data.tokens import TokenData, TokenReport
from allears.recipes.pretrain_arms import STRESS, Arm, study_arms
from allears.recipes.pretrain_study import refusal, run_study

SMALL = {"preset": "test", "device": "cpu", "tokens_per_step": 64, "token_budget": 2048, "validation_windows": 2}
SMALL |= {"validations": 1, "log_rows": 4, "trace_windows": 1}


@pytest.fixture(scope="module")
def data() -> TokenData:
    rng = np.random.default_rng(0)
    train, val = (np.cumsum(rng.integers(0, 3, size)).astype(np.uint16) % 64 for size in (6000, 400))
    report = TokenReport(64, 63, 6000, 400, 1, 1, 6000, 400, {"train": "a", "val": "b"}, [])
    return TokenData(train, val, report)


def test_the_arms_are_the_grid_of_the_question():
    arms = study_arms((0, 1, 2))
    assert len({arm.name for arm in arms}) == len(arms) == 30
    headline = {(arm.numerics, arm.seed) for arm in arms[:6]}
    assert headline == {(numerics, seed) for numerics in ("exact", "sagebwd") for seed in (0, 1, 2)}
    stress = [arm for arm in arms if arm.gain != 1]
    assert {(a.numerics, a.large, a.gain) for a in stress} == {
        (numerics, large, STRESS) for numerics in ("exact", "sagebwd") for large in (False, True)
    }
    assert stress[0].name == "qk-norm-small-gain-3/exact/seed-0"
    first = [arm for arm in arms if arm.seed == 0 and arm.gain == 1]
    grid = {(arm.numerics, arm.qk_norm, arm.large) for arm in first if arm.smooth_k and not arm.smooth_q}
    assert grid == {(n, q, large) for n in ("exact", "sagebwd") for q in (True, False) for large in (True, False)}
    for change in ({"smooth_k": False}, {"smooth_q": True}):
        found = {(a.qk_norm, a.large) for a in first if all(getattr(a, name) == v for name, v in change.items())}
        assert len(found) == 4
    assert Arm("sagebwd", False, True, False, True, "tile", seed=3).name == (
        "no-qk-norm-large/sagebwd-no-k-smoothing-q-smoothing-tile-scales/seed-3"
    )


def test_study_trains_refuses_resumes_and_traces(data, tmp_path):
    arms = [Arm("exact", trace=True), Arm("exact", large=True), Arm("exact", False, gain=2.0), Arm("int8_fp8")]
    document = run_study("", str(tmp_path), arms=arms, data=data, **SMALL)
    rows = document["arms"]
    assert [row["status"] for row in rows.values()] == ["done", "done", "done", "refused"]
    assert rows["qk-norm-small/int8_fp8/seed-0"]["reason"]
    assert [rows[arm.name].get("steps") for arm in arms] == [32, 4, 32, None]
    losses = {name: row["metrics"]["val_loss"] for name, row in rows.items() if row["status"] == "done"}
    assert len(set(losses.values())) == 3 and losses["qk-norm-small/exact/seed-0"] < np.log(64) - 0.2
    trace = rows["qk-norm-small/exact/seed-0"]["trace"]
    assert {row["layer"] for row in trace} == {0, 1} and all(np.isfinite(row["value"]) for row in trace)
    assert json.loads((tmp_path / "study.json").read_text()) == document
    before = (tmp_path / "qk-norm-small/exact/seed-0/ema.safetensors").stat().st_mtime_ns
    more = [*arms, Arm("exact", seed=1)]
    again = run_study("", str(tmp_path), arms=more, data=data, **SMALL)
    assert (tmp_path / "qk-norm-small/exact/seed-0/ema.safetensors").stat().st_mtime_ns == before
    assert again["arms"]["qk-norm-small/exact/seed-1"]["status"] == "done"
    assert {name: again["arms"][name] for name in rows} == rows
    with pytest.raises(ValueError, match=r"holds a study with another lr, token_budget"):
        run_study("", str(tmp_path), arms=arms, data=data, **{**SMALL, "token_budget": 4096, "lr": 1.0})


def test_arms_differ_in_their_attention_alone(data, tmp_path, monkeypatch):
    """Another exact kernel in place of the low-bit one: the same start, text and, but for rounding, losses."""
    import allears.recipes.pretrain as pretrain
    from allears.ops.attention import AttentionSpec

    def stand_in(numerics="exact", *rest):
        return AttentionSpec(causal=True, kernel="auto" if numerics == "exact" else "reference")

    monkeypatch.setattr(pretrain, "spec_of", stand_in)
    monkeypatch.setattr("allears.recipes.pretrain_study.spec_of", stand_in)
    document = run_study("", str(tmp_path), arms=[Arm("exact"), Arm("sagebwd")], data=data, **SMALL)
    one, other = (row["metrics"]["val_loss"] for row in document["arms"].values())
    assert one == pytest.approx(other, abs=1e-3)


def test_a_study_out_of_time_leaves_arms_for_the_next_call(data, tmp_path, monkeypatch):
    """The clock of the study stands still but for what the test adds: a minute an arm, of one and a half."""
    clock = [0.0]
    real = time.monotonic
    monkeypatch.setattr("allears.recipes.pretrain_study.time", type("T", (), {"monotonic": lambda: clock[0]}))
    from allears.recipes import pretrain_study

    plain = pretrain_study.train_language

    def slow(*arguments, **named):
        clock[0] += 60
        named["watch"] = None
        return plain(*arguments, **named)

    monkeypatch.setattr(pretrain_study, "train_language", slow)
    arms = [Arm("exact", seed=seed) for seed in (0, 1)]
    small = {**SMALL, "token_budget": 128}
    first = run_study("", str(tmp_path), minutes=1.5, arms=arms, data=data, **small)
    assert [row["status"] for row in first["arms"].values()] == ["done", "left"]
    assert first["arms"][arms[0].name]["elapsed_s"] == 60
    then = run_study("", str(tmp_path), minutes=1.5, arms=arms, data=data, **small)
    assert [row["status"] for row in then["arms"].values()] == ["done", "done"]
    assert real() > 0


def test_an_arm_over_time_is_stopped_and_gone_on_with(data, tmp_path, monkeypatch):
    """The clock of the study goes on by a second whenever it is looked at: at each of the sixteen steps, too."""
    arms = [Arm("exact")]
    stopped = run_study("", str(tmp_path / "a"), minutes=1e-9, arms=arms, data=data, **SMALL)
    row = stopped["arms"][arms[0].name]
    assert row["status"] == "left"  # no time to begin
    settings = {**SMALL, "token_budget": 1024}
    whole = run_study("", str(tmp_path / "whole"), arms=arms, data=data, **settings)
    with monkeypatch.context() as patch:
        clock = iter(range(1000))
        patch.setattr("allears.recipes.pretrain_study.time", type("T", (), {"monotonic": lambda: next(clock)}))
        cut = run_study("", str(tmp_path / "cut"), minutes=0.15, arms=arms, data=data, **settings)
    row = cut["arms"][arms[0].name]
    assert row["status"] == "stopped" and 3 < row["steps"] < 12
    rest = run_study("", str(tmp_path / "cut"), arms=arms, data=data, **settings)
    assert rest["arms"][arms[0].name]["metrics"] == whole["arms"][arms[0].name]["metrics"]
    assert rest["arms"][arms[0].name]["status"] == "done"


def test_sagebwd_arm_trains(data, tmp_path):
    pytest.importorskip("allears.ops.attention.lowbit.backends")
    assert refusal(Arm("sagebwd"), 16, 2, torch.device("cpu")) == ""
    document = run_study("", str(tmp_path), arms=[Arm("exact"), Arm("sagebwd")], data=data, **SMALL)
    exact, low = (row["metrics"] for row in document["arms"].values())
    assert low["val_loss"] == pytest.approx(exact["val_loss"], abs=0.05) and low["val_loss"] != exact["val_loss"]
    assert low["val_loss_exact"] == pytest.approx(low["val_loss"], abs=0.05)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_sagebwd_arm_with_smoothed_queries_trains(data, tmp_path, qk_norm):
    arm = Arm("sagebwd", qk_norm, smooth_q=True)
    assert arm in study_arms() and refusal(arm, 16, 2, torch.device("cpu")) == ""
    arms = [Arm("sagebwd", qk_norm), arm]
    rows = run_study("", str(tmp_path), arms=arms, data=data, **SMALL)["arms"]
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    plain, smooth = (row["metrics"]["val_loss"] for row in rows.values())
    assert smooth == pytest.approx(plain, abs=0.05) and smooth != plain


def test_an_arm_that_fails_is_named_and_tried_again(data, tmp_path, monkeypatch):
    from allears.recipes import pretrain_study

    plain = pretrain_study.train_language

    def break_seed_1(*arguments, **named):
        if named["seed"] == 1:
            raise RuntimeError("out of memory")
        return plain(*arguments, **named)

    arms = [Arm("exact", seed=seed) for seed in (1, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_study, "train_language", break_seed_1)
        rows = list(run_study("", str(tmp_path), arms=arms, data=data, **SMALL)["arms"].values())
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows[0]["reason"] == "RuntimeError: out of memory"
    again = run_study("", str(tmp_path), arms=arms, data=data, **SMALL)["arms"]
    assert [(row["status"], "reason" in row) for row in again.values()] == [("done", False)] * 2
    with pytest.raises(ValueError, match="tokens_per_step: 65 given"):
        run_study("", str(tmp_path / "b"), arms=arms, data=data, **{**SMALL, "tokens_per_step": 65})
