"""On a GPU: the changes run on the kernels made for them, at Wan's head size, and keep their errors."""

import pytest
import torch
from wan_standin import call_of, make, run

from allears import turbo

pytestmark = pytest.mark.gpu


def setting():
    model = make(num_attention_heads=2, attention_head_dim=128, ffn_dim=640).to("cuda", torch.bfloat16)
    call = {name: x.to("cuda") if name == "timestep" else x.to("cuda", torch.bfloat16) for name, x in CALL.items()}
    return model, call


CALL = call_of(make(num_attention_heads=2, attention_head_dim=128, ffn_dim=640), (5, 32, 52))  # 2080 tokens


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({"norms": True}, 0.02),
        ({"linear": "fp8_row"}, 0.1),
        ({"linear": "fp8_row", "norms": True}, 0.1),
        ({"linear": "int8_row", "norms": True}, 0.05),
        ({"linear": "int8_tile", "norms": True}, 0.05),
        ({"linear": "fp8_tile", "norms": True}, 0.1),
        ({"attention": turbo.Sparse(1.0), "linear": "fp8_row", "norms": True}, 0.15),
    ],
)
def test_errors_are_those_of_the_numbers(change, most):
    model, call = setting()
    wanted = run(model, call)
    spec = turbo.TurboSpec(**{"attention": None, "linear": None, "norms": False, **change})
    turbo.accelerate(model, spec)
    found = run(model, call)
    again = run(model, call)
    turbo.restore(model)
    assert ((found - wanted).norm() / wanted.norm()).item() < most and torch.equal(found, again)
    assert torch.equal(run(model, call), wanted) and next(model.parameters()).is_cuda


def test_replaced_weights_wait_in_the_hosts_memory():
    model, _ = setting()
    before = torch.cuda.memory_allocated()
    weight = model.blocks[0].ffn.net[2].weight
    turbo.accelerate(model, turbo.TurboSpec(attention=None))
    assert not weight.is_cuda and torch.cuda.memory_allocated() < before
    turbo.restore(model)
    assert weight.is_cuda


def test_two_experts_take_turns():
    from allears.turbo.experts import ExpertSwap

    models = {name: setting()[0] for name in ("transformer", "transformer_2")}
    call = setting()[1]
    wanted = {name: run(model, call) for name, model in models.items()}
    swap = ExpertSwap(models, "cuda")
    for name in ("transformer", "transformer_2", "transformer"):
        assert torch.equal(run(models[name], call), wanted[name])
        on_device = [key for key, model in models.items() if model.blocks[0].attn1.to_q.weight.is_cuda]
        assert on_device == [name]
    swap.undo()
    assert all(torch.equal(run(model, call), wanted[name]) for name, model in models.items())
