"""The echo canceller's step with its state as inputs and outputs: names, real arithmetic, the ONNX file, its cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.echo_nets import ABLATIONS, SMALL, make

from allears.models.echo.export import (
    OnnxStep,
    TorchStep,
    _RealStep,
    check_onnx,
    export_onnx,
    fill_state,
    name_state,
    step_cost,
)
from allears.models.echo.model import EchoState


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
        for _ in range(30):
            mic, reference = 0.1 * torch.randn(2, 1, SMALL.hop, generator=rng)
            near, heard, state = net.step(mic, reference, state)
            made = real(mic, reference, *tensors)
            told = [value for value in heard if value is not None]
            tensors = list(made[1 + len(told) :])
            torch.testing.assert_close(made[0], near, rtol=1e-3, atol=1e-5)
            for ours, wanted in zip(made[1:], told, strict=False):
                torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
    for ours, wanted in zip(tensors, name_state(state).values(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnx", reason="export needs onnx: pip install 'allears[onnx]'")
    pytest.importorskip("onnxruntime", reason="running needs onnxruntime: pip install 'allears[onnx]'")
    net = make()
    return net, export_onnx(net, tmp_path_factory.mktemp("onnx") / "net.onnx")


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


def test_another_networks_file_is_found_out(exported):
    _, path = exported
    other = make()
    with torch.no_grad():
        other.last.leave.twice.conv.bias.add_(0.1)
    assert check_onnx(other, path) > 1e-2
    with pytest.raises(ValueError, match=r"tells \['alignment', 'voice'\] of a frame, wanted \['alignment'\]"):
        check_onnx(make(ABLATIONS["no-voice"]), path)


@pytest.mark.parametrize("name", ["one-stage", "unaligned", "no-gate"])
def test_ablations_can_be_exported(tmp_path, name):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = make(ABLATIONS[name])
    assert check_onnx(net, export_onnx(net, tmp_path / "net.onnx"), hops=20) < 1e-4


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
