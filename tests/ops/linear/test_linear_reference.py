import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allears.ops.attention.linear.call import linear_attention
from allears.ops.attention.linear.conv import convolve_values
from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import explicit_attention

MAPS = ["focused", "elu", "relu", "softmax"]


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch, queries, keys, heads, size, dtype=torch.float64):
    return tuple(sample(batch, n, heads, size, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys)))


def parameters(heads, size, taps, per_head=False):
    """Scale, weights and bias of the convolution."""
    weight, bias = (sample(*(heads, size)[not per_head :], *n, seed=4) for n in ((taps,), ()))
    return sample(heads, size, seed=3).abs() + 0.4, weight, bias


def written_out(q, k, v, options, scale=None, weight=None, bias=None, causal=False):
    """The L_q x L_k matrix, plus the convolution as a sum over its taps."""
    how = {"power": options.power, "norm": options.norm, "scale": scale}
    phi_q, phi_k = (feature_map(x, options.feature_map, **how) for x in (q, k))
    out = explicit_attention(phi_q, phi_k, v, options.eps, causal)
    if weight is None:
        return out
    taps = weight.shape[-1]
    left = taps - 1 if causal else taps // 2
    for i in range(v.shape[1]):
        for t in range(taps):
            if 0 <= i + t - left < v.shape[1]:
                row = out.new_zeros(out.shape)
                row[:, i] = v[:, i + t - left] * weight[..., t]
                out = out + row
    return out + (bias if bias is not None else 0)


def test_one_query_in_scalars():
    q, k, v = (
        torch.tensor([[2.0, 1.0]]),
        torch.tensor([[1.0, 3.0], [2.0, -1.0]]),
        torch.tensor([[5.0, 0.0], [0.0, 7.0]]),
    )
    # relu features: weights 2*1 + 1*3 = 5 and 2*2 + 1*0 = 4, up to the 1e-6 behind the ReLU and eps.
    made = linear_attention(q[None, :, None], k[None, :, None], v[None, :, None], LinearOptions("relu"))
    torch.testing.assert_close(made.flatten(), torch.tensor([5 * 5 / 9, 7 * 4 / 9]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 63, 100])
@pytest.mark.parametrize("norm", ["channels", "head"])
@pytest.mark.parametrize("causal", [False, True])
def test_focused_with_everything_equals_its_matrix(length, norm, causal):
    options, (q, k, v) = LinearOptions(norm=norm, eps=1e-3), inputs(2, length, length, 3, 4)
    scale, weight, bias = parameters(3, 4, 5, per_head=norm == "head")
    made = linear_attention(q, k, v, options, scale=scale, conv_weight=weight, conv_bias=bias, causal=causal)
    wanted = written_out(q, k, v, options, scale, weight, bias, causal)
    torch.testing.assert_close(made, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (37, 5), (6, 1)])
