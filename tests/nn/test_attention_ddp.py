"""Attention that trains in 8 bits or sparsely, data-parallel: two ranks (gloo) get the gradients of one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from allears import AttentionSpec, LowBit
from allears.nn.attention import SelfAttention
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import Sparsity
from allears.ops.attention.sparse_linear import SparseLinear

EIGHT = AttentionSpec(numerics="int8_fp8", lowbit=LowBit(backward="drop_in"))
LAYERS = {
    "exact": lambda: SelfAttention(32, 2),
    "sagebwd": lambda: SelfAttention(32, 2, spec=AttentionSpec(numerics="sagebwd"), causal=True),
    "int8_fp8": lambda: SelfAttention(32, 2, spec=EIGHT),
    "sparse": lambda: SelfAttention(32, 2, spec=AttentionSpec(sparse=Sparsity(keep=0.5))),
    "sparse-linear": lambda: SelfAttention(32, 2, core=SparseLinearAttention(2, 16, 0.4, SparseLinear(block_q=64))),
    "router": lambda: _soft(SelfAttention(32, 2, core=SparseLinearAttention(2, 16, 0.4, SparseLinear(block_q=64)))),
}


def _soft(layer):
    layer.core.set_stage("soft")
    return layer


def batch():
    return torch.randn(4, 150, 32, generator=torch.Generator().manual_seed(1))


def make(name):
    torch.manual_seed(0)
    return LAYERS[name]()


def step(model, x):
    """Gradients of every weight that has one, of a loss that is a mean over the batch."""
    model(x).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def worker(rank, folder, threads):
    torch.set_num_threads(threads)  # as here: sums of other threads differ in their last bits
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in LAYERS:
        model = DistributedDataParallel(make(name))
        found[name] = {key.removeprefix("module."): grad for key, grad in step(model, batch()[rank::2]).items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, (str(folder), torch.get_num_threads()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_two_ranks_get_the_gradients_of_one(ranks, name):
    model = make(name)
    wanted = step(copy.deepcopy(model), batch())
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert set(wanted) == trained and ("core.router.proj_q" in trained) == (name == "router")
    for found in (rank[name] for rank in ranks):
        assert set(found) == trained
        for key, grad in wanted.items():
            assert grad.abs().max() > 0
            torch.testing.assert_close(found[key], grad, atol=1e-6 * float(grad.abs().max()), rtol=1e-4)
    assert all(torch.equal(ranks[0][name][key], ranks[1][name][key]) for key in trained)
    alone = step(copy.deepcopy(model), batch()[0::2])  # of one rank's half: another gradient
    assert any(not torch.allclose(alone[key], wanted[key], rtol=1e-2) for key in trained)
