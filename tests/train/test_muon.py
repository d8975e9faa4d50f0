import pytest
import torch
from tiny_objective import TinyObjective
from torch import nn

from allears.train import TrainConfig, train
from allears.train.muon import MuonAdamW, is_matrix, matrices, orthogonalised


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 17, 64), (2, 64, 17)])
def test_singular_values_are_brought_to_about_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    u, before, v = torch.linalg.svd(x, full_matrices=False)
    after = orthogonalised(x)
    large = before > 0.05 * before.amax(-1, keepdim=True)  # five iterations lift what is not tiny
    assert ((torch.linalg.svdvals(after) - 1).abs()[large] < 0.4).all()
    middle = u.mT @ after @ v.mT  # the singular vectors stay
    off = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.03 and (middle.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_which_parameters_are_matrices():
    model = nn.ModuleDict(
        {
            "hidden": nn.Linear(16, 32),
            "narrow": nn.Linear(8, 32),
            "conv": nn.Conv1d(8, 32, 3),
            "depthwise": nn.Conv1d(32, 32, 31, groups=32),
            "last": nn.Linear(32, 32),
        }
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in matrices(model, ("last",))] == ["hidden.weight", "conv.weight"]
    assert not is_matrix(torch.zeros(64))


def test_first_step_is_the_orthogonal_update_at_the_size_of_adamw():
    weight = nn.Parameter(torch.randn(16, 48, generator=torch.Generator().manual_seed(0)))
    bias = nn.Parameter(torch.ones(16))
    before = weight.detach().clone()
    optimizer = MuonAdamW(
        [{"params": [bias], "weight_decay": 0.0}, {"params": [weight], "weight_decay": 0.5, "muon": True}], lr=0.01
    )
    weight.grad = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    bias.grad = torch.linspace(-1, 1, 16)
    wanted = before - 0.01 * 0.5 * before - 0.01 * 0.2 * 48**0.5 * orthogonalised(weight.grad[None])[0]
    optimizer.step()
    moved = (wanted - before).norm()
    assert (weight - wanted).norm() < 0.03 * moved  # bfloat16 within
    change = weight.detach() - before * (1 - 0.005)
    assert 0.6 < change.square().mean().sqrt() / (0.2 * 0.01) < 1.2  # root mean square of AdamW's updates
    assert torch.allclose(bias, 1 - 0.01 * bias.grad.sign(), atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    model = _network()
    by_muon = matrices(model)
    rest = [p for p in model.parameters() if all(p is not q for q in by_muon)]
    optimizer = MuonAdamW([{"params": rest}, {"params": by_muon, "muon": True}], lr=0.01)
    for value in (1.0, float("nan")):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        averages = {p: s["momentum"].clone() for p, s in optimizer.state.items() if "momentum" in s}
        optimizer.found_inf = torch.tensor(float(value != value))
        optimizer.step()
    assert len(averages) == 1
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["momentum"], value) for p, value in averages.items())


def test_a_run_learns_and_resumes_where_it_was(tmp_path):
    def config(name: str, steps: int) -> TrainConfig:
        return TrainConfig(
            out=str(tmp_path / name), steps=steps, lr=0.02, optimizer="muon", device="cpu", precision="fp32",
            warmup_steps=2, log_every=5, validate_every=100, final_lr_ratio=1.0,
        )  # fmt: skip

    class Cut(Exception):
        pass

    def cut(step: int) -> None:
        if step == 7:
            raise Cut

    assert train(_network(), TinyObjective(), config("learns", 60)).metrics["error"] < 0.2
    whole, cut_short, resumed = _network(), _network(), _network()
    train(whole, TinyObjective(), config("whole", 12))
    short = TrainConfig(**{**config("two", 12).__dict__, "save_every_minutes": 0.0})
    with pytest.raises(Cut):
        train(cut_short, TinyObjective(at_step=cut), short)
    train(resumed, TinyObjective(), short)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-4), name


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: got 'sgd'"):
        TrainConfig(out="x", steps=1, optimizer="sgd")
