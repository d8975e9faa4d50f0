import json

import numpy as np
import pytest
import torch

from allears.core.config import from_dict
from allears.core.weights import load_weights
from allears.models.enhance import PRESETS, Enhancer
from allears.models.enhance.loss import LossWeights
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.state import level_of, to_state
from allears.recipes import RECIPES
from allears.recipes.enhance import EnhanceObjective
from allears.recipes.enhance_ablation import ARMS, train_arms
from allears.recipes.enhance_data import TRAIN_MIX, load_data


def test_recipe_trains_saves_and_loads(small_corpus, tmp_path):
    """Twenty steps of the smallest preset: the loss falls, and the exported weights load and run as trained."""
    arguments = {
        "preset": "test",
        "batch": 2,
        "seconds": 1.0,
        "rirs": 2,
        "device": "cpu",
        "validation_clips": 2,
        "seed": 3,
    }
    result = RECIPES["enhance"]([str(small_corpus)], str(tmp_path / "run"), steps=20, **arguments)
    assert result.step == 20 and result.stop == "steps"
    assert np.isfinite(result.metrics["si_sdr_gain_2"])
    record = json.loads((tmp_path / "run" / "export.json").read_text())
    assert record["training"]["speakers"] == 2 and record["training"]["licences"] == ["CC0"]
    enhancer = Enhancer.from_pretrained(tmp_path / "run" / "export", device="cpu")
    x = torch.randn(8000) * 0.1
    y = enhancer(x, 16_000)
    assert y.shape == x.shape and (y - x).abs().max() > 1e-3
    assert torch.equal(y, enhancer(x, 16_000)) and not torch.equal(y, enhancer(x, 16_000, seed=1))


def test_recipe_starts_from_weights(small_corpus, tmp_path):
    arguments = {"preset": "test", "batch": 1, "seconds": 0.5, "rirs": 0, "device": "cpu", "validation_clips": 1}
    RECIPES["enhance"]([str(small_corpus)], str(tmp_path / "a"), steps=2, **arguments)
    RECIPES["enhance"](
        [str(small_corpus)], str(tmp_path / "b"), steps=1, start=str(tmp_path / "a" / "export"), lr=1e-9, **arguments
    )
    a, b = (Enhancer.from_pretrained(tmp_path / run / "export", device="cpu").net.state_dict() for run in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)


def test_settings_reach_the_training_and_the_record(small_corpus, tmp_path):
    """A mapping of loss weights, as the command line gives it, and the loop's settings; rooms are kept for later."""
    arguments = {"preset": "test", "batch": 1, "seconds": 0.5, "rirs": 2, "device": "cpu", "validation_clips": 2}
    result = RECIPES["enhance"](
        [str(small_corpus)],
        str(tmp_path / "run"),
        steps=4,
        loss={"loudness": 0.05, "at_prior": 1.0},
        final_lr_ratio=0.5,
        warmup_steps=0,
        ema_decay=0.9,
        validate_every=2,
        rooms_folder=str(tmp_path / "rooms"),
        **arguments,
    )
    training = json.loads((tmp_path / "run" / "export.json").read_text())["training"]
    assert training["loss"]["loudness"] == 0.05 and training["loss"]["spectra"] == LossWeights().spectra
    assert (training["final_lr_ratio"], training["warmup_steps"], training["ema_decay"]) == (0.5, 0, 0.9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "validate"] == [0, 2, 4]
    assert any("loudness" in row for row in rows if row["kind"] == "train")
    assert np.isfinite(result.metrics["loudness_mos_gain_1"])
    assert [path.name for path in (tmp_path / "rooms").iterdir()] == ["rooms-2-seed-0.npy"]


def test_unknown_loss_weight_is_named(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="loss: unknown key 'loudnes'"):
        RECIPES["enhance"]([str(small_corpus)], str(tmp_path), steps=1, loss={"loudnes": 1.0}, device="cpu")


def test_loss_weights_from_before_the_loudness_term_load():
    old = {"complex": 1.0, "magnitude": 1.0, "wave": 0.1, "spectra": 1.0, "snr_db": 0.005, "at_prior": 0.6}
    assert from_dict(LossWeights, old) == LossWeights(spectra=1.0, at_prior=0.6, loudness=0.0)


def test_pesq_gain_is_that_of_the_outputs(small_corpus, tmp_path):
    """A network that returns its input gains nothing."""
    pytest.importorskip("pesq")
    data = load_data([str(small_corpus)], torch.device("cpu"), rirs=0, validation_clips=2)
    config = PRESETS["test"]
    objective = EnhanceObjective(config, data, TRAIN_MIX, 1, 0, LossWeights())
    assert objective.pesq_gain(EnhanceNet(config), 1, 2) == pytest.approx(0.0, abs=0.02)

    class Answer(torch.nn.Module):
        def forward(self, x_t, y, t):
            level = level_of(data.noisy)
            return to_state(data.clean / level, config)

    assert objective.pesq_gain(Answer(), 1, 2) > 0.5


def test_compiled_model_is_one_graph_with_the_same_names():
    """No graph break, the same output and gradients, and checkpoints of the plain model's names."""
    net = EnhanceNet(PRESETS["test"]).to(memory_format=torch.channels_last)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    x, y, t = (torch.randn(shape, generator=rng) for shape in ((2, 7, 256, 2), (2, 7, 256, 2), (2,)))
    gradients = []
    for run in (net, compiled):
        net.zero_grad()
        run(x, y, t.abs()).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_arms_share_data_and_differ_in_one_thing(small_corpus, tmp_path):
    small = {"batch": 1, "seconds": 0.5, "rirs": 0, "device": "cpu", "validation_clips": 1}
    arms = dict.fromkeys(ARMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allears.recipes.enhance.PRESETS", {"base": PRESETS["test"], "tiny": PRESETS["test"]})
        results = train_arms([str(small_corpus)], str(tmp_path), steps=2, **small)
    assert list(results) == list(arms)
    records = {arm: json.loads((tmp_path / arm / "export.json").read_text()) for arm in arms}
    assert [record["config"]["prior"] for record in records.values()] == ["noisy", "gaussian", "noisy"]
    nets = [load_weights(tmp_path / arm / "export")[0] for arm in arms]
    assert all(torch.equal(nets[0][name], nets[2][name]) for name in nets[0])  # the same draws
    assert not torch.equal(nets[0]["leave.weight"], nets[1]["leave.weight"])


def test_unknown_arm_is_named(tmp_path):
    with pytest.raises(ValueError, match="arms: 'huge' is unknown; known are base-noisy"):
        train_arms([], str(tmp_path), arms=("huge",))
