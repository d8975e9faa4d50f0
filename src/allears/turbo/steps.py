"""The few-step sampler of a distilled model, in the place of a ``diffusers`` scheduler (rCM, arXiv 2510.08431).

A network that was distilled by rCM predicts, at flow time t, the velocity of x = (1 - t) x0 + t noise, and its guess
x0 = x - t v is final quality after few steps. Written to what diffusers' Wan pipelines ask of a scheduler; nothing of
the library is imported.

Shapes: B batch, C channels, F frames, Y rows, X columns of latents.
"""

import math
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from allears.diffusion.few_steps import few_step_angles
from allears.turbo.spec import Steps

TRAIN_TIMESTEPS = 1000  # Wan's networks are told 1000 t


def flow_times(steps: Steps) -> tuple[float, ...]:
    """Rectified-flow times sin t / (sin t + cos t) of the steps, falling, with a zero behind them."""
    angles = few_step_angles(steps.count, steps.sigma_max, steps.middle_rad)
    return tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles)


class FewSteps:
    """Scheduler of ``count`` steps at fixed times.

    The pipelines start from noise of unit size and hand it to the network as it is; at the first time t0 the network
    wants t0 times that. :meth:`scale_first` sees to it, as a hook before the network.

    Args:
        steps: how many, and when.
        pipeline: asked whether it runs guidance, which such a network has built in.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, steps: Steps, pipeline: Any = None) -> None:
        self.steps, self.times = steps, flow_times(steps)
        self.config = SimpleNamespace(num_train_timesteps=TRAIN_TIMESTEPS, prediction_type="flow_prediction")
        self.sigmas = torch.tensor(self.times)
        self.timesteps = self.sigmas[:-1] * TRAIN_TIMESTEPS
        self._index = 0
        self._generator: torch.Generator | None = None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None, **rest: Any) -> None:
        """Start a video.

        Raises:
            ValueError: another number of steps, times of the caller's, or guidance.
        """
        given = [name for name, value in rest.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: given, but the few-step sampler has its own times; set them in Steps")
        if num_inference_steps != self.steps.count:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps} given, but the sampler was installed for "
                f"{self.steps.count}; call the pipeline with num_inference_steps={self.steps.count}"
            )
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is not None and getattr(pipeline, "do_classifier_free_guidance", False):
            raise ValueError(
                f"guidance_scale: {getattr(pipeline, 'guidance_scale', None)} given, but a distilled model has its "
                f"guidance built in; call the pipeline with guidance_scale=1.0"
            )
        self.sigmas = torch.tensor(self.times)
        self.timesteps = (self.sigmas[:-1] * TRAIN_TIMESTEPS).to(device)
        self._index = 0
        self._generator = None
        if self.steps.seed is not None:
            self._generator = torch.Generator(device or "cpu").manual_seed(self.steps.seed)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that comes next."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """As it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **rest: Any
    ) -> tuple[Tensor] | SimpleNamespace:
        """From x at this time to x at the next: model_output v and sample x, both (B, C, F, Y, X), to x.

        Raises:
            ValueError: more steps than were set.
        """
        if self._index >= self.steps.count:
            raise ValueError(f"step: {self.steps.count} steps are done; call set_timesteps before another video")
        now, after = self.times[self._index], self.times[self._index + 1]
        x = sample.float()
        if self._index == 0:
            x = x * now
        velocity = model_output.float()
        if self.steps.sampler == "ode":
            x = x - (now - after) * velocity
        else:
            x = (1 - after) * (x - now * velocity)
            if after > 0:
                x = x + after * self._noise(x)
        self._index += 1
        x = x.to(sample.dtype)
        return SimpleNamespace(prev_sample=x) if return_dict else (x,)

    def scale_first(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """A forward pre-hook with keywords: the latents of the first step, which are the first channels of the input,
        as many as the network gives out, times the first time."""
        if self._index > 0:
            return None
        name = "hidden_states"
        x = kwargs[name] if name in kwargs else args[0]
        channels = getattr(model.config, "out_channels", None) or x.shape[1]  # pyrefly: ignore
        x = torch.cat([(x[:, :channels].float() * self.times[0]).to(x.dtype), x[:, channels:]], dim=1)
        if name in kwargs:
            return args, {**kwargs, name: x}
        return (x, *args[1:]), kwargs

    def _noise(self, x: Tensor) -> Tensor:
        if self._generator is None:
            return torch.randn_like(x)
        return torch.randn(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)

    def __len__(self) -> int:
        return TRAIN_TIMESTEPS
