"""The separator as an ONNX file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allears.models.separate.config import LocoformerSize, SeparateConfig, SepReformerSize
from allears.models.separate.export import INPUT, OUTPUT, check_onnx, export_onnx
from allears.models.separate.locoformer import Locoformer
from allears.models.separate.model import SeparateNet

SMALL = SepReformerSize(8, 1, kernel=8, stride=2, features=12, heads=2, max_distance=20)
BINS = LocoformerSize(8, 1, hidden=6, heads=2, groups=2, n_fft=16, hop=8)
BANDS = replace(BINS, bands=((3, 1), (3, 2)))


def make(**how) -> SeparateNet:
    torch.manual_seed(0)
    net = SeparateNet(SeparateConfig(sepreformer=SMALL, **how), aux_heads=True).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SeparateNet, Path]:
    pytest.importorskip("onnx", reason="export needs onnx: pip install 'allears[onnx]'")
    net = make(talkers=3)
    return net, export_onnx(net, tmp_path_factory.mktemp("onnx") / "net.onnx", seconds=0.05)


def test_it_gives_what_pytorch_gives_at_any_length(exported):
    net, path = exported
    assert check_onnx(net, path, [8, 9, 400, 1234, 2001]) < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_another_networks_file_is_found_out(exported):
    _, path = exported
    other = make(talkers=3)
    with torch.no_grad():
        other.core.head.widen.bias.add_(1.0)
    assert check_onnx(other, path, [400]) > 1e-2
    with pytest.raises(ValueError, match=r"gives \(1, 3, 400\) for 400 samples, wanted \(1, 2, 400\)"):
        check_onnx(make(talkers=2), path, [400])


def test_the_file_has_no_training_heads_and_the_net_stays(exported):
    net, path = exported
    bare = SeparateNet(net.config)
    assert path.stat().st_size < 4 * sum(p.numel() for p in bare.parameters()) * 1.5 + 400_000
    assert net.core.auxiliary is not None and not net.training


def test_the_plain_form(tmp_path):
    pytest.importorskip("onnx")
    net = make(conv_taps=0, gated=False, power=1)
    assert check_onnx(net, export_onnx(net, tmp_path / "net.onnx", seconds=0.02), [160, 333]) < 1e-4


def loco(**how) -> SeparateNet:
    torch.manual_seed(0)
    net = SeparateNet(SeparateConfig(**how)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (BINS, {"talkers": 3}),
        (BINS, {"conv_taps": 0, "gated": False, "power": 1}),
        (BINS, {"attention": "optimised"}),
        (replace(BINS, n_fft=18, hop=5), {"attention": "published"}),
        (BANDS, {"talkers": 3}),
        (replace(BANDS, kernel=3, blocks=2), {"talkers": 1}),
        (BANDS, {"attention": "optimised"}),
    ],
)
def test_locoformer_gives_what_pytorch_gives_at_any_length(tmp_path, size, how):
    """Also shorter than a window (a single sample too), and with softmax attention, whose positions follow it."""
    pytest.importorskip("onnx")
    net = loco(locoformer=size, **how)
    path = export_onnx(net, tmp_path / "net.onnx", seconds=0.01)
    assert check_onnx(net, path, [1, 2, 7, 8, 9, 63, 400, 1001]) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_locoformer_of_other_masks_is_found_out_and_the_net_stays(tmp_path):
    pytest.importorskip("onnx")
    net = loco(locoformer=BANDS)
    names = list(net.state_dict())
    path = export_onnx(net, tmp_path / "net.onnx", seconds=0.01)
    assert list(net.state_dict()) == names and isinstance(net.core, Locoformer)
    with torch.no_grad():
        net.core.leave.layers[1].bias.add_(0.1)
    assert check_onnx(net, path, [400]) > 1e-3


def test_silence_and_level_go_through_the_file(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = export_onnx(loco(locoformer=BANDS), tmp_path / "net.onnx", seconds=0.01)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert not session.run([OUTPUT], {INPUT: np.zeros((1, 33), np.float32)})[0].any()
    x = np.random.default_rng(0).standard_normal((1, 33)).astype(np.float32)
    quiet, loud = (session.run([OUTPUT], {INPUT: gain * x})[0] for gain in np.float32([0.01, 10.0]))
    np.testing.assert_allclose(1000.0 * quiet, loud, rtol=1e-3, atol=1e-3 * np.abs(loud).max())


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="net: attention 'optimised' given, of a SepReformer"):
        export_onnx(make(attention="optimised"), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"seconds: 0\.0001 given"):
        export_onnx(make(), tmp_path / "net.onnx", seconds=0.0001)
    with pytest.raises(ValueError, match=r"seconds: 0\.0 given, less than a frame"):
        export_onnx(loco(locoformer=BINS), tmp_path / "net.onnx", seconds=0.0)
    assert not list(tmp_path.iterdir())
