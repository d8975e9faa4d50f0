"""The few-step sampler gives what its formula says, in the loop of a pipeline, and refuses what does not fit it."""

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from wan_standin import SMALL, Pipeline, make

from allears import turbo
from allears.turbo.steps import FewSteps, flow_times

ONLY_STEPS = {"attention": None, "linear": None, "norms": False}


def textbook(model_of, latents, text, steps, noises, condition=None):
    """rCM's sampler in float64 (arXiv 2510.08431, section 7.4 of the released recipe): x starts at t0 times noise."""
    angles = [math.atan(steps.sigma_max), *steps.middle_rad[: steps.count - 1], 0.0]
    times = [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles]
    x = latents.double() * times[0]
    for now, after in itertools.pairwise(times):
        seen = x.float() if condition is None else torch.cat([x.float(), condition], 1)
        call = {"hidden_states": seen, "timestep": torch.tensor([1000 * now]), "encoder_hidden_states": text}
        velocity = model_of(now)(**call, return_dict=False)[0].double()
        if steps.sampler == "ode":
            x = x - (now - after) * velocity
        else:
            x = (1 - after) * (x - now * velocity)
            x = x + after * next(noises).double() if after > 0 else x
    return x


def noises(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_a_pipeline_of_few_steps_equals_the_textbook(count, sampler):
    model, (latents, text) = make(), (torch.randn(1, 4, 3, 6, 10), torch.randn(1, 5, 24))
    steps = turbo.Steps(count, sampler=sampler, seed=5)
    pipeline = Pipeline(model, "the scheduler before")
    plan = turbo.accelerate(pipeline, turbo.TurboSpec(**ONLY_STEPS, steps=steps))
    assert plan.call == {"num_inference_steps": count, "guidance_scale": 1.0}
    assert f"call: pipe(..., num_inference_steps={count}, guidance_scale=1.0)" in str(plan)
    found = pipeline(latents, text, **plan.call)
    again = pipeline(latents, text, **plan.call)
    turbo.restore(pipeline)
    assert pipeline.scheduler == "the scheduler before" and not model._forward_pre_hooks
    wanted = textbook(lambda now: model, latents, text, steps, noises(5, latents.shape))
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(found, again)


@torch.no_grad()
def test_two_experts_and_a_condition_as_in_image_to_video():
    high, low = make(0, in_channels=7), make(1, in_channels=7)
    latents, text, image = torch.randn(1, 4, 3, 6, 10), torch.randn(1, 5, 24), torch.randn(1, 3, 3, 6, 10)
    steps = turbo.Steps(4, sigma_max=200.0, sampler="ode")
    pipeline = Pipeline(high, None, low, boundary_ratio=0.9)
    plan = turbo.accelerate(pipeline, turbo.TurboSpec(**ONLY_STEPS, steps=steps))
    found = pipeline(latents, text, image, **plan.call)
    turbo.restore(pipeline)
    times = flow_times(steps)
    assert [t >= 0.9 for t in times] == [True, True, False, False, False]
    wanted = textbook(lambda now: high if now >= 0.9 else low, latents, text, steps, None, image)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


def test_published_times():
    assert flow_times(turbo.Steps(4)) == pytest.approx((80 / 81, 0.93378, 0.85290, 0.60898, 0.0), abs=1e-5)
    assert flow_times(turbo.Steps(1, sigma_max=200.0)) == pytest.approx((200 / 201, 0.0))
    assert FewSteps(turbo.Steps(2)).timesteps.tolist() == pytest.approx([1000 * 80 / 81, 933.78], abs=1e-2)


def test_what_a_caller_may_do_wrong():
    pipeline = Pipeline(make(), None)
    turbo.accelerate(pipeline, turbo.TurboSpec(**ONLY_STEPS, steps=turbo.Steps(4)))
    latents, text = torch.randn(1, 4, 3, 6, 10), torch.randn(1, 5, 24)
    with pytest.raises(ValueError, match="num_inference_steps: 50 given, but the sampler was installed for 4"):
        pipeline(latents, text)
    with pytest.raises(ValueError, match=r"guidance_scale: 5.0 given, but a distilled model has its guidance built in"):
        pipeline(latents, text, num_inference_steps=4)
    sampler = FewSteps(turbo.Steps(1))
    sampler.step(latents, 0, latents)
    with pytest.raises(ValueError, match="1 steps are done"):
        sampler.step(latents, 0, latents)
    with pytest.raises(ValueError, match="timesteps: given"):
        sampler.set_timesteps(1, timesteps=[3])
    with pytest.raises(ValueError, match="count: 5 steps given; 3 angles in middle_rad allow 1 to 4"):
        turbo.Steps(5)
    with pytest.raises(ValueError, match=r"middle_rad: \(1.0, 1.2\) given; wanted angles that fall"):
        turbo.Steps(3, middle_rad=(1.0, 1.2))
    with pytest.raises(ValueError, match=r"fall from atan\(sigma_max\) = 1.1071 to 0"):
        turbo.Steps(2, sigma_max=2)
    with pytest.raises(ValueError, match="sampler: 'heun' given"):
        turbo.Steps(sampler="heun")
    with pytest.raises(ValueError, match="sigma_max: 0 given"):
        turbo.Steps(sigma_max=0)


@torch.no_grad()
@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers: pip install 'allears[hub]'")
@pytest.mark.parametrize("experts", [1, 2])
def test_the_stock_pipeline_of_diffusers(experts):
    pytest.importorskip("transformers")
    import diffusers

    models = [make(seed, "diffusers", in_channels=16, out_channels=16) for seed in range(experts)]
    names = ("transformer", "transformer_2")
    parts = dict.fromkeys(names) | dict(zip(names, models, strict=False))
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        boundary_ratio=0.9 if experts == 2 else None,
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 5, SMALL["text_dim"])
    call = {"prompt_embeds": text, "latents": latents, "output_type": "latent", "height": 64, "width": 64}
    call |= {"num_frames": 9}
    before = pipeline(**call, num_inference_steps=2, guidance_scale=1.0).frames
    spec = turbo.TurboSpec(attention=None, linear=None, norms=True, steps=turbo.Steps(3, sampler="ode"))
    plan = turbo.accelerate(pipeline, spec)
    assert f"{experts} transformer" in str(plan) and "UniPCMultistepScheduler -> FewSteps(3, ode" in str(plan)
    found = pipeline(**call, **plan.call).frames
    turbo.restore(pipeline)
    assert pipeline.scheduler is scheduler
    assert torch.equal(pipeline(**call, num_inference_steps=2, guidance_scale=1.0).frames, before)
    wanted = textbook(lambda now: models[-1] if now < 0.9 else models[0], latents, text, spec.steps, None)
    torch.testing.assert_close(found.double(), wanted, atol=5e-5, rtol=5e-5)
