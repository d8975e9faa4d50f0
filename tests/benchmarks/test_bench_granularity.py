import json

import pytest
import torch
from benchmarks.activations import Recorded
from benchmarks.granularity import (
    QK,
    SYSTEMS,
    GranularityCase,
    e4m3_channels,
    int8_by,
    int8_whole,
    k_threads,
    q_threads,
    rounded,
)
from benchmarks.nvfp4 import through

from allears.ops.attention import AttentionSpec, LowBit


@pytest.fixture
def act():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 150, 4, 16), 3 + torch.randn(1, 150, 2, 16), torch.randn(1, 150, 2, 16)
    return Recorded(q, k, v, True, 0.3)


@pytest.mark.parametrize(("groups", "count"), [(q_threads, 32 // 4), (k_threads, 64 // 16)])
def test_threads_share_scales_as_sageattention_has_it(groups, count):
    """Of 32 queries each thread has every eighth; of 64 keys the pairs (2t, 2t + 1) of every eight."""
    of_token = groups(torch.arange(128))
    period = 32 if count == 8 else 64
    assert int(of_token.max()) + 1 == 128 // period * count
    for t in range(count):
        mine = [i for i in range(period) if (i % 8 == t if count == 8 else i % 8 in (2 * t, 2 * t + 1))]
        assert (of_token[:period] == t).nonzero().flatten().tolist() == mine
        assert torch.equal(of_token[period : 2 * period], of_token[:period] + count)


def test_a_scale_is_the_largest_of_its_group():
    x = torch.zeros(2, 5, 2, 3)
    x[0, 0, 0, 0], x[0, 1, 0, 1], x[0, 4, 1, 2], x[1, 2, 1, 0] = 127.0, 0.6, 12.7, 254.0
    pairs = int8_by(lambda token: token // 2)(x)
    assert pairs[0, 0, 0, 0] == 127.0 and pairs[0, 1, 0, 1] == 1.0  # one scale for tokens 0 and 1
    torch.testing.assert_close(pairs[0, 4, 1, 2], torch.tensor(12.7))  # the last token is a group of its own
    whole = int8_whole(x)
    assert whole[0, 1, 0, 1] == 1.0 and whole[0, 4, 1, 2] == 13.0 and whole[1, 2, 1, 0] == 254.0
    v = torch.tensor([448.0, 1.03, 0.5, 4.48]).reshape(1, 2, 1, 2)
    torch.testing.assert_close(
        e4m3_channels(v), torch.tensor([448.0, 1.0, 0.5, 4.48]).reshape(1, 2, 1, 2), rtol=0.04, atol=0
    )


@pytest.mark.parametrize(
    ("mine", "spec"),
    [
        (("row-block", "fp8", "k"), AttentionSpec(numerics="int8_fp8")),
        (("row-block", "fp8", "none"), AttentionSpec(numerics="int8_fp8", lowbit=LowBit(smooth_k=False))),
        (("row-block", "fp8", "kq"), AttentionSpec(numerics="int8_fp8", lowbit=LowBit(smooth_q=True))),
        (("row-block", "int8", "k"), AttentionSpec(numerics="sagebwd")),
        ((None, None, "none"), AttentionSpec()),
    ],
)
def test_the_librarys_own_numerics_are_among_them(act, mine, spec):
    torch.testing.assert_close(rounded(*mine)(act), through(spec)(act), atol=2e-5, rtol=1e-4)


def test_finer_scales_err_less(act):
    exact = through(AttentionSpec())(act)
    off = {name: float((run(act) - exact).norm() / exact.norm()) for name, run in SYSTEMS.items()}
    assert len(off) == 3 * len(QK) + 4 + 4 * len(QK)
    for smooth in ("none", "k", "kq"):
        coarse, *_, fine = (off[f"qk-{qk} smooth-{smooth}"] for qk in QK)
        assert fine < 0.8 * coarse
        assert off[f"qk-thread smooth-{smooth}"] < off[f"qk-block smooth-{smooth}"]
    assert all(off[f"qk-{qk} smooth-k"] < 0.8 * off[f"qk-{qk} smooth-none"] for qk in QK)
    assert off["pv-fp16"] < 1e-3 < off["pv-int8"] < off["pv-fp8"]


def test_the_command_writes_its_rows(tmp_path):
    case = GranularityCase(sigmas=(1,), length=160, size=16, seeds=2, weights="", name="small", results_folder=tmp_path)
    assert case.run() == 0
    found = json.loads((tmp_path / "small.json").read_text())
    assert {row["case"] for row in found["rows"]} == {"gaussian sigma 1"}
    assert [row["system"] for row in found["rows"] if row["metric"] == "cosine"] == list(SYSTEMS)
    with pytest.raises(ValueError, match=r"sigmas, seeds, length: \(1,\), 0, 160 given"):
        GranularityCase(sigmas=(1,), length=160, seeds=0).run()
