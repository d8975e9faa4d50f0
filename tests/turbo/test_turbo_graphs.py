import pytest
import torch

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.turbo.graphs import Replayed


def test_samples_elsewhere_are_refused():
    with pytest.raises(ValueError, match="samples: on cpu"):
        Replayed(torch.nn.Identity(), torch.zeros(3))


@pytest.mark.gpu
def test_a_replay_equals_the_call_and_takes_other_inputs():
    core = SparseLinearAttention(2, 64, keep=0.2).cuda()
    draws = [[torch.randn(1, 1000, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)] for _ in range(3)]
    replayed = Replayed(core, *draws[0])
    for inputs in (draws[1], draws[2]):
        with torch.no_grad():
            wanted = core(*inputs)
        assert torch.equal(replayed(*inputs), wanted)
    assert torch.equal(replayed(*replayed.inputs), wanted), "the samples hold the last inputs"
    with pytest.raises(ValueError, match=r"inputs: torch\.bfloat16 \(1, 10, 2, 64\) given"):
        replayed(*(x[:, :10] for x in draws[1]))
    with pytest.raises(ValueError, match="inputs: 1 given"):
        replayed(draws[1][0])
