"""Pools of blocks and the mean of the keys against the reference, in Triton's interpreter or on a GPU."""

import pytest
import torch
from tests.ops.sparse_linear.triton_calls import DEVICE, offsets

from allears.ops.attention.sparse_linear import routers, triton_pool
from allears.ops.attention.sparse_linear.ops import sparse_linear_pool, sparse_linear_pool_keys
from allears.ops.attention.sparse_linear.triton_pool import pool_keys_triton, pool_triton

pytestmark = pytest.mark.usefixtures("poison")


def pool_blocks(x, *how):
    """The reference, in float64, which no kernel takes."""
    return routers.pool_blocks(x.double(), *how).float()


def key_mean(x, *how):
    return routers.key_mean(x.double(), *how).float()


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("block", [64, 128])
def test_pools_and_mean_of_odd_lengths_and_strides(length, block):
    x = torch.randn(2, 3, length, 24, dtype=torch.float16, device=DEVICE).transpose(1, 2)
    x = x + 3.0
    torch.testing.assert_close(pool_triton(x, block), pool_blocks(x, block))
    pools, mean = pool_keys_triton(x, block)
    wanted = key_mean(x)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(pools, pool_blocks(x, block) - wanted[:, :, None], atol=2e-6, rtol=1e-4)


def test_the_mean_of_more_blocks_than_a_step(monkeypatch):
    monkeypatch.setattr(triton_pool, "_STEP", 4)
    x = torch.randn(1, 64 * 9 + 7, 1, 40, device=DEVICE)
    pools, mean = pool_keys_triton(x, 64, centre=False)
    torch.testing.assert_close(mean, key_mean(x), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(pools, pool_blocks(x, 64))
    centred, _ = pool_keys_triton(x, 64)
    torch.testing.assert_close(centred, pools - mean[:, :, None])


def test_packed_sequences_among_them_empty_ones():
    x, cu = torch.randn(199, 2, 40, device=DEVICE), offsets(5, 0, 130, 64)
    torch.testing.assert_close(pool_triton(x, 64, cu, 130), pool_blocks(x, 64, cu, 130))
    pools, mean = pool_keys_triton(x, 64, cu, 130)
    torch.testing.assert_close(mean, key_mean(x, cu))
    for s, blocks in enumerate((1, 0, 3, 1)):
        wanted = pool_blocks(x, 64, cu, 130)[s, :, :blocks] - mean[s, :, None]
        torch.testing.assert_close(pools[s, :, :blocks], wanted, atol=1e-6, rtol=1e-4)
        assert not pools[s, :, blocks:].any()
    with pytest.raises(ValueError, match="max_seqlen: None"):
        pool_triton(x, 64, cu)


def test_operators_agree_with_their_fakes():
    x, cu = torch.randn(20, 2, 8, device=DEVICE), offsets(5, 15)
    torch.library.opcheck(sparse_linear_pool, (x, 64, cu, 15), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        sparse_linear_pool_keys, (x[None], 64, None, None, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.gpu
def test_large_bfloat16():
    x = torch.randn(2, 5003, 6, 128, dtype=torch.bfloat16, device=DEVICE) + 1
    pools, mean = pool_keys_triton(x, 64)
    torch.testing.assert_close(mean, key_mean(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pools, pool_blocks(x, 64) - mean[:, :, None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pool_triton(x, 128), pool_blocks(x, 128), atol=1e-5, rtol=1e-4)
