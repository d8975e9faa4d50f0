"""The backward's kernels in Triton's interpreter against the reference, with float16 (the interpreter multiplies
bfloat16 by its bits).

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed: T tokens.
"""

import math
import os
from itertools import pairwise

import pytest
import torch
from tests.ops.lowbit.textbook import dense, inputs, rel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.attention.lowbit import sagebwd_reference as reference  # noqa: E402
from allears.ops.attention.lowbit import triton_host  # noqa: E402
from allears.ops.attention.lowbit.options import LowBit  # noqa: E402
from allears.ops.attention.lowbit.triton_host import Launch, sagebwd_backward, sagebwd_forward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# An integer that lies between two values may round to either, as sums are taken in another order.
TOLERANCE = 2e-3
pytestmark = pytest.mark.usefixtures("poison")


def problem(queries, keys, heads=1, groups=1, size=16, batch=1, dtype=torch.float16):
    """q, k, v, d_out and d_lse."""
    q, k, v = (x.to(DEVICE) for x in inputs(queries, keys, heads, groups, size, batch, dtype))
    return q, k, v, torch.randn_like(q), torch.randn(batch, heads, queries, device=DEVICE)


def gradients(module, q, k, v, d_out, d_lse, options, **how):
    """(dQ, dK, dV) by the forward and backward of ``module``."""
    launches = {"launches": how.pop("launches")} if "launches" in how else {}
    _, _, saved = module.sagebwd_forward(q, k, v, options=options, **how)
    packing = {name: how.pop(name) for name in list(how) if name.startswith("cu_")}
    assert module is triton_host or not packing
    return module.sagebwd_backward(d_out, saved, d_lse=d_lse, options=options, **how, **launches)


