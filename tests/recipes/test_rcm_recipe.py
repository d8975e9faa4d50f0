import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from allears.core.config import to_dict
from allears.core.weights import load_weights, save_weights
from allears.diffusion.rcm import RcmSettings, RcmStep
from allears.diffusion.tangent import tangent_error
from allears.models.enhance import PRESETS, Enhancer
from allears.models.enhance.loss import LossWeights
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance
from allears.recipes.enhance_data import TRAIN_MIX, load_data
from allears.recipes.rcm import EnhancerBatches, as_velocity, distil_enhancer, enhance_few
from allears.recipes.rcm_objective import RcmObjective, StudentAndCritic

TINY = {"batch": 2, "seconds": 0.25, "rirs": 0, "device": "cpu", "validation_clips": 1}


@pytest.fixture(scope="module")
def data(small_corpus):
    whole = load_data([str(small_corpus)], torch.device("cpu"), rirs=0, validation_clips=1)
    return replace(whole, noisy=whole.noisy[:, 20_000:24_000], clean=whole.clean[:, 20_000:24_000])


def lively(prior: str = "noisy") -> EnhanceNet:
    """An untrained network whose every path counts."""
    torch.manual_seed(0)
    net = EnhanceNet(replace(PRESETS["test"], prior=prior))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    stem = tmp_path_factory.mktemp("teacher") / "teacher"
    net = lively()
    save_weights(stem, net.state_dict(), {"model": "enhance", "config": to_dict(net.config)}, dtype="float32")
    return str(stem)


@pytest.mark.parametrize("prior", ["noisy", "gaussian"])
def test_wrapped_enhancer_is_the_enhancer(prior):
    """One step of the distilled sampler at pure noise is one Euler step of its own."""
    net = lively(prior)
    noisy = torch.randn(2, 3000, generator=torch.Generator().manual_seed(1)) * 0.1
    with torch.no_grad():
        few = enhance_few(net, net.config, noisy, 1, torch.Generator().manual_seed(5))
        own = enhance(net, net.config, noisy, 1, "euler", generator=torch.Generator().manual_seed(5))
        two = enhance_few(net, net.config, noisy, 2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(few, own, rtol=1e-4, atol=1e-5)
    assert (two - few).abs().max() > 1e-3


def test_enhancer_has_an_exact_tangent():
    """Convolutions, both attentions, norms and the embedding of time, in forward mode."""
    net = lively().double()
    rng = torch.Generator().manual_seed(2)
    u, y, d_u = (torch.randn(2, 4, 256, 2, generator=rng, dtype=torch.float64) for _ in range(3))
    t, d_t = torch.tensor([0.3, 0.9]).double(), torch.tensor([0.5, -1.0]).double()
    coarse, fine = (tangent_error(as_velocity(net, net.config), u, t, y, d_u, d_t, step) for step in (3e-3, 3e-4))
    assert fine < 3e-4 and coarse > 20 * fine  # the error of the difference, which falls with the square of its step


def test_draws_are_states_of_the_flow(data):
    config = PRESETS["test"]
    batches = EnhancerBatches(config, data, replace(TRAIN_MIX, seconds=0.25, rirs=0), 2, 0, LossWeights())
    u, y = batches.draw(0, torch.Generator())
    again, _ = batches.draw(0, torch.Generator())
    assert u.shape == y.shape and u.shape[-2:] == (256, 2) and not torch.equal(u, again)  # an accumulated batch
    assert torch.isfinite(u).all() and 0.01 < float(u.std()) < 3
    same = EnhancerBatches(config, data, replace(TRAIN_MIX, seconds=0.25, rirs=0), 2, 0, LossWeights())
    assert torch.equal(same.draw(0, torch.Generator())[0], u)


def test_recipe_distils_and_exports(data, teacher, tmp_path):
    rcm = {"warmup_steps": 2, "student_every": 2, "consistency_angles": {"mean": 1.0, "std": 1.0}}
    result = distil_enhancer(
        [], str(tmp_path), steps=5, start=teacher, data=data, rcm=rcm, lr=1e-3, sampler_steps=2, **TINY
    )
    assert result.step == 5 and result.skipped == 0
    assert np.isfinite(result.metrics["si_sdr_gain_1"]) and np.isfinite(result.metrics["si_sdr_gain_2_renoised"])
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["config"]["steps"] == 2 and record["training"]["rcm"]["score_weight"] == 0.01
    assert record["training"]["rcm"]["consistency_angles"] == {"mean": 1.0, "std": 1.0}
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    means = next(row for row in rows if row["kind"] == "train")
    assert 0 < means["consistency"] < 1.01 and means["critic"] > 0 and means["score"] >= 0
    tensors, _ = load_weights(tmp_path / "ema")
    before, _ = load_weights(teacher)
    for part in ("student", "critic"):
        moved = [not torch.equal(tensors[f"{part}.{name}"], before[name]) for name in before]
        assert sum(moved) > 0.9 * len(moved), part
    enhancer = Enhancer.from_pretrained(tmp_path / "export", device="cpu")
    y = enhancer(torch.randn(4000) * 0.1, 16_000)
    assert y.shape == (4000,) and math.isfinite(float(y.sum()))


def test_resumed_distillation_equals_an_unbroken_one(data, teacher, tmp_path):
    """Stopped in the warm-up, before the critic has any state."""
    arguments = {"start": teacher, "data": data, "lr": 1e-3, "rcm": {"warmup_steps": 2, "student_every": 2}, **TINY}
    distil_enhancer([], str(tmp_path / "whole"), steps=4, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        draw = EnhancerBatches.draw

        def stop_at_one(self, step, generator):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)
            return draw(self, step, generator)

        patch.setattr(EnhancerBatches, "draw", stop_at_one)
        broken = distil_enhancer([], str(tmp_path / "broken"), steps=4, **arguments)
    assert broken.stop == "signal" and broken.step == 2
    resumed = distil_enhancer([], str(tmp_path / "broken"), steps=4, **arguments)
    assert resumed.step == 4
    whole, again = (load_weights(tmp_path / run / "ema")[0] for run in ("whole", "broken"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_objective_needs_no_critic_without_score_distillation():
    net = torch.nn.Linear(3, 3)
    pair = StudentAndCritic(net, with_critic=False)
    assert pair.critic is None and torch.equal(pair.student.weight, net.weight) and pair.student is not net

    def velocity(net):
        return lambda x, t, condition: net(x) * t[:, None] + condition

    seen = []
    objective = RcmObjective(
        RcmStep(RcmSettings(score_weight=0.0, warmup_steps=0)),
        net,
        velocity,
        lambda step, generator: (torch.randn(4, 3, generator=generator), 0.1 * step),
        lambda student: seen.append(student) or {"score": 1.0},
    )
    loss, parts = objective.loss(pair, 3, torch.Generator().manual_seed(0))
    loss.backward()
    assert list(parts) == ["consistency"] and pair.student.weight.grad.abs().max() > 0
    assert net.weight.grad is None and not net.weight.requires_grad
    assert objective.validate(pair) == {"score": 1.0} and seen == [pair.student]


def test_bad_settings_are_named(data, tmp_path):
    for change, words in (
        ({"preset": "base"}, "preset: 'base' given"),
        ({"sampler_steps": 4}, "sampler_steps: 4 given"),
        ({"rcm": {"warmup": 1}}, "rcm: unknown key 'warmup'"),
        ({"start": "nothing-there"}, "nothing-there"),
    ):
        with pytest.raises(ValueError, match=words):
            distil_enhancer([], str(tmp_path), steps=1, data=data, **{**TINY, **change})
