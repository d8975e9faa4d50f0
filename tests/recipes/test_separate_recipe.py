"""Training of the separator from a small corpus to weights that load."""

import json

import numpy as np
import pytest
import torch

from allears.data.talkers import TalkersConfig
from allears.models.separate import Separator
from allears.models.separate.loss import si_snr_improvement_db
from allears.models.separate.model import SeparateNet, export_state
from allears.recipes import RECIPES
from allears.recipes.separate import CLEAN_MIX, SeparateObjective, WithAuxiliary
from allears.recipes.separate_ablation import ARMS, train_arms
from allears.recipes.separate_data import load_data, to_rate
from allears.train.ahead import Ahead
from allears.train.graphs import graphed

SMALL = {"preset": "test", "batch": 1, "seconds": 0.2, "rirs": 0, "device": "cpu", "validation_clips": 2}


def test_recipe_trains_saves_and_loads(small_corpus, tmp_path):
    result = RECIPES["separate"]([str(small_corpus)], str(tmp_path / "run"), steps=3, **SMALL)
    assert result.step == 3 and result.stop == "steps" and np.isfinite(result.metrics["si_snri_db"])
    record = json.loads((tmp_path / "run" / "export.json").read_text())
    assert record["training"]["speakers"] == 2 and record["training"]["licences"] == ["CC0"]
    assert record["training"]["loss"]["measure"] == "si_snr" and record["training"]["auxiliary_heads"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("auxiliary" in row for row in rows if row["kind"] == "train")
    separator = Separator.from_pretrained(tmp_path / "run" / "export", device="cpu")
    separated = separator(0.1 * torch.randn(4000), 16_000)
    assert separated.talkers.shape == (2, 4000) and float(separated.talkers.abs().max()) > 1e-4


def test_recipe_starts_from_weights_without_auxiliary_heads(small_corpus, tmp_path):
    RECIPES["separate"]([str(small_corpus)], str(tmp_path / "a"), steps=1, **SMALL)
    start = str(tmp_path / "a" / "export")
    RECIPES["separate"]([str(small_corpus)], str(tmp_path / "b"), steps=1, start=start, lr=1e-9, **SMALL)
    a, b = (Separator.from_pretrained(tmp_path / run / "export", device="cpu").net.state_dict() for run in "ab")
    for name in a:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)
    with pytest.raises((ValueError, RuntimeError)):
        other = SMALL | {"preset": "talkers-16k"}
        RECIPES["separate"]([str(small_corpus)], str(tmp_path / "c"), steps=1, start=start, **other)


def test_the_loss_falls_and_draws_follow_the_step(small_corpus):
    mix = TalkersConfig(**{**vars(CLEAN_MIX), "seconds": 0.25})
    data = load_data([str(small_corpus)], torch.device("cpu"), mix, 16_000, 2, validation_clips=2)
    from allears.models.separate.config import PRESETS
    from allears.models.separate.loss import SeparateLoss

    torch.manual_seed(0)
    net = WithAuxiliary(SeparateNet(PRESETS["test"], aux_heads=True), True)
    objectives = [SeparateObjective(PRESETS["test"], data, mix, 2, 5, SeparateLoss(), 100) for _ in range(2)]
    generator = torch.Generator()
    first, second = (objective.loss(net.train(), 3, generator)[0] for objective in objectives)
    net.eval()
    assert float(first.detach()) == pytest.approx(float(second.detach()), abs=3.0)  # dropout differs, the draws do not
    again = [objective._ahead.take(7) for objective in objectives]
    assert again[0] == again[1] and objectives[0]._ahead.take(8) != again[0]
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        objectives[0]._ahead = Ahead(objectives[0]._draw)  # the same batch each time
        loss, _ = objectives[0].loss(net.train(), 0, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    scores = objectives[0].validate(net.eval())
    gains = si_snr_improvement_db(net(data.mixture)[0], data.sources, data.mixture)
    assert scores["si_snri_db"] == pytest.approx(float(gains.mean()), abs=1e-4)


def test_batches_rendered_together_are_those_of_their_steps(small_corpus):
    """Two steps share one rendering; a run that begins between them gets the same second half."""
    from allears.models.separate.config import PRESETS
    from allears.models.separate.loss import SeparateLoss

    mix = TalkersConfig(**{**vars(CLEAN_MIX), "seconds": 0.25})
    data = load_data([str(small_corpus)], torch.device("cpu"), mix, 16_000, 2, validation_clips=2)

    def objective(batch, together):
        return SeparateObjective(PRESETS["test"], data, mix, batch, 5, SeparateLoss(), 100, together=together)

    at_once, whole = objective(2, 2), objective(4, 1)
    parts = [at_once.batch_of(step) for step in (2, 3, 4)]
    wanted = whole.batch_of(1)
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts[:2]]), wanted[place])
    assert parts[0][0].shape == (2, 4000) and not torch.equal(parts[2][0], parts[0][0])
    resumed = objective(2, 2).batch_of(3)
    assert torch.equal(resumed[0], parts[1][0]) and torch.equal(resumed[1], parts[1][1])


