import math

import pytest
import torch
import torch.nn.functional as F

from allears.nn.attention import CrossAttention, SelfAttention
from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.jvp.call import DualAttention, attention_jvp, dual_attention
from allears.ops.attention.jvp.ops import attention_jvp_op
from allears.ops.attention.jvp.reference import attention_jvp_reference


def call(shape: tuple[int, ...], dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and their tangents for (B, L_q, L_k, H, G, D)."""
    batch, queries, keys, heads, groups, size = shape
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, size), *[(batch, keys, groups, size)] * 2]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes * 2]


def wanted(tensors: list[torch.Tensor | None], scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch.func.jvp of the textbook's attention, in float64."""
    primals = tuple(x.double() for x in tensors[:3])
    tangents = tuple(
        torch.zeros_like(x) if t is None else t.double() for x, t in zip(primals, tensors[3:], strict=True)
    )
    return torch.func.jvp(lambda q, k, v: reference_attention(q, k, v, scale=scale), primals, tangents)


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(2, 5, 7, 4, 2, 6), (1, 1, 1, 1, 1, 3), (1, 9, 4, 2, 1, 5)])
def test_reference_is_the_derivative(shape):
    tensors = call(shape)
    for scale in (None, 0.7):
        found = attention_jvp_reference(*tensors, scale)
        for mine, want in zip(found, wanted(tensors, scale), strict=True):
            torch.testing.assert_close(mine, want)
    h = 1e-6
    ahead, behind = (
        attention_jvp_reference(*(x + sign * h * t for x, t in zip(tensors[:3], tensors[3:], strict=True)), *[None] * 3)
        for sign in (1, -1)
    )
    torch.testing.assert_close(
        (ahead[0] - behind[0]) / (2 * h), attention_jvp_reference(*tensors)[1], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    "shape", [(1, 17, 33, 2, 1, 32), (2, 1, 1, 1, 1, 64), (1, 5, 40, 2, 2, 40), (1, 3, 65, 1, 1, 128)]
)
def test_kernel_equals_float64(shape):
    tensors = call(shape, torch.float32)
    with torch.no_grad():
        found = attention_jvp(*tensors, kernel="triton")
    for mine, want in zip(found, wanted(tensors), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == want.shape
        if shape[2] == 1 and want.abs().max() < 10:
            torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
        else:
            assert error(mine, want) < 2e-6


@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "kv", ""])
def test_tangents_that_are_not_given_are_zero(given):
    tensors: list[torch.Tensor | None] = list(call((1, 6, 35, 2, 2, 32), torch.float32))
    for index, name in enumerate("qkv"):
        if name not in given:
            tensors[3 + index] = None
    for kernel in ("triton", "reference"):
        with torch.no_grad():
            out, tangent = attention_jvp(*tensors, kernel=kernel, scale=0.3)
        want_out, want = wanted(tensors, 0.3)
        torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tangent.double(), want, rtol=1e-5, atol=1e-6)


