"""The feed-forward with a neighbourhood: the reference against a loop, the kernels, which Triton interprets here,
against the reference.

Shapes: A, B outer sizes, L rows, D channels, C hidden channels, K taps, G groups.
"""

import pytest
import torch
from tests.ops.poison import poison_new_empty

from allears.ops.conv_glu import conv_swiglu, runs_kernel, sizes
from allears.ops.conv_glu.sizes import Tile, Tiles, group_pads

if torch.cuda.is_available():
    pytest.skip("Triton runs on the GPU here: see test_conv_swiglu_gpu.py", allow_module_level=True)

SMALL = Tiles(*[Tile(16, 16, 4, 1)] * 4, weights=Tile(16, 16, 4, 1, left=16))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def problem(outer, rows, channels, hidden, taps, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, over=1):
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) / over**0.5).to(dtype)

    x, widen = draw(*outer, rows, channels), draw(2 * hidden, channels, taps, over=channels * taps)
    narrow = draw(hidden, channels, taps, over=hidden * taps)
    tensors = x, widen, draw(2 * hidden), narrow, draw(channels)
    return [t.requires_grad_() for t in tensors]


def slopes(y, tensors, d_y):
    return torch.autograd.grad(y, tensors, d_y)


def both(tensors, d_y=None, close=CLOSE, **how):
    """Value and gradients of the kernels, after a look at those of the reference."""
    got, wanted = (conv_swiglu(*tensors, **how, kernel=kernel) for kernel in ("triton", "reference"))
    d_y = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).to(got) if d_y is None else d_y
    gradients, expected = slopes(got, tensors, d_y), slopes(wanted, tensors, d_y)
    torch.testing.assert_close(got, wanted, **close)
    for tensor, a, b in zip(tensors, gradients, expected, strict=True):
        assert a.shape == tensor.shape and a.dtype == tensor.dtype
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=close["rtol"], atol=close["atol"] * max(1.0, largest))
    return got, gradients


