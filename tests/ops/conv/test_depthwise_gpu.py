"""Depthwise convolution and layer norm by their kernels on a GPU at real sizes, also compiled and captured."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.conv.depthwise import depthwise_conv
from allears.ops.norm.layer_norm import layer_norm

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(rows, channels, taps, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, rows, channels, device="cuda").to(dtype)
    return x, torch.randn(channels, 1, taps, device="cuda") / taps**0.5, torch.randn(channels, device="cuda")


def close(dtype):
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [(9_999, 64, 65, 1, 32), (30_001, 384, 3, 1, 1), (20_000, 128, 5, 2, 2)])
def test_depthwise_and_its_gradients(form, dtype):
    rows, channels, taps, stride, padding = form
    x, weight, bias = problem(rows, channels, taps, dtype)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    narrow = [t.requires_grad_() for t in (x, weight, bias)]
    how = {"stride": stride, "padding": padding}
    wanted = F.conv1d(wide[0].transpose(1, 2), *wide[1:], **how, groups=channels).transpose(1, 2)
    got = depthwise_conv(*narrow, **how, kernel="triton")
    torch.testing.assert_close(got.double(), wanted, **close(dtype))
    d_out = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, narrow, d_out), torch.autograd.grad(wanted, wide, d_out.double()), strict=True)
    for a, b in pairs:
        assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.norm()
    with torch.no_grad():
        gated = depthwise_conv(*narrow, **how, gated=True)
    torch.testing.assert_close(gated.double(), F.glu(wanted, -1), **close(dtype))


def test_depthwise_repeats_compiles_and_is_captured():
    x, weight, bias = problem(5_000, 64, 65, torch.float32)
    first = depthwise_conv(x, weight, bias, padding=32)
    assert torch.equal(depthwise_conv(x, weight, bias, padding=32), first)
    compiled = torch.compile(lambda x: depthwise_conv(x, weight, bias, padding=32), fullgraph=True)
    torch.testing.assert_close(compiled(x), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = depthwise_conv(x, weight, bias, padding=32)
    graph.replay()
    torch.testing.assert_close(out, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 96, 256, 1024])
def test_layer_norm(channels, dtype):
    x, weight, bias = problem(30_001, channels, 1, dtype)
    for view in (x, x[:, 7:-5]):
        got = layer_norm(view, weight[:, 0, 0], bias, kernel="triton")
        wanted = F.layer_norm(view.double(), (channels,), weight[:, 0, 0].double(), bias.double())
        torch.testing.assert_close(got.double(), wanted, **close(dtype))