def test_strides_are_honoured():
    """Views of one projection, a transposed tensor and an expanded tangent give what copies give."""
    q, k, v, d_q, d_k, d_v = call((2, 7, 7, 2, 2, 32), torch.float32)
    packed, d_packed = torch.cat([q, k, v], dim=2), torch.cat([d_q, d_k, d_v], dim=2)
    views = [*packed.split(2, dim=2), *d_packed.split(2, dim=2)]
    views[1] = k.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    views[5] = d_v[:, :1].expand_as(v)
    assert not any(view.is_contiguous() for view in views)
    with torch.no_grad():
        found = attention_jvp(*views, kernel="triton")
        copies = attention_jvp(*(view.contiguous() for view in views), kernel="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
    assert error(found[1], wanted(views)[1]) < 2e-6


def test_offset_of_all_keys_costs_no_precision_in_16_bits():
    """A mean of the keys moves each row of the logits' tangent by a constant, which is taken off before rounding."""
    from allears.ops.attention.jvp.triton_host import attention_jvp_triton

    q, k, v, d_q, d_k, d_v = call((1, 20, 64, 1, 1, 32), torch.float16)
    plain, moved = (
        error(attention_jvp_triton(*given, 32**-0.5)[1], wanted(given)[1])
        for given in ([q, k, v, d_q, d_k, d_v], [q, k + 64, v, d_q, d_k, d_v])
    )
    assert plain < 5e-4 and moved < 5e-4  # 1.1e-2 if it stayed


def test_operator_has_a_fake_that_fits():
    tensors = call((1, 3, 5, 2, 1, 32), torch.float32)
    torch.library.opcheck(attention_jvp_op, (*tensors, 0.2), test_utils=("test_schema", "test_faketensor"))


def test_gradient_goes_through_the_reference_and_is_refused_by_the_kernel():
    tensors = call((1, 3, 4, 1, 1, 4))
    assert torch.autograd.gradcheck(lambda *x: attention_jvp(*x)[1], [x.requires_grad_() for x in tensors])
    with pytest.raises(ValueError, match="has no backward"):
        attention_jvp(*(x.float() for x in tensors), kernel="triton")


def test_dual_tensors_of_a_module():
    """Self-attention with rotary positions and cross-attention, differentiated as they are."""
    torch.manual_seed(0)
    own, cross = SelfAttention(8, 2, kv_heads=1).double(), CrossAttention(8, 2).double()
    context = torch.randn(2, 5, 8, dtype=torch.float64)

    def model(x):
        return cross(own(x), context)

    x, d_x = torch.randn(2, 2, 6, 8, dtype=torch.float64).unbind()
    with torch.no_grad(), DualAttention():
        out, tangent = torch.func.jvp(model, (x,), (d_x,))
        assert torch.equal(model(x), model(x))  # without tangents the block changes nothing
    h = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(out, model(x))
        difference = (model(x + h * d_x) - model(x - h * d_x)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["mask", "causal", "grouped"])
def test_masked_and_causal_calls_have_their_tangent_too(case):
    q, k, v, *tangents = (x.transpose(1, 2) for x in call((1, 6, 6, 2, 1 if case == "grouped" else 2, 4)))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    more = {"mask": {"attn_mask": mask}, "causal": {"is_causal": True}, "grouped": {"enable_gqa": True}}[case]

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **more)

    with DualAttention():
        out, tangent = torch.func.jvp(attend, (q, k, v), tuple(tangents))
    torch.testing.assert_close(out, attend(q, k, v))
    h = 1e-6
    ahead, behind = (attend(*(x + s * h * t for x, t in zip((q, k, v), tangents, strict=True))) for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def test_explicit_dual_call_under_autocast():
    tensors = call((1, 5, 6, 1, 1, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(dual_attention, tuple(tensors[:3]), tuple(tensors[3:]))
    assert out.dtype == tangent.dtype == torch.bfloat16
    want = wanted(tensors)
    assert error(out, want[0]) < 2e-2 and error(tangent, want[1]) < 2e-2
    with torch.no_grad():  # and the kernel, which is called with the tensors behind the dual ones
        run = torch.func.jvp(lambda *x: dual_attention(*x, kernel="triton"), tuple(tensors[:3]), tuple(tensors[3:]))
    assert all(error(mine, right) < 2e-6 for mine, right in zip(run, want, strict=True))


def test_bad_input_is_named():
    q, k, v, d_q, d_k, d_v = call((1, 3, 4, 1, 1, 4), torch.float32)
    half = [x.half() for x in (q, k, v, d_q, d_k, d_v)]
    wide = call((1, 2, 2, 1, 1, 160), torch.float32)
    for arguments, more, words in (
        ((q, k, v, d_q[:, :2], d_k, d_v), {}, r"d_q: torch.float32 \(1, 2, 1, 4\)"),
        ((q, k, v, d_q, d_k.double(), d_v), {}, "d_k: torch.float64"),
        ((q, k[:, :0], v[:, :0], None, None, None), {}, "k: 0 keys given"),
        ((q, k, v, d_q, d_k, d_v), {"kernel": "flash"}, "kernel: 'flash' given; known are auto, triton, reference"),
        (half, {"kernel": "triton"}, "takes bfloat16 and float32"),
        (wide, {"kernel": "triton"}, "head sizes up to 128; 160 given"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_jvp(*arguments, **more)
    assert attention_jvp(*half)[1].dtype == torch.float16
    with DualAttention(), pytest.raises(ValueError, match=r"dropout_p: 0.5 given"):
        torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), (q,), (d_q,))
    with DualAttention(), pytest.raises(ValueError, match="is_causal: L_q and L_k differ"):
        torch.func.jvp(
            lambda x: F.scaled_dot_product_attention(x, x[:, :, :2], x[:, :, :2], is_causal=True),
            (k.transpose(1, 2),),
            (d_k.transpose(1, 2),),
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 1000, 777, 4, 2, 128), (2, 63, 100, 2, 2, 64), (1, 130, 1, 2, 1, 40), (1, 257, 512, 2, 2, 32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_on_the_gpu(shape, dtype):
    tensors = [x.cuda() for x in call(shape, dtype)]
    with torch.no_grad():
        found = attention_jvp(*tensors, kernel="triton")
    limit = 1.5e-2 if dtype == torch.bfloat16 else 1e-5
    for mine, want in zip(found, wanted(tensors), strict=True):
        assert error(mine, want) < limit
    assert math.isfinite(float(found[1].abs().max()))


def test_a_tangent_of_more_bits_than_its_tensor_is_rounded_to_it():
    tensors = call((1, 5, 7, 2, 1, 8), torch.bfloat16)
    with torch.autograd.forward_ad.dual_level():
        wide = [
            torch.autograd.forward_ad.make_dual(x, d.float()) for x, d in zip(tensors[:3], tensors[3:], strict=True)
        ]
        found = torch.autograd.forward_ad.unpack_dual(dual_attention(*wide))
    out, d_out = attention_jvp(*tensors)
    assert torch.equal(found.primal, out) and torch.equal(found.tangent, d_out) and d_out.dtype == torch.bfloat16
