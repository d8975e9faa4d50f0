import pytest
import torch
from wan_standin import call_of, make, run

from allears import turbo
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.turbo.graphs import GraphedForward, Replayed, eager


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


NOTHING = {"attention": None, "linear": None, "norms": False}


def test_graphs_refuse_what_moves_weights_or_waits_for_others():
    with pytest.raises(ValueError, match="graphs, offload"):
        turbo.TurboSpec(graphs=True, offload="experts")
    with pytest.raises(ValueError, match="graphs, group"):
        turbo.accelerate(make(), turbo.TurboSpec(**NOTHING, graphs=True), group=())


def test_on_a_cpu_calls_run_as_always_and_restore_takes_the_graphs_back():
    model = make()
    call = call_of(model)
    wanted = run(model, call)
    plan = turbo.accelerate(model, turbo.TurboSpec(**NOTHING, graphs=True))
    assert [item.kind for item in plan.replaced()] == ["graphs"] and "graphs: 1 of 1 replaced" in str(plan)
    assert isinstance(model.forward, GraphedForward)
    assert all(torch.equal(run(model, call), wanted) for _ in range(3)) and not len(model.forward)
    turbo.restore(model)
    assert not isinstance(model.forward, GraphedForward) and torch.equal(run(model, call), wanted)


@pytest.mark.gpu
def test_a_graphed_transformer_gives_what_it_gave_for_each_shape_and_after_its_weights_move():
    model = make(num_attention_heads=2, attention_head_dim=64).to("cuda", torch.bfloat16)
    turbo.accelerate(model, turbo.TurboSpec(graphs=True, originals="stay"))
    graphed = model.forward
    draws = [call_of(model, size, seed=seed) for seed in (1, 2) for size in ((3, 6, 10), (3, 8, 10), (5, 16, 20))]
    draws = [{name: x.to("cuda", torch.bfloat16) for name, x in call.items()} for call in draws]
    with eager(model):
        wanted = [run(model, call) for call in draws]
    assert not len(graphed)
    found = [run(model, call) for call in draws * 3]
    assert all(torch.equal(one, wanted[index % 6]) for index, one in enumerate(found)), "outputs are not overwritten"
    assert len(graphed) == 2, "the least recently used is dropped"
    for part in model.modules():
        for weight in part.parameters(recurse=False):
            weight.data = weight.data.clone()
    assert torch.equal(run(model, draws[0]), wanted[0]) and torch.equal(run(model, draws[0]), wanted[0])
    with torch.enable_grad():
        assert torch.equal(model(**draws[1], return_dict=False)[0], wanted[1])
    turbo.restore(model)
    assert not len(graphed)
