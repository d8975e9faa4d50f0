"""The separator's network as a whole, in both families: sizes, level, length, silence, entries, fingerprints, state.

Shapes: B batch, J talkers, S samples.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from allears.models.separate.config import PRESETS, LocoformerSize, SeparateConfig, SepReformerSize
from allears.models.separate.model import SeparateNet, export_state, weighted_print

SMALL = SepReformerSize(16, 2, features=24, heads=2, max_distance=9)
SMALL_TF = LocoformerSize(8, 1, hidden=6, kernel=4, heads=2, groups=2, n_fft=16, hop=8)
CONFIGS = {
    **{a: SeparateConfig(sepreformer=SMALL, attention=a) for a in ("published", "optimised", "fla")},
    "three": SeparateConfig(sepreformer=SMALL, talkers=3),
    "plain": SeparateConfig(sepreformer=SMALL, power=1, conv_taps=0, gated=False),
    **{f"tf-{a}": SeparateConfig(locoformer=SMALL_TF, attention=a) for a in ("published", "optimised", "fla")},
    "tf-plain": SeparateConfig(locoformer=SMALL_TF, gated=False, talkers=3),
}


def make(config, aux_heads=False, seed=0):
    """A network for evaluation whose weights are moved, so that no branch of it is all but zero."""
    torch.manual_seed(seed)
    net = SeparateNet(config, aux_heads)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.add_(
                    0.2 * torch.randn(value.shape).abs() if "running_var" in name else 0.2 * torch.randn_like(value)
                )
    return net.eval()


@pytest.fixture(params=CONFIGS)
def net(request):
    return make(CONFIGS[request.param])


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("sepreformer-t", 3.71),
        ("sepreformer-b", 14.15),
        ("sepreformer-l", 55.22),
        ("sepreformer-l-optimised", 55.22),
        ("locoformer-m", 14.98),
        ("locoformer-s", 5.03),
        ("fla-sepreformer-t", 3.68),
        ("fla-sepreformer-b", 14.09),
        ("fla-locoformer-m", 15.08),
    ],
)
def test_sizes_are_the_published_ones(name, millions):
    """SepReformer: 3.71, 14.15 and 55.22 M without the auxiliary heads; TF-Locoformer M: 15.0 M; FLA-TFLocoformer M:
    15.1 M; FLA-SepReformer B: 14.2 M as published, whose code keeps the table of positions."""
    with torch.device("meta"):
        net = SeparateNet(PRESETS[name])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


def test_every_preset_can_be_built():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            assert SeparateNet(config).config == config, name


@pytest.mark.parametrize("samples", [1, 15, 16, 63, 1000])
def test_any_length_comes_back(net, samples):
    mixture = torch.randn(2, samples)
    with torch.no_grad():
        out = net(mixture)
    assert out.shape == (2, net.config.talkers, samples) and out.dtype == torch.float32
    assert out.isfinite().all() and out.abs().amax(-1).min() > 1e-3
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3


def test_louder_in_is_louder_out(net):
    mixture = torch.randn(1, 500)
    with torch.no_grad():
        out = net(mixture)
        for gain in (1e-4, 0.1, 30.0):
            torch.testing.assert_close(net(gain * mixture) / gain, out, rtol=1e-3, atol=1e-3 * float(out.abs().max()))


def test_silence_is_silent_and_has_no_fingerprint(net):
    with torch.no_grad():
        out, prints = net.fingerprints(torch.zeros(1, 200))
    assert out.eq(0).all() and prints.isfinite().all()
    net.zero_grad()
    net(torch.zeros(1, 200)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_entries_do_not_meet(net):
    mixture = torch.randn(3, 333)
    mixture[1] *= 50
    with torch.no_grad():
        together, alone = net(mixture), torch.cat([net(one[None]) for one in mixture])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def test_slices_change_nothing(net, monkeypatch):
    mixture = torch.randn(1, 1200)
    with torch.no_grad():
        whole = net(mixture)
        monkeypatch.setitem(__import__("allears.nn.slices").nn.slices.SLICE_BYTES, "cpu", 1)
        torch.testing.assert_close(net(mixture), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_all_learn(net):
    net.train()
    net(torch.randn(2, 400)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k.bias"), name  # softmax does not see a key's bias


def test_autocast_stays_close_and_gives_float32(net):
    mixture = torch.randn(1, 400)
    with torch.no_grad():
        wanted = net(mixture)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(mixture)
    assert out.dtype == torch.float32
    assert (out - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("name", ["optimised", "fla", "tf-fla"])
def test_one_graph(name):
    """torch.compile finds no break and no read-back; the kernels that it would make are left to the test on a GPU."""
    config = CONFIGS[name]
    config = replace(config, sepreformer=replace(SMALL, stages=1)) if config.sepreformer is not None else config
    net, mixture = make(config), torch.randn(1, 300)
    torch.compiler.reset()
    with torch.no_grad():
        wanted = net(mixture)
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(mixture), wanted)


def test_fingerprints_follow_the_talkers():
    """Their outputs swapped, the prints are swapped; the level plays no part; they have unit length."""
    net, mixture = make(CONFIGS["fla"]), torch.randn(2, 800)
    with torch.no_grad():
        out, prints = net.fingerprints(mixture)
        torch.testing.assert_close(out, net(mixture))
        torch.testing.assert_close(prints.norm(dim=-1), torch.ones(2, 2))
        torch.testing.assert_close(net.fingerprints(3 * mixture)[1], prints, rtol=1e-3, atol=1e-4)
        swap_talkers(net)
        swapped, of_swapped = net.fingerprints(mixture)
    torch.testing.assert_close(swapped, out.flip(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_swapped, prints.flip(1), rtol=1e-3, atol=1e-4)
    assert (prints[:, 0] - prints[:, 1]).abs().max() > 1e-3


def swap_talkers(net):
    """Turns round the channels of the split into talkers, behind which all weights are shared by them."""
    layer = net.core.split.narrow
    for value in (layer.weight, layer.bias):
        value.copy_(value.unflatten(0, (net.config.talkers, -1)).flip(0).flatten(0, 1))


def test_weighted_print_is_mean_and_deviation_where_there_is_energy():
    features, energy = torch.randn(1, 1, 50, 3), torch.zeros(1, 2, 50)
    energy[0, 0, 10:20] = 2.5
    prints = weighted_print(features, energy)
    part = features[0, 0, 10:20]
    wanted = torch.cat([part.mean(0), part.std(0, correction=0)])
    torch.testing.assert_close(prints[0, 0], wanted / wanted.norm())
    assert prints[0, 1].eq(0).all()


def test_auxiliary_outputs_have_the_mixtures_level_and_are_not_shipped():
    net = make(CONFIGS["fla"], aux_heads=True)
    mixture = torch.randn(2, 777)
    with torch.no_grad():
        out, stages = net.with_auxiliary(mixture)
        torch.testing.assert_close(out, net(mixture))
        louder = net.with_auxiliary(10 * mixture)[1]
    assert [stage.shape for stage in stages] == [(2, 2, 777)] * 2
    for stage, loud in zip(stages, louder, strict=True):
        torch.testing.assert_close(loud / 10, stage, rtol=1e-3, atol=1e-3)
        assert (stage - out).abs().max() > 1e-3 and (stage[:, 0] - stage[:, 1]).abs().max() > 1e-3
    state = export_state(net)
    plain = SeparateNet(net.config)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(mixture), out)
    assert len(net.state_dict()) > len(state)


def test_bad_calls_are_refused():
    net = make(CONFIGS["fla"])
    for mixture in (torch.zeros(5), torch.zeros(1, 2, 5), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="mixture: shape"):
            net(mixture)
    with pytest.raises(ValueError, match="build it with aux_heads=True"):
        net.with_auxiliary(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="aux_heads: True given for TF-Locoformer"):
        SeparateNet(CONFIGS["tf-fla"], aux_heads=True)


def test_ablations_are_other_networks():
    mixture, outs = torch.randn(1, 300), []
    for change in ({}, {"power": 1}, {"conv_taps": 0}, {"gated": False}):
        with torch.no_grad():
            outs.append(make(replace(CONFIGS["fla"], **change))(mixture))
    assert min(float((a - b).abs().max()) for i, a in enumerate(outs) for b in outs[:i]) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_gpu_gives_what_the_cpu_gives(name):
    net, mixture = make(CONFIGS[name]), torch.randn(2, 12_345)
    with torch.no_grad():
        wanted = net(mixture)
        out = net.cuda()(mixture.cuda()).cpu()
        assert (out - wanted).norm() < 1e-3 * wanted.norm()
        with torch.autocast("cuda", torch.bfloat16):
            assert (net(mixture.cuda()).cpu() - wanted).norm() < 0.1 * wanted.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, fullgraph=True)
        assert (compiled(mixture.cuda()).detach().cpu() - wanted).norm() < 1e-3 * wanted.norm()
