import json
import math
import signal
from itertools import pairwise

import pytest
import torch
from tiny_objective import TinyObjective, tiny_model
from torch import nn

from allears.core.errors import WeightsError
from allears.core.weights import load_weights
from allears.train import DivergedError, TrainConfig, loop, train
from allears.train.checkpoint import checkpoint_paths, load_checkpoint
from allears.train.logs import read_log


def config(out, **changes):
    settings = {"steps": 20, "lr": 0.02, "warmup_steps": 3, "precision": "fp32", "device": "cpu", "log_every": 4}
    return TrainConfig(out=str(out), **{**settings, "validate_every": 8, **changes})


def final_state(out):
    return load_checkpoint(checkpoint_paths(out)[-1]).groups


def assert_same_groups(one, other):
    assert set(one) == set(other)
    for group in one:
        assert set(one[group]) == set(other[group]), group
        for name in one[group]:
            assert torch.equal(one[group][name], other[group][name]), (group, name)


def log_without_clock(out):
    rows = read_log(out / "log.jsonl")
    return [{name: value for name, value in row.items() if name not in ("elapsed_s", "steps_per_s")} for row in rows]


def signal_at(stop_step):
    """Asks for a stop, once, while the step with this index is under way."""
    waiting = [stop_step]

    def at_step(step):
        if step in waiting:
            waiting.remove(step)
            signal.raise_signal(signal.SIGTERM)

    return at_step


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "accumulate": 2}])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tmp_path, changes):
    whole = train(tiny_model(), TinyObjective(), config(tmp_path / "whole", **changes))
    results = []
    for seed, stop_step in (
        (0, 5),
        (3, 10),
        (4, None),
    ):  # stops in a half-full log window; later models are overwritten
        objective = TinyObjective(signal_at(stop_step))
        results.append(train(tiny_model(seed), objective, config(tmp_path / "parts", **changes)))
    assert [(result.stop, result.step) for result in results] == [("signal", 6), ("signal", 11), ("steps", 20)]
    assert_same_groups(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    assert log_without_clock(tmp_path / "whole") == log_without_clock(tmp_path / "parts")
    assert results[-1].metrics == whole.metrics
    other = train(tiny_model(), TinyObjective(), config(tmp_path / "other", seed=1, **changes))
    assert other.metrics != whole.metrics


class ConvObjective(TinyObjective):
    def loss(self, model, step, generator):
        if self.at_step is not None:
            self.at_step(step)
        x = torch.randn(2, 3, 5, 4, generator=generator)
        error = (model(x) - x.flip(2)[:, :2]).square().mean()
        return error, {"error": error.detach()}

    def validate(self, model):
        return {}


def test_a_resumed_run_keeps_the_memory_order_of_its_parameters(tmp_path):
    """The moments of channels-last weights lie as the weights do; a fused step takes both as they lie."""

    def conv(seed=0):
        torch.manual_seed(seed)
        return torch.nn.Conv2d(3, 2, 3, padding=1).to(memory_format=torch.channels_last)

    train(conv(), ConvObjective(), config(tmp_path / "whole"))
    stops = [
        train(conv(seed), ConvObjective(signal_at(stop_step)), config(tmp_path / "parts")).stop
        for seed, stop_step in ((0, 5), (1, None))
    ]
    assert stops == ["signal", "steps"]
    assert_same_groups(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_crash_goes_back_to_the_last_checkpoint_and_its_log(tmp_path, monkeypatch):
    def crash(step):
        if step == 13:
            raise OSError("power cut")

    real = loop._Run.save
    monkeypatch.setattr(loop._Run, "save", lambda run: real(run) if run.step in (0, 6, 20) else None)
    train(tiny_model(), TinyObjective(), config(tmp_path / "whole"))
    with pytest.raises(OSError, match="power cut"):
        train(tiny_model(), TinyObjective(crash), config(tmp_path / "x", save_every_minutes=0))
    assert [path.name for path in checkpoint_paths(tmp_path / "x")] == ["step-000000006-1"]
    assert [row["step"] for row in read_log(tmp_path / "x" / "log.jsonl")] == [0, 4, 8, 8, 12]
    train(tiny_model(seed=5), TinyObjective(), config(tmp_path / "x"))
    assert_same_groups(final_state(tmp_path / "whole"), final_state(tmp_path / "x"))
    assert log_without_clock(tmp_path / "whole") == log_without_clock(tmp_path / "x")


def test_training_learns_and_leaves_averaged_weights_curves_and_log(tmp_path, pictures):
    model = nn.Linear(4, 2)
    result = train(
        model,
        TinyObjective(batch=32),
        config(tmp_path, steps=300, lr=0.05, weight_decay=0.0, ema_decay=0.9, validate_every=100),
    )
    rows = read_log(tmp_path / "log.jsonl")
    first = next(row for row in rows if row["kind"] == "validate")
    assert first["step"] == 0 and first["error"] > 0.2 and result.metrics["error"] < 1e-4
    weights, record = load_weights(result.weights)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
    assert record["step"] == 300 and record["metrics"] == result.metrics and record["train"]["lr"] == 0.05
    assert torch.equal(final_state(tmp_path)["ema"]["weight"], model.weight)
    assert not torch.equal(final_state(tmp_path)["model"]["weight"], model.weight)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(checkpoint_paths(tmp_path)) == 1
    row = next(row for row in rows if row["kind"] == "train" and row["step"] == 8)
    assert row["spread"] == pytest.approx((4 + 5 + 6 + 7) / 4) and row["loss"] == pytest.approx(row["error"])
    assert row["grad_norm"] > 0 and row["steps_per_s"] > 0 and row["skipped"] == 0


def test_accumulation_equals_the_large_batch(tmp_path):
    x, y = torch.randn(3, 4, 4), torch.randn(3, 4, 2)

    class Parts:
        def __init__(self, whole):
            self.whole, self.calls = whole, 0

        def loss(self, model, step, generator):
            part = self.calls % 3
            self.calls += 1
            one, two = (x.flatten(0, 1), y.flatten(0, 1)) if self.whole else (x[part], y[part])
            return (model(one) - two).square().mean(), {}

        def validate(self, model):
            return {}

    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model, whole in zip(models, (True, False), strict=True):
        objective = Parts(whole)
        train(model, objective, config(tmp_path / str(whole), steps=10, accumulate=1 if whole else 3, grad_clip=0.1))
        assert objective.calls == (10 if whole else 30)
        results.append(final_state(tmp_path / str(whole))["model"]["weight"])
    assert torch.allclose(*results, rtol=0, atol=1e-6)


def test_clipping_bounds_the_step_and_logs_the_norm_before_it(tmp_path):
    class Steep:
        def loss(self, model, step, generator):
            return 1000 * model.weight.sum(), {}

        def validate(self, model):
            return {}

    norms = {}
    for clip in (0.5, 0.0):
        out = tmp_path / str(clip)
        train(nn.Linear(2, 2, bias=False), Steep(), config(out, steps=1, log_every=1, grad_clip=clip))
        norms[clip] = float(final_state(out)["optimizer"]["weight/exp_avg"].norm()) / 0.1
        assert read_log(out / "log.jsonl")[0]["grad_norm"] == pytest.approx(2000)
    assert norms[0.5] == pytest.approx(0.5, rel=1e-4) and norms[0.0] == pytest.approx(2000, rel=1e-4)


def test_no_decay_on_one_dimensional_parameters(tmp_path):
    class Flat:
        def loss(self, model, step, generator):
            return 0.0 * (model.weight.sum() + model.bias.sum()), {}

        def validate(self, model):
            return {}

    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, Flat(), config(tmp_path, steps=4, weight_decay=0.5, ema_decay=0.0))
    assert torch.equal(model.bias, before["bias"])
    assert (model.weight.abs() < before["weight"].abs()).all()


class SometimesBad(TinyObjective):
    def __init__(self, bad_steps, how="loss"):
        super().__init__()
        self.bad_steps, self.how, self.seen = bad_steps, how, {}

    def loss(self, model, step, generator):
        self.seen[step] = {name: value.clone() for name, value in model.state_dict().items()}
        error, parts = super().loss(model, step, generator)
        if step in self.bad_steps:
            weight = model[0].weight
            error = error + (math.inf if self.how == "loss" else (weight - weight.detach()).abs().sum().sqrt())
        return error, parts


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_step_that_is_not_finite_changes_no_weight(tmp_path, how):
    objective = SometimesBad({3, 4, 9}, how)
    result = train(tiny_model(), objective, config(tmp_path, steps=12))
    assert result.skipped == 3
    for name in ("0.weight", "4.bias"):
        assert torch.equal(objective.seen[3][name], objective.seen[5][name])
        assert not torch.equal(objective.seen[5][name], objective.seen[6][name])
        assert torch.equal(objective.seen[9][name], objective.seen[10][name])
    assert float(final_state(tmp_path)["optimizer"]["0.weight/step"]) == 9
    rows = [row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path):
    objective = SometimesBad({0, *range(2, 99)})
    with pytest.raises(DivergedError, match="not finite 20 steps in a row, up to step 22; lower lr"):
        train(tiny_model(), objective, config(tmp_path, steps=99))
    assert max(objective.seen) == 21


class FakeClock:
    """Stands in for the ``time`` module: time passes when work says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def work(self, seconds, result=None):
        self.now += seconds
        return result


def test_run_ends_in_its_time_with_the_last_validation_and_save_in_it(tmp_path, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(loop, "time", clock)
    real_save, real_export = loop.save_checkpoint, loop.save_weights
    monkeypatch.setattr(loop, "save_checkpoint", lambda *rest: clock.work(4.0, real_save(*rest)))
    monkeypatch.setattr(loop, "save_weights", lambda *rest, **named: clock.work(2.0, real_export(*rest, **named)))

    class Slow(TinyObjective):
        def loss(self, model, step, generator):
            clock.work(0.5)
            return super().loss(model, step, generator)

        def validate(self, model):
            clock.work(30.0 + self.validations)
            return super().validate(model)

    settings = config(tmp_path, steps=10**9, minutes=5.0, log_every=1, validate_every=200, warmup_steps=0)
    objective = Slow(signal_at(100))
    first = train(tiny_model(), objective, settings)
    assert first.stop == "signal" and 86 < first.elapsed_s < 93  # 30 + 4 to begin with, 101 steps, 4 + 2 to save
    clock.work(10_000)  # time between calls does not count
    result = train(tiny_model(), objective, settings)
    assert result.stop == "time" and objective.validations == 3  # at 0, at 200, and the last
    assert 285 < result.elapsed_s <= 300
    rates = [row["lr"] for row in read_log(tmp_path / "log.jsonl") if "lr" in row]
    assert rates[0] > 0.019 and rates[-1] == pytest.approx(0.02 * 0.02, rel=0.05)
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(rates))
    again = train(tiny_model(), objective, settings)
    assert again.step == result.step and again.metrics == result.metrics and objective.validations == 3


def test_validation_hears_the_same_draws_and_does_not_change_training(tmp_path):
    often = train(tiny_model(), TinyObjective(), config(tmp_path / "often", validate_every=1))
    train(tiny_model(), TinyObjective(), config(tmp_path / "rare", validate_every=100))
    assert_same_groups(final_state(tmp_path / "often"), final_state(tmp_path / "rare"))
    frozen = train(tiny_model(), TinyObjective(), config(tmp_path / "frozen", lr=1e-30, validate_every=1))
    scores = [row["error"] for row in read_log(tmp_path / "frozen" / "log.jsonl") if row["kind"] == "validate"]
    assert len(scores) == 21 and often.metrics != frozen.metrics


def test_handlers_are_put_back_and_a_second_signal_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def twice(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="second SIGINT"):
        train(tiny_model(), TinyObjective(twice), config(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_existing_run_is_not_overwritten_and_another_model_is_refused(tmp_path):
    train(tiny_model(), TinyObjective(), config(tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"out: .* holds a run already"):
        train(tiny_model(), TinyObjective(), config(tmp_path, steps=2), resume=False)
    with pytest.raises(WeightsError, match=r"does not fit Linear: missing weight, bias; unknown .* and 6 more"):
        train(nn.Linear(4, 2), TinyObjective(), config(tmp_path, steps=2))


def test_changed_settings_are_reported(tmp_path, caplog):
    train(tiny_model(), TinyObjective(), config(tmp_path, steps=2))
    train(tiny_model(), TinyObjective(), config(tmp_path, steps=3, lr=0.5))
    assert [record.getMessage() for record in caplog.records if "resumed with" in record.getMessage()] == [
        "resumed with lr = 0.5; it was 0.02"
    ]


def test_compiled_loss_keeps_plain_names(tmp_path, monkeypatch):
    compiled = []
    real = torch.compile

    def compile_eagerly(model):
        compiled.append(real(model, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    used = []

    class Watch(TinyObjective):
        def loss(self, model, step, generator):
            used.append(model is compiled[0])
            return super().loss(model, step, generator)

    model = tiny_model()
    names = set(model.state_dict())
    train(model, Watch(), config(tmp_path, steps=3, compile=True))
    assert used == [True] * 3
    assert set(load_weights(tmp_path / "ema")[0]) == names
    assert all("_orig_mod" not in name for group in final_state(tmp_path).values() for name in group)


def test_log_is_valid_json_where_a_value_is_not_finite(tmp_path):
    class Odd(TinyObjective):
        def validate(self, model):
            return {"score": math.nan}

    train(tiny_model(), Odd(), config(tmp_path, steps=1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in lines]
    assert rows[0]["score"] is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"minutes": 0.0}, "minutes: got"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"precision": "fp16"}, "'bf16' or 'fp32'"),
        ({"save_every_minutes": -1.0}, "save_every_minutes"),
    ],
)
def test_settings_out_of_range(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **changes)