def check(got, wanted):
    for name, a, b in zip(("dQ", "dK", "dV")[: len(got)], got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert rel(a, b) < TOLERANCE, name


@pytest.mark.parametrize("grain", ["row", "tile"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "size", "causal"),
    [(63, 130, 1, 1, 16, False), (100, 150, 1, 1, 64, True), (130, 100, 4, 2, 24, True), (1, 1, 1, 1, 32, False)],
)
def test_equals_the_reference(grain, queries, keys, heads, groups, size, causal):
    """Odd lengths; L_q below and above L_k, where causal alignment leaves queries without keys; grouped heads;
    padding."""
    given = problem(queries, keys, heads, groups, size)
    options = LowBit(grad_scales=grain)
    wanted = gradients(reference, *given, options, causal=causal)
    got = gradients(triton_host, *given, options, causal=causal)
    check(got, wanted)


def test_heads_above_128_go_in_tiles_of_32():
    given = problem(40, 130, 2, 1, 160)
    assert triton_host.backward_launch(256, False) == (Launch(32, 8, 1), Launch(32, 8, 1))
    check(gradients(triton_host, *given, LowBit(), causal=True), gradients(reference, *given, LowBit(), causal=True))


@pytest.mark.parametrize("grain", ["row", "tile"])
def test_strides_float32_scale_and_no_smoothing(grain):
    def mixed(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    *given, d_lse = problem(70, 140, 2, 1, 32, batch=2, dtype=torch.float32)
    given = [mixed(x) for x in given]
    before = [x.clone() for x in given]
    options = LowBit(grad_scales=grain, smooth_k=False)
    launches = (Launch(128 if grain == "tile" else 64, 4, 1), Launch(64, 4, 1))
    got = gradients(triton_host, *given, None, options, scale=0.3, launches=launches)
    check(got, gradients(reference, *given, None, options, scale=0.3))
    check(
        gradients(triton_host, *given, d_lse, options, scale=0.3),
        gradients(reference, *given, d_lse, options, scale=0.3),
    )
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_close_to_exact_gradients():
    given = problem(100, 100, size=64)
    *_, wanted = dense(*given[:3], causal=True, d_out=given[3], d_lse=given[4])
    for a, b in zip(gradients(triton_host, *given, LowBit(), causal=True), wanted, strict=True):
        assert rel(a, b) < 0.03


@pytest.mark.parametrize(("grain", "causal"), [("row", False), ("row", True), ("tile", True)])
def test_packed_sequences_run_one_by_one(grain, causal):
    """Among them empty ones, one without keys, and one with more queries than keys."""
    starts_q, starts_k = [0, 70, 70, 73, 140, 150], [0, 131, 150, 150, 190, 200]
    cu = {
        "cu_seqlens_q": torch.tensor(starts_q, dtype=torch.int32, device=DEVICE),
        "cu_seqlens_k": torch.tensor(starts_k, dtype=torch.int32, device=DEVICE),
    }
    q, k, v, d_out, d_lse = (x[0] for x in problem(150, 200))
    options = LowBit(grad_scales=grain)
    got = gradients(triton_host, q, k, v, d_out, d_lse, options, causal=causal, **cu)
    for of_q, of_k in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        rows, columns = slice(*of_q), slice(*of_k)
        part = (got[0][rows], got[1][columns], got[2][columns])
        if of_q[0] == of_q[1] or of_k[0] == of_k[1]:
            assert not any(x.any() for x in part)
            continue
        one = (q[None, rows], k[None, columns], v[None, columns], d_out[None, rows], d_lse[None, :, rows])
        check([x[None] for x in part], gradients(reference, *one, options, causal=causal))


@pytest.mark.parametrize("grain", ["row", "tile"])
def test_zeros_and_no_keys(grain):
    options = LowBit(grad_scales=grain)
    q, k, v, d_out, _ = problem(70, 140)
    for given in ((q * 0, k * 0, v * 0, d_out * 0), (q, k, v, d_out * 0), (q[:, :0], k, v, d_out[:, :0])):
        assert not any(x.any() for x in gradients(triton_host, *given, None, options))
    got = gradients(triton_host, q, k[:, :0], v[:, :0], d_out, None, options)
    assert got[0].shape == q.shape and not got[0].any() and got[1].numel() == 0


def test_the_gradient_of_the_log_sum_exp_alone():
    """dO is zero, so that its scale is, and d_lse alone makes dS."""
    q, k, v, d_out, d_lse = problem(70, 140)
    for grain in ("row", "tile"):
        options = LowBit(grad_scales=grain)
        got = gradients(triton_host, q, k, v, d_out * 0, d_lse, options)
        wanted = gradients(reference, q, k, v, d_out * 0, d_lse, options)
        check(got[:2], wanted[:2])
        assert not got[2].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("grain", ["row", "tile"])
def test_bad_numbers_are_not_hidden(grain):
    """A bad gradient of a query makes its own dQ and all of dK and dV bad, and no other tile's dQ."""
    options = LowBit(grad_scales=grain, smooth_k=False)
    for bad in (math.nan, math.inf):
        q, k, v, d_out, _ = problem(70, 20, dtype=torch.float32)
        d_out[0, 66, 0, 3] = bad
        d_q, d_k, d_v = gradients(triton_host, q, k, v, d_out, None, options)
        assert d_q[0, :64].isfinite().all() and not d_q[0, 66].isfinite().any()
        assert not d_k.isfinite().any() and not d_v.isfinite().any()


def test_refusals_name_the_argument():
    q, k, v, d_out, d_lse = problem(5, 7)
    _, _, saved = sagebwd_forward(q, k, v)
    with pytest.raises(ValueError, match=r"d_out: torch\.float32"):
        sagebwd_backward(d_out.float(), saved)
    with pytest.raises(ValueError, match="d_lse: shape"):
        sagebwd_backward(d_out, saved, d_lse=d_lse[..., :3])
    with pytest.raises(ValueError, match="need 128 keys"):
        sagebwd_backward(
            d_out, saved, options=LowBit(grad_scales="tile"), launches=(Launch(64, 4, 1), Launch(64, 4, 1))
        )
