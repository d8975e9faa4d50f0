import math
from functools import partial

import pytest
import torch
from tests.ops.lowbit.textbook import TILE, attend, dense, inputs, rel

from allears.ops.attention.lowbit.int8_reference import int8_forward
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import (
    quantise_e4m3_blocks,
    quantise_int8_blocks,
    quantise_int8_rows,
)
from allears.ops.attention.lowbit.varlen import over_sequences


def textbook(q, k, v, pv, causal, scale, smooth_k=True):
    """Integers multiplied as integers, the rest in float64; B = 1."""
    smoothed = k.float() - k.float().mean(1, keepdim=True) if smooth_k else k.float()
    (q8, q_scale), (k8, k_scale) = quantise_int8_rows(q), quantise_int8_blocks(smoothed)
    v8, v_scale = quantise_e4m3_blocks(v)
    ratio = q.shape[2] // k.shape[2]

    def logits_of(h, i):
        integers = k8[0, :, h // ratio].long() @ q8[0, i, h].long()
        scales = k_scale[0, h // ratio].double().repeat_interleave(TILE)[: k.shape[1]]
        return integers.double() * scales * q_scale[0, h, i].double() * scale

    def product(h, weights, tile):
        if pv == "fp16":
            return weights.to(v.dtype).double() @ v[0, tile, h // ratio].double()
        p8 = (weights.float() * 448).to(torch.float8_e4m3fn)
        return p8.double() @ v8[0, tile, h // ratio].double() * v_scale[0, h // ratio, tile.start // TILE].item() / 448

    out, lse = attend(logits_of, product, q.shape[1], k.shape[1], q.shape[2], q.shape[3], causal)
    if smooth_k:
        mean = k[0].double().mean(0).repeat_interleave(ratio, dim=0)
        lse = lse + scale * torch.einsum("lhd,hd->hl", q[0].double(), mean)
    return out, lse


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (40, 300), (140, 130)])
def test_equals_the_textbook(pv, causal, lengths):
    q, k, v = inputs(*lengths, heads=4, groups=2, dtype=torch.bfloat16)
    out, lse = int8_forward(q.float(), k.float(), v.float(), pv=pv, causal=causal, scale=0.3)
    wanted, wanted_lse = textbook(q.float(), k.float(), v.float(), pv, causal, 0.3)
    torch.testing.assert_close(out[0].double(), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), wanted_lse, atol=2e-5, rtol=1e-5)
    narrow, _ = int8_forward(q, k, v, pv=pv, causal=causal, scale=0.3)
    assert narrow.dtype == torch.bfloat16
    wanted, _ = textbook(q, k, v, pv, causal, 0.3)
    torch.testing.assert_close(narrow[0].double(), wanted, atol=1e-3, rtol=2**-8)


def test_without_key_smoothing():
    q, k, v = inputs(30, 150, groups=2)
    out, lse = int8_forward(q, k, v, pv="fp8", scale=0.2, options=LowBit(smooth_k=False))
    wanted, wanted_lse = textbook(q, k, v, "fp8", False, 0.2, smooth_k=False)
    torch.testing.assert_close(out[0].double(), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), wanted_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("pv", "bound"), [("fp8", 0.042), ("fp16", 0.014)])
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smooth_q", [None, True])
def test_error_against_dense_attention(pv, bound, size, causal, smooth_q):
    q, k, v = inputs(257, 333, heads=4, groups=2, size=size, offset=3.0)
    q = q + smooth_q * 2.0 if smooth_q else q
    out, lse = int8_forward(q, k, v, pv=pv, causal=causal, options=LowBit(smooth_q=smooth_q))
    wanted, wanted_lse = dense(q, k, v, causal)
    assert rel(out, wanted) < bound
    torch.testing.assert_close(lse.double(), wanted_lse, atol=0.03, rtol=0)


def test_smoothing_is_worth_it_where_keys_share_an_offset():
    q, k, v = inputs(100, 256, size=64, offset=10.0)
    wanted, _ = dense(q, k, v)
    smooth, rough = (int8_forward(q, k, v, pv="fp16", options=LowBit(smooth_k=on))[0] for on in (True, False))
    assert rel(smooth, wanted) < 0.25 * rel(rough, wanted)


