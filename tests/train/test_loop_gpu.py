import signal

import pytest
import torch
from tiny_objective import TRUTH
from torch import nn

from allears.core.weights import load_weights
from allears.train import TrainConfig, train
from allears.train.checkpoint import checkpoint_paths, load_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class OnGpu:
    """Draws from the CUDA generators; asks for a stop in step ``stop_step``; its loss is infinite in ``bad_steps``."""

    def __init__(self, stop_step=None, bad_steps=()):
        self.stop_step, self.bad_steps = stop_step, bad_steps

    def loss(self, model, step, generator):
        if step == self.stop_step:
            signal.raise_signal(signal.SIGTERM)
        x = torch.randn(64, 4, generator=generator, device=generator.device) + torch.randn((), device="cuda") * 0.1
        error = (model(x).float() - x @ TRUTH.cuda()).square().mean()
        if step in self.bad_steps:
            error = error / torch.zeros((), device="cuda")
        return error, {"error": error.detach(), "host": torch.tensor(1.0)}

    def validate(self, model):
        x = torch.randn(256, 4, device="cuda")
        return {"error": float((model(x) - x @ TRUTH.cuda()).square().mean())}


def run(out, objective, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.Tanh(), nn.Linear(64, 2))
    settings = {"steps": 200, "lr": 0.02, "warmup_steps": 5, "device": "cuda", "log_every": 7, "validate_every": 50}
    return train(model, objective, TrainConfig(out=str(out), **{**settings, **changes}))


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp32", "compile": True}])
def test_resumed_run_equals_unbroken_run_on_the_gpu(tmp_path, changes):
    whole = run(tmp_path / "whole", OnGpu(bad_steps=(9,)), **changes)
    assert run(tmp_path / "parts", OnGpu(60, bad_steps=(9,)), **changes).stop == "signal"
    parts = run(tmp_path / "parts", OnGpu(), **changes)
    one, two = (load_checkpoint(checkpoint_paths(tmp_path / name)[-1]).groups for name in ("whole", "parts"))
    for group in one:
        assert set(one[group]) == set(two[group])
        for name in one[group]:
            assert torch.equal(one[group][name], two[group][name]), (group, name)
    assert whole.skipped == parts.skipped == 1
    assert whole.metrics == parts.metrics and whole.metrics["error"] < 0.1
    assert set(load_weights(whole.weights)[0]) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_bad_steps_in_a_row_end_the_run_on_the_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"not finite (2\d) steps in a row"):
        run(tmp_path, OnGpu(bad_steps=range(3, 200)))