def test_silent_outputs_take_the_room_mixtures(small_corpus, tmp_path):
    settings = SMALL | {"preset": "test", "rirs": 2}
    RECIPES["separate"](
        [str(small_corpus)],
        str(tmp_path / "run"),
        steps=1,
        mix={"noisy": 1.0, "reverberant": 1.0, "talkers": [[1, 0.5], [2, 0.5]]},
        loss={"measure": "snr"},
        rooms_folder=str(tmp_path / "rooms"),
        **settings,
    )
    training = json.loads((tmp_path / "run" / "export.json").read_text())["training"]
    assert training["rooms"] == 2 and training["noise_hours"] >= 0 and training["loss"]["measure"] == "snr"
    assert training["mix"]["noisy"] == 1.0 and training["mix"]["rirs"] == 2
    assert len(list((tmp_path / "rooms").iterdir())) == 1


def test_arms_share_the_data(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "sepreformer-t", "test")
    results = train_arms(
        [str(small_corpus)],
        str(tmp_path),
        steps=1,
        device="cpu",
        validation_clips=2,
        arms=("sepreformer-t",),
        batch=1,
        seconds=0.3,
    )
    assert results["sepreformer-t"].step == 1 and (tmp_path / "sepreformer-t" / "export.json").is_file()
    with pytest.raises(ValueError, match="arms: 'sepformer'"):
        train_arms([str(small_corpus)], str(tmp_path), arms=("sepformer",))


def test_half_rate_keeps_what_is_below_it():
    time = torch.arange(16_000).double() / 16_000
    low, high = (torch.sin(2 * torch.pi * hertz * time).float() for hertz in (1000, 6000))
    half = to_rate(low + high, 8_000)
    assert half.shape == (8_000,)
    torch.testing.assert_close(half[200:-200], low[::2][200:-200], atol=1e-3, rtol=0)
    assert to_rate(low, 16_000) is low and to_rate(low[:333], 8_000).shape == (167,)


def test_export_has_no_auxiliary_heads():
    from allears.models.separate.config import PRESETS

    net = SeparateNet(PRESETS["test"], aux_heads=True)
    assert set(export_state(net)) == set(SeparateNet(PRESETS["test"]).state_dict())


def test_unknown_names_are_told(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="preset: 'big'"):
        RECIPES["separate"]([str(small_corpus)], str(tmp_path), preset="big")
    with pytest.raises(ValueError, match="mix: unknown key 'noise'"):
        RECIPES["separate"]([str(small_corpus)], str(tmp_path), mix={"noise": 1.0}, **SMALL)
    with pytest.raises(ValueError, match="sample_rate_hz: 44100"):
        load_data([str(small_corpus)], torch.device("cpu"), CLEAN_MIX, 44_100, 2)


def test_graphs_want_a_gpu():
    with pytest.raises(ValueError, match="samples: on cpu"):
        graphed(torch.nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.gpu
def test_graphs_give_the_same_gradients():
    from allears.models.separate.config import PRESETS

    torch.manual_seed(0)
    net = WithAuxiliary(SeparateNet(PRESETS["test"], aux_heads=True), True).cuda().train()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    x = torch.randn(2, 8000, device="cuda")

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        out, heads = net(x)
        (out.square().mean() + sum(head.square().mean() for head in heads)).backward()
        return [p.grad.clone() for p in net.parameters()]

    wanted = gradients()
    graphed(net, x)
    for a, b in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
