"""Estimates of memory add up, and two experts take turns on the device."""

import pytest
import torch
from wan_standin import Pipeline, call_of, make, run

from allears import turbo
from allears.turbo.experts import ExpertSwap
from allears.turbo.wan.shapes import VIDEO_480P, VIDEO_720P, WAN_1_3B, WAN_14B, WAN_22_I2V, VideoSize

EIGHT = turbo.TurboSpec(linear="fp8_row")


def test_tokens_and_operations_are_those_of_the_papers():
    assert (VIDEO_480P.tokens(), VIDEO_720P.tokens()) == (32_760, 75_600)
    ops = WAN_1_3B.tera_ops(32_760)
    assert ops == pytest.approx({"linear": 82.07, "self_attention": 197.8, "cross_attention": 3.09}, rel=1e-3)
    assert WAN_14B.tera_ops(75_600)["self_attention"] == pytest.approx(40 * 4 * 75_600**2 * 5120 / 1e12)
    with pytest.raises(ValueError, match=r"frames: 80 given; wanted 1 \+ 4 n"):
        VideoSize(80)
    with pytest.raises(ValueError, match="height: 470 pixels given; wanted a multiple of 16"):
        VideoSize(81, 470)


def test_weights_are_counted_to_the_byte():
    stock = turbo.estimate_memory(WAN_14B, VIDEO_720P)
    assert stock.weight_bytes == 2 * 14_288_491_584 and stock.original_bytes == stock.host_bytes == 0
    eight = turbo.estimate_memory(WAN_14B, VIDEO_720P, EIGHT)
    linear = 40 * WAN_14B.block_parameters()
    assert stock.weight_bytes - eight.weight_bytes == linear and eight.host_bytes == 2 * linear
    kept = turbo.estimate_memory(WAN_14B, VIDEO_720P, turbo.TurboSpec(originals="stay"))
    assert kept.original_bytes == 2 * linear and kept.host_bytes == 0
    gone = turbo.estimate_memory(WAN_14B, VIDEO_720P, turbo.TurboSpec(originals="drop"))
    assert gone.peak_bytes == eight.peak_bytes and gone.host_bytes == 0
    assert f"{eight.peak_bytes / 1e9:.1f} GB at the peak" in str(eight)


def test_swapping_and_splitting_save_what_they_say():
    both = turbo.estimate_memory(WAN_22_I2V, VIDEO_720P, EIGHT, experts=2)
    swap = turbo.estimate_memory(WAN_22_I2V, VIDEO_720P, turbo.TurboSpec(offload="experts"), experts=2)
    linear = 40 * WAN_22_I2V.block_parameters()
    assert both.weight_bytes - swap.weight_bytes == linear and swap.host_bytes == both.host_bytes + 2 * linear
    halves = [turbo.estimate_memory(WAN_14B, VIDEO_720P, EIGHT, ranks=ranks).activation_bytes for ranks in (1, 2)]
    assert halves[0] - halves[1] == pytest.approx(halves[1] - 2**28, rel=1e-6)


def pair():
    return {"transformer": make(0), "transformer_2": make(1)}


def addresses(model):
    return [tensor.data_ptr() for tensor in model.blocks.parameters()]


def test_one_expert_at_a_time(monkeypatch):
    models = pair()
    state = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    brought = []
    monkeypatch.setattr(ExpertSwap, "_bring", lambda swap, host: brought.append(host.clone()) or brought[-1])
    swap = ExpertSwap(models, "cpu")
    hosts = {name: addresses(model) for name, model in models.items()}
    for name in ("transformer", "transformer", "transformer_2", "transformer"):
        swap.load(name)
        assert [key for key, model in models.items() if addresses(model) != hosts[key]] == [name]
    each = len(hosts["transformer"])
    assert swap.swaps == 2 and len(brought) == 3 * each and addresses(models["transformer_2"]) == hosts["transformer_2"]
    with pytest.raises(ValueError, match="swapping needs two experts"):
        ExpertSwap({"transformer": models["transformer"]}, "cpu")
    monkeypatch.undo()
    swap.undo()
    swap = ExpertSwap(models, "cpu")
    calls = {name: call_of(model) for name, model in models.items()}
    for name, model in models.items():
        run(model, calls[name])
        assert swap.resident == name
    swap.undo()
    swap.undo()
    for name, model in models.items():
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state[name].items())
        assert not model._forward_pre_hooks


def test_a_pipeline_swaps_its_experts_once_a_video():
    parts = pair()
    pipeline = Pipeline(parts["transformer"], None, parts["transformer_2"], boundary_ratio=0.9)
    latents, text = torch.randn(1, 4, 3, 6, 10), torch.randn(1, 5, 24)
    steps = turbo.Steps(4, sampler="ode")
    spec = turbo.TurboSpec(attention=None, linear="int8_row", steps=steps)
    plan = turbo.accelerate(pipeline, spec)
    wanted = pipeline(latents, text, **plan.call)
    turbo.restore(pipeline)
    plan = turbo.accelerate(pipeline, turbo.TurboSpec(None, "int8_row", True, steps, offload="experts"), device="cpu")
    assert torch.equal(pipeline(latents, text, **plan.call), wanted)
    assert "offload: of two experts the one that runs is on cpu" in str(plan)
    turbo.restore(pipeline)
    alone = make()
    plan = turbo.accelerate(alone, turbo.TurboSpec(None, None, True, offload="experts"))
    assert "there is one expert" in str(plan)