def test_queries_and_keys_of_different_lengths(kind, queries, keys):
    options, (q, k, v) = LinearOptions(kind), inputs(2, queries, keys, 2, 5)
    torch.testing.assert_close(linear_attention(q, k, v, options), written_out(q, k, v, options))


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_gradient_equals_that_of_the_matrix(kind, causal):
    options = LinearOptions(kind)
    scale, weight, bias = parameters(2, 4, 3)
    leaves = [*inputs(2, 41, 41, 2, 4), weight, bias, *([scale] if kind == "focused" else [])]
    grads = []
    for function in (written_out, lambda q, k, v, o, s, w, b, c: linear_attention(
        q, k, v, o, scale=s, conv_weight=w, conv_bias=b, causal=c
    )):  # fmt: skip
        used = [x.clone().requires_grad_() for x in leaves]
        q, k, v, w, b, s = (*used, None)[:6]
        out = function(q, k, v, options, s, w, b, causal)
        grads.append(torch.autograd.grad((out * sample(*out.shape, seed=9)).sum(), used))
    for made, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_finite_differences(causal):
    scale, weight, bias = parameters(2, 3, 3)
    leaves = [x.requires_grad_() for x in (*inputs(1, 5, 5, 2, 3), scale, weight, bias)]

    def run(q, k, v, scale, weight, bias):
        return linear_attention(q, k, v, scale=scale, conv_weight=weight, conv_bias=bias, causal=causal)

    assert torch.autograd.gradcheck(run, leaves)
    q, k, v = (x.detach().requires_grad_() for x in inputs(1, 3, 7, 2, 3))
    assert causal or torch.autograd.gradcheck(linear_attention, (q, k, v))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_narrow_dtypes_are_near_float64(dtype, error, causal):
    narrow = inputs(1, 500, 500, 2, 8, dtype)
    scale, weight, bias = parameters(2, 8, 5)
    made = linear_attention(*narrow, scale=scale, conv_weight=weight, conv_bias=bias, causal=causal)
    wanted = linear_attention(
        *(x.double() for x in narrow), scale=scale, conv_weight=weight, conv_bias=bias, causal=causal
    )
    assert made.dtype == dtype
    assert (made.double() - wanted).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_survives_sums_that_leave_its_range(causal):
    q, k, v = (
        x.half() for x in (200 * sample(1, 3000, 1, 4), 200 * sample(1, 3000, 1, 4), 3e4 * sample(1, 3000, 1, 4).sign())
    )
    sums = feature_map(k, "focused").transpose(1, 3) @ v.abs().float().transpose(1, 2)[..., 0:1]
    assert sums.max() > 65504
    made = linear_attention(q, k, v, causal=causal)
    wanted = linear_attention(q.double(), k.double(), v.double(), causal=causal)
    assert made.dtype == torch.float16
    torch.testing.assert_close(made.double(), wanted, rtol=2e-3, atol=40)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_grows_faster_than_the_length_forward_or_backward(causal):
    sizes = []
    for length in (640, 1280):
        leaves = [x.requires_grad_() for x in inputs(1, length, length, 2, 16, torch.float32)]
        with Largest() as largest:
            linear_attention(*leaves, conv_weight=torch.ones(16, 5), causal=causal).sum().backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 2 * sizes[0] * 1.05
    assert sizes[1] <= 4 * 1280 * 2 * 16


@pytest.mark.parametrize("causal", [False, True])
def test_padded_sequences_equal_each_by_itself_whatever_stands_in_the_padding(causal):
    scale, weight, bias = parameters(2, 4, 5)
    lengths = torch.tensor([0, 1, 17, 23])
    clean = inputs(4, 23, 23, 2, 4)
    place = torch.arange(23) >= lengths[:, None]
    grads, more = [], {"conv_weight": weight, "conv_bias": bias, "causal": causal}
    leaves = [x.masked_fill(place[..., None, None], torch.nan).requires_grad_() for x in clean[1:]]
    q, s = clean[0].clone().requires_grad_(), scale.clone().requires_grad_()
    out = linear_attention(q, *leaves, scale=s, lengths=lengths, **more)
    held = torch.cat([out[b, :n].flatten() for b, n in enumerate(lengths)])
    grads = torch.autograd.grad(held.square().sum(), [q, *leaves, s])
    alone = [[x[b : b + 1, :n].clone().requires_grad_() for x in clean] for b, n in enumerate(lengths)]
    s = scale.clone().requires_grad_()
    single = [linear_attention(*parts, scale=s, **more) for parts in alone]
    for b, n in enumerate(lengths):
        torch.testing.assert_close(out[b, :n], single[b][0], rtol=1e-11, atol=1e-12)
    total = sum(x.square().sum() for x in single)
    wanted = torch.autograd.grad(total, [*(x for parts in alone for x in parts), s])
    torch.testing.assert_close(grads[3], wanted[-1])
    for b, n in enumerate(lengths):
        for which in range(3):
            torch.testing.assert_close(grads[which][b, :n], wanted[3 * b + which][0])
            assert grads[which][b, n:].eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_each_by_itself(causal):
    scale, weight, _ = parameters(2, 4, 3)
    q, k, v = (x[0] for x in inputs(1, 30, 30, 2, 4))
    offsets = torch.tensor([0, 7, 7, 8, 30], dtype=torch.int32)
    q[:7] = torch.nan  # nothing leaks between sequences
    v[:7] = torch.nan
    out = linear_attention(q, k, v, scale=scale, conv_weight=weight, causal=causal, cu_seqlens=offsets)
    assert out.shape == q.shape and out[:7].isnan().all()
    for a, b in ((7, 8), (8, 30)):
        alone = linear_attention(*(x[None, a:b] for x in (q, k, v)), scale=scale, conv_weight=weight, causal=causal)
        torch.testing.assert_close(out[a:b], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_without_keys_or_queries(causal):
    q, k, v = (x.requires_grad_() for x in inputs(2, 0, 0, 2, 4))
    out = linear_attention(q, k, v, conv_weight=torch.ones(4, 3), causal=causal)
    assert out.shape == (2, 0, 2, 4)
    q, k, v = (x.requires_grad_() for x in inputs(2, 3, 0, 2, 4))
    out = linear_attention(q, k, v, LinearOptions(eps=0.0))
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), q)[0].eq(0).all()


