"""A video over two processes is the video of one: Ulysses by gloo, on the CPU, with any number of tokens."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from wan_standin import IMAGE, call_of, make, run

from allears import turbo
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.parallel import Stretch, check_heads, slice_core

SPECS = {
    "dense": turbo.TurboSpec(attention=None, linear=None, norms=False),
    "fused": turbo.TurboSpec(attention=None, linear=None, norms=True),
    "sparse": turbo.TurboSpec(turbo.Sparse(0.4, SparseLinear(block_q=64)), linear="int8_row", norms=True),
}
CASES = [("dense", {}, 1), ("fused", {}, 2), ("sparse", {}, 1), ("fused", IMAGE, 1)]
SIZE = (3, 14, 18)  # 189 tokens: 95 and 94


def cores_of(model):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in ("blocks.0.attn1", "blocks.1.attn1"):
        core = SparseLinearAttention(2, 16, 0.4, SparseLinear(block_q=64)).requires_grad_(False)
        for weight in core.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        found[name] = core
    return found


def run_case(spec, more, batch, group):
    model = make(**more)
    call = call_of(model, SIZE, batch=batch)
    if spec == "fused" and not more:
        call["timestep"] = torch.linspace(0, 900, 189).expand(batch, -1)  # a time for each token is split, too
    cores = cores_of(model) if spec == "sparse" else None
    plan = turbo.accelerate(model, SPECS[spec], cores=cores, group=group, inputs=None)
    out = run(model, call)
    turbo.restore(model)
    return plan, out, run(model, call)


def worker(rank, folder, threads):
    torch.set_num_threads(threads)  # as here: sums of other threads differ in their last bits
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for case in CASES:
        plan, out, plain = run_case(*case, group=())
        found.append((out, plain, str(plan)))
    with pytest.raises(ValueError, match=r"group: 2 ranks for 3 heads; wanted one of \[3\] ranks"):
        turbo.accelerate(make(num_attention_heads=3), SPECS["fused"], group=())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder), torch.get_num_threads()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c[0]}-{'image' if c[1] else c[2]}" for c in CASES])
def test_two_ranks_give_what_one_gives(outputs, index):
    _, wanted, plain = run_case(*CASES[index], group=None)
    for rank in range(2):
        out, restored, plan = outputs[rank][index]
        torch.testing.assert_close(out, wanted, atol=2e-4, rtol=1e-3)
        assert torch.equal(restored, plain) and "split over 2 ranks" in plan
    assert torch.equal(outputs[0][index][0], outputs[1][index][0])


def test_lengths_and_heads_are_split_evenly():
    stretch = Stretch.__new__(Stretch)
    stretch.rank, stretch.ranks, stretch.group = 1, 3, None
    assert stretch.sizes(11) == [4, 4, 3] and stretch.sizes(2) == [1, 1, 0]
    assert torch.equal(stretch.cut(torch.arange(11)[None]), torch.arange(4, 8)[None])
    with pytest.raises(ValueError, match=r"3 ranks for 40 heads; wanted one of \[2, 4, 5, 8, 10, 20, 40\] ranks"):
        check_heads(40, 3)
    core = SparseLinearAttention(6, 16, 0.5, SparseLinear(block_q=64), ratio_of_query=True)
    core.ratio.logit.data = torch.arange(6.0)
    part = slice_core(core, stretch)
    assert part.heads == 2 and part.ratio.logit.tolist() == [2.0, 3.0] and part.router.proj_q.shape[0] == 2
