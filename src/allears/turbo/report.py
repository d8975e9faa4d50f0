"""The error that each replacement adds, layer by layer, and inputs to measure it on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allears.turbo.changes import Trial
from allears.turbo.plan import Kind, LayerError
from allears.turbo.wan.shapes import VideoSize, WanShape

IMAGE_TOKENS = 257  # of the image encoder of Wan 2.1's image to video


def random_inputs(
    model: Any, size: VideoSize, *, text_tokens: int = 512, timestep: float = 900.0, seed: int = 0
) -> dict[str, Tensor]:
    """Normal latents, text and image features for one call of a Wan transformer, in its dtype, on its device."""
    shape = WanShape.from_diffusers(model.config)
    generator = torch.Generator().manual_seed(seed)
    weight = model.patch_embedding.weight

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(weight.device, weight.dtype)

    inputs = {
        "hidden_states": normal(1, shape.in_channels, *size.latent),
        "timestep": torch.tensor([timestep], device=weight.device),
        "encoder_hidden_states": normal(1, text_tokens, shape.text_dim),
    }
    if shape.image_dim is not None:
        inputs["encoder_hidden_states_image"] = normal(1, IMAGE_TOKENS, shape.image_dim)
    return inputs


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over that of ``wanted``; 0 where both are 0."""
    difference = (found.float() - wanted.float()).norm()
    return float(difference / wanted.float().norm().clamp(min=1e-30))


@torch.no_grad()
def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What a transformer gives out."""
    return model(**{**inputs, "return_dict": False})[0]


@torch.no_grad()
def measure_layers(
    part: str, kind: Kind, model: nn.Module, trials: Mapping[str, Trial], inputs: Mapping[str, Any]
) -> list[LayerError]:
    """Run the model once as it is; beside each layer its replacement runs on the same input, and is dropped again."""
    errors: dict[str, float] = {}
    busy = False

    def watch(name: str, layer: nn.Module) -> Any:
        make = trials[name][1]

        def beside(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                errors[name] = relative_error(make()(*args, **kwargs), output)
            finally:
                busy = False

        return layer.register_forward_hook(beside, with_kwargs=True)

    hooks = [watch(name, layer) for name, (layer, _) in trials.items()]
    try:
        run_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [LayerError(part, name, kind, error) for name, error in errors.items()]