def test_queries_without_keys():
    q, k, v = inputs(9, 4)
    out, lse = int8_forward(q, k, v, pv="fp8", causal=True)
    assert out[:, :5].eq(0).all() and lse[..., :5].eq(-math.inf).all()
    assert rel(out[:, 5:], dense(q, k, v, True)[0][:, 5:]) < 0.04
    out, lse = int8_forward(q, k[:, :0], v[:, :0], pv="fp16")
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    assert int8_forward(q[:, :0], k, v, pv="fp8")[0].shape == (1, 0, 2, 16)


def test_zero_tensors_give_the_mean_of_v():
    q, k, v = inputs(5, 200)
    out, lse = int8_forward(q * 0, k * 0, v, pv="fp16")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand(1, 5, 2, 16), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, torch.full((1, 2, 5), math.log(200)))
    assert int8_forward(q, k, v * 0, pv="fp8")[0].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_what_is_not_finite_is_never_hidden(bad, pv):
    q, k, v = inputs(150, 150)
    clean, _ = int8_forward(q, k, v, pv=pv, causal=True, options=LowBit(smooth_k=False))
    broken = q.clone()
    broken[0, 7, 1, 3] = bad
    out, lse = int8_forward(broken, k, v, pv=pv, causal=True, options=LowBit(smooth_k=False))
    assert out[0, 7, 1].isnan().all() and lse[0, 1, 7].isnan()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)
    broken = k.clone()
    broken[0, 130, 0, 3] = bad  # in the second block of keys
    out, _ = int8_forward(q, broken, v, pv=pv, causal=True, options=LowBit(smooth_k=False))
    assert torch.equal(out[:, :128], clean[:, :128]) and out[:, 128:].isnan().all()
    assert int8_forward(q, broken, v, pv=pv, causal=True)[0].isnan().all()  # the mean of all keys
    broken = v.clone()
    broken[0, 3, 0, 5] = bad
    out, _ = int8_forward(q, k, broken, pv=pv)
    assert not out[..., 5].isfinite().any()
    assert out[..., 4].isfinite().all() if pv == "fp16" else not out.isfinite().any()  # fp8: its block's scale is NaN


def test_packed_sequences_run_one_by_one():
    lengths = ((5, 140), (0, 3), (33, 20))
    parts = [inputs(n, m, heads=4, groups=2) for n, m in lengths]
    q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    cu_q, cu_k = torch.tensor([0, 5, 5, 38], dtype=torch.int32), torch.tensor([0, 140, 143, 163], dtype=torch.int32)
    run = partial(int8_forward, pv="fp8", causal=True)
    out, lse = over_sequences(run, q, k, v, cu_q, cu_k)
    alone = [int8_forward(*part, pv="fp8", causal=True) for part in parts]
    assert torch.equal(out, torch.cat([a[0][0] for a in alone]))
    assert torch.equal(lse, torch.cat([a[1][0] for a in alone], dim=1))
    for bad in ([0, 5, 4, 38], [1, 5, 5, 38], [0, 5, 5, 37]):
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            over_sequences(run, q, k, v, torch.tensor(bad), cu_k)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        over_sequences(run, q, k, v, cu_q, torch.tensor([0, 163]))


def test_inputs_stay_and_strides_do_not_matter():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(40, 60, heads=4, groups=2))
    kept = [x.clone() for x in (q, k, v)]
    out, _ = int8_forward(q, k, v, pv="fp8")
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))
    assert torch.equal(out, int8_forward(*(x.contiguous() for x in kept), pv="fp8")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 3, 16)}, "heads"),
        ({"q": torch.zeros(1, 4, 2, 8)}, "B and D"),
        ({"q": torch.zeros(4, 2, 16)}, "B, L, H, D"),
        ({"v": torch.zeros(1, 5, 2, 16)}, "v: shape"),
        ({"k": torch.zeros(1, 4, 2, 16, dtype=torch.float16)}, "k: torch.float16"),
        ({"q": torch.zeros(1, 4, 2, 16, dtype=torch.float64)}, "float64"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"pv": "int4"}, "pv"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {name: torch.zeros(1, 4, 2, 16) for name in "qkv"} | {"pv": "fp8"} | change
    with pytest.raises(ValueError, match=message):
        int8_forward(**call)


def test_head_sizes_above_256_are_refused():
    x = torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match="257"):
        int8_forward(x, x, x, pv="fp8")