@pytest.fixture
def triton(monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")
    poison_new_empty(monkeypatch)


@pytest.fixture
def small_tiles(triton, monkeypatch):
    """Several tiles of rows and of each sum, and several parts of the rows."""
    monkeypatch.setattr(sizes, "tiles", lambda *args: SMALL)


@pytest.mark.parametrize(("taps", "before"), [(1, 0), (3, 1), (4, 1), (4, 3), (5, 0)])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_reference_is_its_loop(rows, taps, before):
    x, widen, widen_bias, narrow, narrow_bias = problem((2, 3), rows, 6, 5, taps, torch.float64)
    found = conv_swiglu(x, widen, widen_bias, narrow, narrow_bias, groups=3, eps=0.1, before=before)
    parts = x.unflatten(-1, (3, 2))
    normed = (parts / (parts.square().mean(-1, keepdim=True) + 0.1).sqrt()).flatten(-2)
    wanted, hidden = [], []
    for row in range(rows):
        seen = [(k, row - before + k) for k in range(taps) if 0 <= row - before + k < rows]
        value, gate = sum((normed[..., at, :] @ widen[:, :, k].T for k, at in seen), widen_bias).split(5, dim=-1)
        hidden.append(value * gate * gate.sigmoid())
    for row in range(rows):
        seen = [(k, row + before - k) for k in range(taps) if 0 <= row + before - k < rows]
        wanted.append(x[..., row, :] + sum((hidden[at] @ narrow[:, :, k] for k, at in seen), narrow_bias))
    torch.testing.assert_close(found, torch.stack(wanted, dim=-2))
    torch.testing.assert_close(
        conv_swiglu(x[0], widen, widen_bias, narrow, narrow_bias, groups=3, eps=0.1, before=before), found[0]
    )


def test_reference_gradients():
    tensors = problem((1, 2), 3, 4, 3, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: conv_swiglu(*t, groups=2, eps=1e-3, before=1), tensors)


@pytest.mark.parametrize(
    ("outer", "rows", "channels", "hidden", "taps", "groups", "before"),
    [
        ((2, 3), 5, 16, 16, 4, 4, 1),
        ((2, 2), 7, 48, 32, 3, 3, 2),  # groups padded from 3 to 4
        ((5,), 3, 96, 16, 8, 4, 3),  # channels of a group padded from 24 to 32; sequences shorter than the taps
        ((3,), 1, 64, 128, 4, 4, 1),
        ((1, 9), 17, 32, 48, 1, 1, 0),  # columns that do not fill a block
        ((3,), 50, 16, 80, 5, 16, 4),
    ],
)
def test_kernels_are_the_reference(triton, outer, rows, channels, hidden, taps, groups, before):
    both(problem(outer, rows, channels, hidden, taps), groups=groups, eps=1e-5, before=before)


@pytest.mark.parametrize("before", [0, 1])
def test_many_tiles_are_one(small_tiles, before):
    both(problem((1, 3), 11, 16, 48, 2), groups=2, eps=1e-5, before=before)


def test_parts_of_the_rows_add_up(small_tiles, monkeypatch):
    from allears.ops.conv_glu import triton_host

    monkeypatch.setattr(triton_host, "PROGRAMS", 20)
    both(problem((7,), 9, 16, 16, 3), groups=2, eps=1e-5, before=1)


def test_a_transposed_view_is_read_as_it_lies(triton):
    x, *weights = problem((2, 5), 7, 16, 16, 4)
    turned = x.detach().transpose(1, 2).requires_grad_()
    how = {"groups": 4, "eps": 1e-5, "before": 1}
    d_y = torch.randn(2, 7, 5, 16)
    y, (d_x, *_) = both([turned, *weights], d_y, **how)
    assert y.stride() == turned.stride() == d_x.stride() and not y.is_contiguous()
    again, _ = both([turned, *weights], d_y.transpose(1, 2).contiguous().transpose(1, 2), **how)
    assert torch.equal(again, y)
    both([turned, *weights], torch.ones(()).expand(2, 7, 5, 16), **how)
    sliced = torch.randn(3, 9, 40)[:, 1:-1, 4:20].requires_grad_()
    both([sliced, *weights], **how)
    scattered = torch.randn(3, 16, 7).mT.requires_grad_()
    y, (d_x, *_) = both([scattered, *weights], **how)
    assert y.stride() == d_x.stride() == scattered.stride()


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_sixteen_bits_are_summed_wide(triton, kind):
    """float16 alone: the interpreter takes bfloat16 for integers."""
    tensors = problem((2, 2), 9, 32, 32, 4)
    tensors[0] = tensors[0].detach().to(kind).requires_grad_()
    how = {"groups": 4, "eps": 1e-5, "before": 1}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = conv_swiglu(*exact, **how)
    d_y = torch.randn_like(wanted).to(kind)
    with torch.autocast("cpu", torch.float16):
        y = conv_swiglu(*tensors, **how, kernel="triton")
    assert y.dtype == kind
    pairs = zip((y, *slopes(y, tensors, d_y)), (wanted, *slopes(wanted, exact, d_y.double())), strict=True)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    assert max(errors) < 2e-3 and errors[2] > 1e-6  # that of the first weight is not of float32


def test_rows_of_zeros_and_no_rows(triton):
    x, *weights = problem((2,), 5, 16, 16, 3)
    how = {"groups": 4, "eps": 1e-5, "before": 1}
    y, (d_x, *_) = both([torch.zeros_like(x).requires_grad_(), *weights], **how)
    assert y.isfinite().all() and d_x.isfinite().all()
    for shape in ((0, 5, 16), (0, 3, 5, 16), (3, 0, 5, 16)):
        y, gradients = both([torch.zeros(shape).requires_grad_(), *weights], **how)
        assert y.shape == shape and not any(d.any() for d in gradients)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_nan_stays_among_the_rows_that_see_it(small_tiles, kernel):
    x, *weights = problem((2, 2), 12, 16, 16, 4)
    x = x.detach()
    x[0, 1, 5, 3] = torch.nan
    bad = conv_swiglu(x, *weights, groups=4, eps=1e-5, before=1, kernel=kernel).isnan().any(-1)
    wanted = torch.zeros(2, 2, 12, dtype=torch.bool)
    wanted[0, 1, 2:9] = True  # 3 rows to either side
    assert torch.equal(bad, wanted)


def test_inputs_are_left_alone_and_a_call_repeats(triton):
    tensors = problem((3,), 8, 16, 32, 4)
    kept = [t.detach().clone() for t in tensors]
    first, second = (both(tensors, groups=4, eps=1e-5, before=1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    with torch.inference_mode():  # without the operator
        assert torch.equal(conv_swiglu(*tensors, groups=4, eps=1e-5, before=1, kernel="triton"), first[0])


@pytest.mark.parametrize(("kernel", "mixed"), [("triton", True), ("triton", False), ("reference", True)])
def test_a_compiled_graph_holds_it_whole(triton, kernel, mixed):
    x, *weights = problem((1, 3), 2, 16, 16, 3)
    given = [x.detach().transpose(1, 2).requires_grad_(), *weights]

    def twice(*t):
        return conv_swiglu(2 * t[0], *t[1:], groups=4, eps=1e-5, before=1, kernel=kernel) + 1

    compiled, d_y = torch.compile(twice, fullgraph=True, backend="aot_eager"), torch.randn(1, 2, 3, 16)
    with torch.autocast("cpu", torch.float16, enabled=mixed):
        got, wanted = compiled(*given), twice(*given)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(slopes(got, given, d_y), slopes(wanted, given, d_y), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_operators_say_the_truth_of_their_shapes(triton):
    from allears.ops.conv_glu.ops import conv_swiglu_triton, conv_swiglu_triton_backward

    x, *weights = problem((1, 2), 2, 16, 16, 2)
    how = 4, 1e-5, 1, torch.float32
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for given in (x, x.detach().transpose(1, 2).requires_grad_()):
        torch.library.opcheck(conv_swiglu_triton, (given, *weights, *how), test_utils=checks)
        plain = [t.detach() for t in (given, given, *weights[:3])]
        torch.library.opcheck(conv_swiglu_triton_backward, (*plain, *how), test_utils=checks)


def test_second_derivatives_are_refused(triton):
    tensors = problem((1,), 3, 16, 16, 3)
    y = conv_swiglu(*tensors, groups=4, eps=1e-5, before=1, kernel="triton")
    (slope,) = torch.autograd.grad(y.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        slope.sum().backward()


def test_auto_on_a_cpu_is_the_reference(monkeypatch):
    tensors = problem((2,), 4, 16, 16, 3)
    assert not runs_kernel(*tensors, groups=4)
    monkeypatch.setitem(__import__("sys").modules, "allears.ops.conv_glu.ops", None)  # importing it now fails
    conv_swiglu(*tensors, groups=4, eps=1e-5, before=1)


def test_groups_are_padded_to_powers_of_two():
    assert group_pads(64, 4) == (4, 16) and group_pads(96, 4) == (4, 32)
    assert group_pads(80, 5) == (8, 16) and group_pads(48, 1) == (1, 64)


def test_bad_calls_are_refused():
    x, widen, widen_bias, narrow, narrow_bias = problem((2,), 5, 16, 16, 3)
    good = {"x": x, "widen_weight": widen, "widen_bias": widen_bias}
    good |= {"narrow_weight": narrow, "narrow_bias": narrow_bias, "groups": 4, "eps": 1e-5, "before": 1}
    wide = problem((2,), 5, 144, 16, 3)
    names = ("x", "widen_weight", "widen_bias", "narrow_weight", "narrow_bias")
    for change, words in [
        ({"x": x[0]}, r"x: torch.float32 \(5, 16\) given"),
        ({"x": x[:, :0]}, r"x: torch.float32 \(2, 0, 16\) given; .* L from 1"),
        ({"x": x.long()}, "x: torch.int64"),
        ({"widen_weight": widen[:, :8]}, r"widen_weight: \(32, 8, 3\) given; x has 16 channels"),
        ({"widen_weight": widen[1:]}, r"widen_weight: \(31, 16, 3\)"),
        ({"narrow_weight": narrow[..., :2]}, r"narrow_weight: \(16, 16, 2\) given; .* must be \(16, 16, 3\)"),
        ({"widen_bias": widen_bias[:16]}, r"widen_bias: \(16,\) given; it must be \(32,\)"),
        ({"narrow_bias": narrow_bias[:1]}, r"narrow_bias: \(1,\) given; it must be \(16,\)"),
        ({"groups": 3}, "groups: 3 given; it must divide the 16 channels"),
        ({"eps": 0.0}, "eps: 0.0 given"),
        ({"before": 3}, "before: 3 given; of 3 taps 0 to 2"),
        ({"kernel": "fast"}, "kernel: 'fast' given; known are auto, triton, reference"),
    ]:
        with pytest.raises(ValueError, match=words):
            conv_swiglu(**(good | change))
    pytest.importorskip("triton")
    for change, words in [
        ({"x": x.double()}, "'triton' cannot run this call: multiplies 16-bit numbers; torch.float64 given"),
        (dict(zip(names, wide, strict=True)), "up to 128 channels .*; 144, 16 and 3 given"),
    ]:
        with pytest.raises(ValueError, match=words):
            conv_swiglu(**(good | change), kernel="triton")
