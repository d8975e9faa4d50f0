"""The echo canceller's network: size, level, steps, causality, gate, transfer, refusals.

Shapes: B batch, S samples, T frames.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import ABLATIONS, SMALL, make

from allears.models.echo.blocks import neighbours, weighted
from allears.models.echo.config import PRESETS, EchoConfig
from allears.models.echo.model import EchoNet, transfer_from_linear
from allears.nn.causal import fuse_norms

HOP = SMALL.hop


def signals(batch, samples, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(2, batch, samples, generator=rng)


@pytest.fixture(params=ABLATIONS)
def net(request):
    return make(ABLATIONS[request.param])


def test_base_has_at_most_the_promised_size():
    with torch.device("meta"):
        net = EchoNet(PRESETS["base"])
    assert 1.0e6 < sum(p.numel() for p in net.parameters()) <= 1.5e6
    assert PRESETS["base"].latency_ms == 20.0


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_untrained_network_returns_the_microphone(name):
    net = EchoNet(ABLATIONS[name]).eval()
    mic, reference = signals(2, 1000)
    out = net(mic, reference)
    for y in (out.near, *out.stages):
        torch.testing.assert_close(y, mic, rtol=1e-4, atol=1e-5)
    assert len(out.stages) == (1 if name == "one-stage" else 2)


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 1000])
def test_any_length_comes_back(net, samples):
    mic, reference = signals(2, samples)
    with torch.no_grad():
        out = net(mic, reference)
    frames = -(-samples // HOP) + 1
    assert out.near.shape == mic.shape and all(stage.shape == mic.shape for stage in out.stages)
    assert (out.alignment is None) == (not net.config.alignment)
    assert out.alignment is None or out.alignment.shape == (2, frames, 12)
    assert (out.voice is None) == (not net.config.voice)
    assert out.voice is None or out.voice.shape == (2, frames)
    assert out.near.isfinite().all() and (out.near - mic).abs().max() > 1e-3
    gated = net.config.voice and net.config.voice_gate
    assert gated or out.near is out.stages[-1]


def test_the_filter_is_a_complex_sum_over_the_neighbours():
    spectrum = torch.randn(2, 5, 7, dtype=torch.complex64)
    taps = torch.randn(2, 9, 5, 7, dtype=torch.complex64)
    wide = torch.nn.functional.pad(torch.view_as_real(spectrum), (0, 0, 1, 1, 2, 0))
    wide, wanted = torch.view_as_complex(wide), torch.zeros_like(spectrum)
    for i in range(3):
        for j in range(3):
            wanted += taps[:, 3 * i + j] * wide[:, i : i + 5, j : j + 7]
    parts = torch.view_as_real(spectrum).movedim(-1, 1)
    near, past = neighbours(parts, torch.zeros(2, 2, 2, 7))
    out = weighted(torch.view_as_real(taps).movedim(-1, 1), near)
    torch.testing.assert_close(torch.complex(out[:, 0], out[:, 1]), wanted)
    assert torch.equal(past, parts[:, :, 3:])
    first, past = neighbours(parts[:, :, :2], torch.zeros(2, 2, 2, 7))
    second, _ = neighbours(parts[:, :, 2:], past)
    assert torch.equal(torch.cat([first, second], dim=3), near)


def test_features_are_compressed_at_the_recent_peak():
    """With |X|^0.3 and its phase over the loudest frame so far, which is forgotten by 6 dB a second."""
    net = EchoNet(replace(SMALL, n_fft=320, hop=160))
    loud = torch.tensor([1.0, 10.0, 1.0, 1.0])
    spectrum = loud[:, None] * torch.polar(torch.rand(1, 1, 161) + 0.5, 6.0 * torch.rand(1, 1, 161))
    both = torch.stack([spectrum, spectrum], dim=1)
    spectra = torch.view_as_real(both).movedim(-1, 2)
    features, _, _ = net._features(spectra, torch.full((1, 2), -50.0))
    level = spectrum.abs().square().mean(-1).sqrt()[0]
    peak = torch.stack([level[0], level[1], level[1] * 10 ** (-0.06 / 20), level[1] * 10 ** (-0.12 / 20)])
    scaled = spectrum[0] / peak[:, None]
    size = scaled.abs() ** 0.3
    turned = scaled / scaled.abs() * size
    wanted = torch.stack([turned.real, turned.imag, size])
    torch.testing.assert_close(features[0, 1], wanted, rtol=1e-3, atol=1e-3)


def in_steps(net, mic, reference, sizes):
    """Hops, so many at once, to the near end and what is heard, in time with the input."""
    batch, samples = mic.shape
    rest = (-samples) % HOP + HOP
    mic, reference = (torch.nn.functional.pad(x, (0, rest)) for x in (mic, reference))
    state, near, alignment, voice = net.initial_state(batch), [], [], []
    for m, r in zip(mic.split([HOP * s for s in sizes], 1), reference.split([HOP * s for s in sizes], 1), strict=True):
        before = [x.clone() for x in (state.signals, state.tail, state.levels, state.gate)]
        y, heard, following = net.advance(m, r, state)
        for kept, now in zip(before, (state.signals, state.tail, state.levels, state.gate), strict=True):
            assert torch.equal(kept, now)  # a state is a value
        state = following
        near.append(y)
        alignment.append(heard.alignment)
        voice.append(heard.voice)
    near = torch.cat(near, dim=1)[:, HOP : HOP + samples]
    return near, *(None if x[0] is None else torch.cat(x, dim=1) for x in (alignment, voice))


def check_steps(net, samples, sizes):
    mic, reference = signals(2, samples, seed=samples)
    mic[:, samples // 2 :] *= 0.01
    with torch.no_grad():
        out = net(mic, reference)
        near, alignment, voice = in_steps(net, mic, reference, sizes)
    torch.testing.assert_close(near, out.near, rtol=1e-3, atol=1e-4 * float(out.near.abs().max()))
    for ours, whole in ((alignment, out.alignment), (voice, out.voice)):
        if whole is not None:
            torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)


def test_steps_give_what_the_whole_gives(net):
    check_steps(net, 700, [1] * 23)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, HOP - 1))
def test_any_number_of_hops_at_once(sizes, short):
    if (hops := sum(sizes)) > 1:
        check_steps(make(), max(1, (hops - 1) * HOP - short), sizes)


def test_step_is_advance_by_one():
    net = make()
    mic, reference = signals(3, HOP)
    with torch.no_grad():
        near, heard, _ = net.step(mic, reference, net.initial_state(3))
        wanted, told, _ = net.advance(mic, reference, net.initial_state(3))
    assert torch.equal(near, wanted) and near.shape == (3, HOP)
    assert torch.equal(heard.alignment, told.alignment[:, 0]) and heard.voice.shape == (3,)


def test_no_sample_hears_more_than_a_frame_ahead(net):
    mic, reference = signals(1, 1000)
    for cut in (500, 511, 512):
        later = torch.stack([mic, reference])
        later[..., cut:] += 1.0
        with torch.no_grad():
            y, changed = net(mic, reference).near, net(*later).near
        assert torch.equal(y[:, : cut - 2 * HOP + 1], changed[:, : cut - 2 * HOP + 1])
        assert (y - changed)[:, cut:].abs().max() > 1e-3


def test_louder_in_is_louder_out(net):
    mic, reference = signals(1, 900)
    with torch.no_grad():
        y = net(mic, reference).near
        for gain, played in ((0.01, 1.0), (8.0, 0.02), (1.0, 5.0)):
            out = net(gain * mic, played * reference).near / gain
            torch.testing.assert_close(out, y, rtol=1e-2, atol=2e-3 * float(y.abs().max()))


def test_the_reference_matters(net):
    mic, reference = signals(1, 900)
    with torch.no_grad():
        change = net(mic, reference).near - net(mic, torch.zeros_like(reference)).near
    assert change.abs().max() > 1e-3


def test_entries_do_not_meet(net):
    mic, reference = signals(3, 600)
    mic[1] *= 30
    with torch.no_grad():
        together = net(mic, reference).near
        for b in range(3):
            alone = net(mic[b : b + 1], reference[b : b + 1]).near
            # Rounding follows the batch on some processors; it is relative to how loud an entry is.
            torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=5e-5 * float(alone.abs().max()))


def test_all_learn_also_from_silence(net):
    net.train()
    mic, reference = signals(2, 900)
    out = net(mic, reference)
    loss = sum(y.square().mean() for y in (out.near, *out.stages))
    loss = loss + (0 if out.alignment is None else out.alignment[..., 3].log().mean())
    (loss + (0 if out.voice is None else out.voice.mean())).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name == "align.compare.conv.bias", name
    net.zero_grad()
    net(torch.zeros(2, 300), torch.zeros(2, 300)).near.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_autocast_stays_close_and_gives_float32(net):
    mic, reference = signals(1, 900)
    with torch.no_grad():
        wanted = net(mic, reference)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(mic, reference)
    assert out.near.dtype == torch.float32
    assert (out.stages[-1] - wanted.stages[-1]).norm() < 0.1 * wanted.stages[-1].norm()


def test_fused_norms_change_nothing(net):
    mic, reference = signals(1, 500)
    with torch.no_grad():
        wanted = net(mic, reference)
        fuse_norms(net)
        torch.testing.assert_close(net(mic, reference), wanted, rtol=1e-3, atol=1e-4)
    assert not any("running_mean" in name for name in net.state_dict())


def test_the_gate_opens_at_once_holds_and_closes_slowly():
    net = EchoNet(replace(SMALL, hop=160, n_fft=320, gate_hold_s=0.03, gate_release_db_per_s=500.0))
    logits = torch.full((1, 30), -8.0)
    logits[0, 14] = 8.0
    gain, _ = net._gate(logits, torch.full((1,), -100.0))
    level = (20 * gain[0].log10()).tolist()
    assert level[:14] == pytest.approx([-40.0] * 14, abs=1e-3)
    assert level[14:18] == pytest.approx([0.0] * 4, abs=1e-3)  # the frame itself, and 30 ms
    assert level[18:25] == pytest.approx([-5, -10, -15, -20, -25, -30, -35], abs=1e-3)
    assert level[26:] == pytest.approx([-40.0] * 4, abs=1e-3)


def test_a_closed_gate_is_quiet_and_an_open_one_changes_nothing():
    mic, reference = signals(1, 16_000)
    net = EchoNet(SMALL).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(mic, reference).near, mic, rtol=1e-4, atol=1e-5)
        net.voice.bias.fill_(-9.0)
        torch.testing.assert_close(net(mic, reference).near[:, 8000:], 0.01 * mic[:, 8000:], rtol=1e-3, atol=1e-6)
        ungated = EchoNet(replace(SMALL, voice_gate=False)).eval()
        ungated.load_state_dict(net.state_dict())
        torch.testing.assert_close(ungated(mic, reference).near, mic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("progressive", [True, False])
def test_the_linear_output_stands_where_the_first_stage_was(progressive):
    config = replace(SMALL, progressive=progressive, linear_input=True)
    mic, reference = signals(2, 500)
    linear = signals(2, 500, seed=5)[0]
    torch.testing.assert_close(EchoNet(config).eval()(mic, reference, linear).near, linear, rtol=1e-4, atol=1e-5)
    net = make(config)
    with torch.no_grad():
        assert (net(mic, reference, linear).near - net(mic, reference, mic).near).abs().max() > 1e-3


def test_transfer_takes_every_weight():
    given = make(replace(SMALL, linear_input=True), seed=1)
    net = make(SMALL, seed=2)
    copied, kept = transfer_from_linear(net, given.state_dict())
    assert kept == [] and len(copied) == len(net.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(value, given.state_dict()[name]), name
    plain = make(replace(SMALL, linear_input=True, voice=False, hidden=13), seed=1)
    net = make(SMALL, seed=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    copied, kept = transfer_from_linear(net, plain.state_dict())
    assert {"voice.weight", "last.core.all_bands.weight_hh_l0"} <= set(kept)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in kept)
    assert torch.equal(net.align.log_rate, plain.align.log_rate)
    with pytest.raises(ValueError, match="tensors: none of 1 has a name and shape"):
        transfer_from_linear(net, {"x": torch.zeros(1)})


def test_ablations_are_other_networks():
    mic, reference = signals(1, 700)
    with torch.no_grad():
        outs = [make(config)(mic, reference).near for name, config in ABLATIONS.items() if name != "no-gate"]
    assert min(float((a - b).abs().max()) for i, a in enumerate(outs) for b in outs[:i]) > 1e-4


def test_bad_calls_are_refused():
    net = make()
    x = torch.zeros(1, 64)
    for mic, reference in ((x[0], x[0]), (x, x[:, :5]), (x, torch.zeros(2, 64)), (x[:, :0], x[:, :0])):
        with pytest.raises(ValueError, match="mic, reference: shapes"):
            net(mic, reference)
    with pytest.raises(ValueError, match="a whole number of hops of 32 samples"):
        net.step(x[:, :33], x[:, :33], net.initial_state(1))
    with pytest.raises(ValueError, match=r"linear: \(1, 64\) given, None wanted with linear_input=False"):
        net(x, x, x)
    with pytest.raises(ValueError, match=r"linear: None given, \(1, 64\) wanted"):
        make(replace(SMALL, linear_input=True))(x, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_fft": 320, "hop": 100}, "n_fft, hop: 320, 100 given"),
        ({"n_fft": 328, "hop": 164}, "a multiple of 16"),
        ({"align_frames": 1}, "align_frames: 1 given"),
        ({"gate_floor_db": 3.0}, "gate_floor_db, gate_hold_s"),
        ({"gate_release_db_per_s": 0.0}, "gate_release_db_per_s"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EchoConfig(), **change)