def test_not_a_number_stays_where_it_is():
    q, k, v = inputs(2, 70, 70, 2, 4)
    plain = linear_attention(q, k, v)
    q[0, 5, 1, 2], v[1, 3, 0, 1] = torch.nan, torch.nan
    made = linear_attention(q, k, v)
    hit = torch.zeros_like(made, dtype=torch.bool)
    hit[0, 5] = True  # the focused map's norm ties the heads of a position
    hit[1, :, 0, 1] = True
    assert torch.equal(made.isnan(), hit)
    torch.testing.assert_close(made[~hit], plain[~hit])


@pytest.mark.parametrize("place", [0, 40, 69])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_reaches_earlier_rows_of_a_causal_call(place, value):
    q, k, v = inputs(1, 70, 70, 2, 4)
    weight = sample(4, 5, seed=5)
    plain = linear_attention(q, k, v, conv_weight=weight, causal=True)
    bad = [x.clone() for x in (q, k, v)]
    for x in bad:
        x[:, place] = value
    made = linear_attention(*bad, conv_weight=weight, causal=True)
    torch.testing.assert_close(made[:, :place], plain[:, :place])
    assert not made[:, place:].isfinite().any()


def test_values_that_are_not_numbers_keep_to_their_channel_and_to_later_rows():
    q, k, v = inputs(1, 70, 70, 2, 4)
    plain = linear_attention(q, k, v, causal=True)
    v[0, 40, 1, 2] = torch.nan
    made = linear_attention(q, k, v, causal=True)
    hit = torch.zeros_like(made, dtype=torch.bool)
    hit[0, 40:, 1, 2] = True
    assert torch.equal(made.isnan(), hit)
    torch.testing.assert_close(made[~hit], plain[~hit])


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_of_padding_alone_gives_zeros_and_no_gradient_without_epsilon(causal):
    leaves = [x.requires_grad_() for x in inputs(2, 5, 5, 2, 4)]
    out = linear_attention(*leaves, LinearOptions(eps=0.0), causal=causal, lengths=torch.tensor([0, 4]))
    assert out[0].eq(0).all() and out[1].ne(0).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad[0].eq(0).all() and grad[1].ne(0).any()


def test_convolution_equals_torchs():
    v, (_, weight, bias) = sample(2, 11, 3, 4), parameters(3, 4, 5)
    usual = torch.nn.functional.conv1d(v.permute(0, 2, 3, 1).flatten(0, 1), weight[:, None], bias, padding=2, groups=4)
    wanted = usual.unflatten(0, (2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(convolve_values(v, weight, bias), wanted)
    shifted = convolve_values(v, weight, bias, causal=True)
    torch.testing.assert_close(shifted[:, 4:], wanted[:, 2:-2])
