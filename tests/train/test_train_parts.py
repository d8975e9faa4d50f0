"""Schedule, averaged weights, random states, checkpoints, log and curves, each by itself."""

import logging
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from allears.core.errors import WeightsError
from allears.train.ahead import Ahead, AheadInProcesses
from allears.train.checkpoint import Checkpoint, checkpoint_paths, load_checkpoint, save_checkpoint
from allears.train.curves import curve_series, draw_curves
from allears.train.ema import Ema
from allears.train.logs import RunLog, Window, read_log
from allears.train.rng import pack_states, restore_states, seed_all
from allears.train.schedule import learning_rate, run_progress


def test_progress_is_the_further_of_steps_and_time():
    assert run_progress(25, 100) == 0.25
    assert run_progress(25, 100, elapsed_s=30, budget_s=60) == 0.5
    assert run_progress(75, 100, elapsed_s=30, budget_s=60) == 0.75
    assert run_progress(0, 100, elapsed_s=70, budget_s=60) == 1.0
    assert run_progress(0, 100, elapsed_s=0.1, budget_s=-3.0) == 1.0


def test_learning_rate_warms_up_then_follows_half_a_cosine():
    rates = [learning_rate(step, step / 1000, 2.0, 0.1, 50) for step in range(1001)]
    assert rates[0] == pytest.approx(2.0 / 50) and rates[24] == pytest.approx(1.0, rel=2e-3)
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[500] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates[1000] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    assert learning_rate(10, 0.1, 1.0, 1.0, 500) == 1.0
    assert learning_rate(5, 0.05, 1.0, 1.0, 500) == pytest.approx(0.5)


def test_average_follows_the_formula_in_float32_and_is_only_lent():
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.9, warmup=False)
    model.weight.data.fill_(2.0)
    ema.update(0)
    ema.update(1)
    assert torch.allclose(ema.state_dict()["weight"], torch.tensor(1 + (1 - 0.9**2)), atol=1e-6)
    with pytest.raises(RuntimeError, match="inside"), ema.in_model():
        assert model.weight[0, 0].item() == float(torch.tensor(1.19).bfloat16())
        raise RuntimeError("inside")
    assert (model.weight == 2.0).all()


def test_average_warm_up_forgets_the_first_weights():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, 0.999, warmup=True)
    model.weight.data.fill_(1.0)
    for count in range(30):
        ema.update(count)
    kept = math.prod((1 + count) / (10 + count) for count in range(30))
    assert float(ema.state_dict()["weight"]) == pytest.approx(1 - kept, abs=1e-6)


def draws(generator):
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        torch.rand(()).item(),
        torch.rand((), generator=generator).item(),
    ]


def test_random_states_come_back_with_half_used_gaussian_pairs():
    device = torch.device("cpu")
    generator = seed_all(3, 0, device)
    draws(generator)
    row = pack_states(generator)
    assert row.dtype == torch.uint8 and row.ndim == 1
    expected = [draws(generator) for _ in range(3)]
    other = seed_all(8, 0, device)
    assert pack_states(other).shape == row.shape
    assert restore_states(row, other)
    assert [draws(other) for _ in range(3)] == expected
    assert not restore_states(row[:-1], other)


def test_seeds_differ_by_rank_step_and_seed():
    device = torch.device("cpu")
    first = [draws(seed_all(*key)) for key in ((0, 0, device), (0, 1, device), (1, 0, device), (0, 0, device, 5))]
    assert len({value for row in first for value in row}) == 20
    assert draws(seed_all(0, 0, device)) == first[0]


def test_failed_save_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    state = Checkpoint({"model": {"a.b": torch.arange(3)}}, {"step": 4})
    save_checkpoint(tmp_path, 4, state)

    from allears.train import checkpoint

    def full_disk(path_stem, *rest, **named):
        path_stem.parent.mkdir(parents=True)
        path_stem.with_name("state.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, 8, state)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert path == checkpoint_paths(tmp_path)[-1] and path.name == "step-000000004-1"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.groups["model"]["a.b"], torch.arange(3)) and loaded.meta["step"] == 4


def test_newest_checkpoint_wins_and_corruption_is_named(tmp_path):
    (tmp_path / "checkpoints" / ".part-step-000000009-1").mkdir(parents=True)  # a process that was killed while writing
    for step in (9, 9, 10, 10):
        save_checkpoint(tmp_path, step, Checkpoint({"x": {"y": torch.ones(2)}}, {}))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000010-2"]
    (tmp_path / "checkpoints" / "step-000000002-9").mkdir()
    newest = checkpoint_paths(tmp_path)[-1]
    assert newest.name == "step-000000010-2"
    (newest / "state.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"state\.safetensors.*0 bytes where"):
        load_checkpoint(newest)


def test_window_means_leave_out_values_that_are_not_finite():
    window = Window()
    for value in (1.0, math.nan, 4.0):
        window.add({"loss": torch.tensor(value), "mixed": value})
    window.add({"mixed": torch.tensor(1.0), "bad": math.inf})
    means = window.take_means()
    assert means["loss"] == 2.5 and means["mixed"] == 2.0 and math.isnan(means["bad"])
    assert window.take_means() == {}


def test_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    caplog.set_level(logging.INFO, logger="allears")
    journal = RunLog(tmp_path)
    assert "tensorboard is not installed" in caplog.text
    journal.write("train", 1, 0.5, {"loss": 1.0})
    length = journal.bytes
    journal.write("train", 2, 0.7, {"loss": math.inf})
    journal.close()
    assert [row["loss"] for row in read_log(journal.path)] == [1.0, None]
    journal = RunLog(tmp_path, length, 1)
    journal.write("validate", 2, 0.9, {"score": 3.0})
    journal.close()
    with journal.path.open("a") as file:
        file.write('{"kind": "tr')
    rows = read_log(journal.path)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("validate", 2)]
    assert curve_series(rows) == {"train/loss": ([1], [1.0]), "validate/score": ([2], [3.0])}


def test_curves_without_matplotlib_warn_and_go_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(tmp_path) is None
    assert "pip install 'allears[train]'" in caplog.text


def test_draws_are_made_ahead_and_follow_the_step():
    made = []
    ahead = Ahead(lambda key: made.append(key) or key)
    assert [ahead.take(step) for step in (0, 0, 1, 5, 5, 6)] == [(0, 0), (0, 1), (1, 0), (5, 0), (5, 1), (6, 0)]
    made.clear()
    assert [ahead.take(step) for step in (7, 8, 9)] == [(7, 0), (8, 0), (9, 0)]
    assert made.count((8, 0)) == made.count((9, 0)) == 1 and made.count((7, 0)) <= 1  # none is drawn twice


def test_draws_of_a_pool_are_made_ahead_and_follow_the_step():
    made = []
    with ThreadPoolExecutor(2) as pool:
        ahead = AheadInProcesses(lambda key: made.append(key) or key, pool, 3)
        assert [ahead.take(step) for step in (0, 0, 1, 5, 5, 6)] == [(0, 0), (0, 1), (1, 0), (5, 0), (5, 1), (6, 0)]
        assert [ahead.take(step) for step in (7, 8, 9)] == [(7, 0), (8, 0), (9, 0)]
    assert {(10, 0), (11, 0), (12, 0)} <= set(made) and max(step for step, _ in made) == 12
    assert len(made) == len(set(made))  # none is drawn twice
