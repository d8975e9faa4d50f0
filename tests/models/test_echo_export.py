"""The echo canceller's step with its state as inputs and outputs: names, real arithmetic, the ONNX file, its cost."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.echo_nets import ABLATIONS, SMALL, make
from tests.models.one_thread import one_thread  # noqa: F401

from allears.core.errors import MissingDependencyError
from allears.models.echo import EchoCanceller
from allears.models.echo.export import (
    TorchStep,
    _RealStep,
    check_onnx,
    export_onnx,
    fill_state,
    name_state,
    step_cost,
)
from allears.models.echo.model import EchoState
from allears.models.echo.runtime import OnnxNet, OnnxStep
from allears.models.echo.stream import EchoCore


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_state_goes_into_names_and_back(name):
    net = make(ABLATIONS[name])
    state = net.initial_state(2)
    named = name_state(state)
    assert {"signals", "tail", "levels", "gate", "stages_0_down_1", "stages_0_all_bands"} <= set(named)
    assert ("align_encode_0" in named) == net.config.alignment
    back = fill_state(state, {name: value + 1 for name, value in named.items()})
    assert isinstance(back, EchoState) and type(back.align) is type(state.align)
    for key, value in name_state(back).items():
        assert torch.equal(value, named[key] + 1)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_real_step_is_the_step(name):
    net = make(ABLATIONS[name])
    real, state = _RealStep(net).eval(), net.initial_state(1)
    tensors = list(name_state(state).values())
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(15):
            mic, reference = 0.1 * torch.randn(2, 1, SMALL.hop, generator=rng)
            near, heard, state = net.step(mic, reference, state)
            made = real(mic, reference, *tensors)
            told = [value for value in heard if value is not None]
            tensors = list(made[1 + len(told) :])
            np.testing.assert_allclose(made[0], near, rtol=1e-3, atol=1e-5)
            for ours, wanted in zip(made[1:], told, strict=False):
                np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)
    for ours, wanted in zip(tensors, name_state(state).values(), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnx", reason="export needs onnx: pip install 'allears[onnx]'")
    pytest.importorskip("onnxruntime", reason="running needs onnxruntime: pip install 'allears[onnx]'")
    net = make()
    return net, export_onnx(net, tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def between(exported, tmp_path_factory):
    """The file between spectra of the same network."""
    net, _ = exported
    return export_onnx(net, tmp_path_factory.mktemp("onnx") / "spectra.onnx", spectra=True)


def test_the_file_gives_what_pytorch_gives_hop_by_hop(exported):
    net, path = exported
    assert check_onnx(net, path, hops=60) < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]
    assert any("running_mean" in name for name in net.state_dict())


def test_the_file_names_its_state(exported):
    net, path = exported
    step = OnnxStep(path)
    initial = name_state(net.initial_state(1))
    assert set(step.state) == set(initial)
    for name, value in step.state.items():
        np.testing.assert_allclose(value, initial[name].numpy(), rtol=1e-6)
    hop = np.zeros(SMALL.hop, np.float32)
    assert step(hop, hop).shape == (SMALL.hop,)
    assert step.facts["alignment"].shape == (1, 12) and step.facts["voice"].shape == (1,)


def test_the_file_between_spectra_gives_what_pytorch_gives(exported, between):
    """Frame by frame, with the transforms around it; its state is the other file's but for what belongs to those."""
    net, path = exported
    assert check_onnx(net, between, hops=60) < 1e-4
    assert set(OnnxStep(path).state) - set(OnnxStep(between).state) == {"signals", "tail"}
    ours, theirs = OnnxStep(path), OnnxStep(between)
    for seed in range(12):
        mic, reference = (0.1 * np.random.default_rng(seed).standard_normal((2, SMALL.hop))).astype(np.float32)
        np.testing.assert_allclose(theirs(mic, reference), ours(mic, reference), atol=1e-5)
    with pytest.raises(ValueError, match=r"file: one from hops to hops given; one of export_onnx\(..., spectra=True\)"):
        OnnxNet(path, net.config)


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_onnx_is_pytorch_at_every_rate(exported, between, rate):
    net, _ = exported
    rng, told, wanted = np.random.default_rng(1), [], []
    both = (0.1 * rng.standard_normal((3, 3 * rate // 100 + 17))).astype(np.float32)  # two microphones
    near = []
    for network, facts in ((net, wanted), (OnnxNet(between, net.config), told)):
        core = EchoCore(network, 2, 1, facts.append, rate)
        near.append(np.concatenate([core.push(both[:, :301]), core.push(both[:, 301:]), core.flush()], axis=1))
    np.testing.assert_allclose(near[1], near[0], atol=1e-5)
    for name in ("delay_ms", "voice", "alignment"):
        got, right = (np.concatenate([getattr(f, name) for f in facts], axis=1) for facts in (told, wanted))
        np.testing.assert_allclose(got, right, atol=1e-4)


def test_another_networks_file_is_found_out(exported):
    _, path = exported
    other = make()
    with torch.no_grad():
        other.last.leave.twice.conv.bias.add_(0.1)
    assert check_onnx(other, path, hops=15) > 1e-2
    with pytest.raises(ValueError, match=r"tells \['alignment', 'voice'\] of a frame, wanted \['alignment'\]"):
        check_onnx(make(ABLATIONS["no-voice"]), path)


def test_a_network_without_all_that_can_be_left_out_is_exported(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = make(replace(SMALL, progressive=False, alignment=False, voice=False))
    path = export_onnx(net, tmp_path / "net.onnx")
    assert check_onnx(net, path, hops=20) < 1e-4
    assert not OnnxStep(path).facts and "align_keys" not in OnnxStep(path).state


def test_the_pipeline_runs_on_onnxruntime(exported, between, monkeypatch):
    """Two microphones, each with its own state, by one file; streams share it and do not meet."""
    net, _ = exported
    monkeypatch.setattr(
        "allears.models.echo.export.export_onnx", lambda _, to, spectra: to.write_bytes(between.read_bytes()) and to
    )
    ours, theirs = EchoCanceller(net, "cpu"), EchoCanceller(net, runtime="onnx")
    assert theirs.device.type == "cpu" and theirs.parameters == ours.parameters
    rng, told, wanted = np.random.default_rng(0), [], []
    mic, reference = (0.1 * rng.standard_normal((2, 2, 1000))).astype(np.float32)
    near = ours(mic, reference, 16_000, on_facts=wanted.append)
    np.testing.assert_allclose(theirs(mic, reference, 16_000, on_facts=told.append), near, atol=1e-5)
    for name in ("delay_ms", "confidence", "voice", "alignment"):
        got, right = (np.concatenate([getattr(f, name) for f in facts], axis=1) for facts in (told, wanted))
        np.testing.assert_allclose(got, right, atol=1e-4)
    one, other = theirs.stream(16_000), theirs.stream(16_000)
    parts = [
        (one.push(m[0], r[0]), other.push(m[1], r[1])) for m, r in zip(_pieces(mic), _pieces(reference), strict=True)
    ]
    for index, session in enumerate((one, other)):
        live = np.concatenate([*(part[index] for part in parts), session.flush()])
        np.testing.assert_allclose(live, near[index], atol=1e-5)


def _pieces(x):
    return np.split(x, [7, 300, 333, 800], axis=1)


def test_a_runtime_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="runtime: 'tensorrt' given; pytorch or onnx is wanted"):
        EchoCanceller(make(), "cpu", runtime="tensorrt")
    monkeypatch.setattr("allears.models.echo.pipeline.resolve_device", torch.device)
    with pytest.raises(ValueError, match="device: cuda given; the runtime onnx is for the CPU"):
        EchoCanceller(make(), "cuda", runtime="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"running an ONNX file needs the package 'onnxruntime'.*\[onnx\]"):
        EchoCanceller(make(), "cpu", runtime="onnx")


def test_the_network_of_the_pretraining_is_refused(tmp_path):
    with pytest.raises(ValueError, match="net: linear_input=True given"):
        export_onnx(make(replace(SMALL, linear_input=True)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_cost_is_that_of_the_hops(monkeypatch):
    """Hops that take 1 ms, but for one in fifty that takes 5 ms."""
    clock, calls = [0.0], [0]

    def run(mic, reference):
        assert mic.shape == reference.shape == (32,) and mic.dtype == np.float32
        clock[0] += 0.005 if calls[0] % 50 == 0 else 0.001
        calls[0] += 1
        return mic

    monkeypatch.setattr("allears.models.echo.export.time.perf_counter", lambda: clock[0])
    cost = step_cost(run, 32, 0.01, hops=200, warm_up=7)
    assert calls[0] == 207
    assert cost.mean_ms == pytest.approx(1.08) and cost.rtf == pytest.approx(0.108) and cost.p99_ms == pytest.approx(5)


def test_torch_step_runs_a_stream():
    net = make()
    step, state = TorchStep(net), net.initial_state(1)
    for seed in range(3):
        mic, reference = np.random.default_rng(seed).standard_normal((2, SMALL.hop)).astype(np.float32)
        with torch.no_grad():
            wanted, heard, state = net.step(torch.from_numpy(mic)[None], torch.from_numpy(reference)[None], state)
        np.testing.assert_allclose(step(mic, reference), wanted[0].numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(step.facts["voice"], heard.voice.numpy(), atol=1e-4)
