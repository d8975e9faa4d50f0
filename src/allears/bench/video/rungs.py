"""The rungs of the ladder: what each system changes, how often it calls the network, and how far off it may be.

Weights are random, in bfloat16, where diffusers keeps layers in float32 in float32: time does not depend on them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from allears.bench.attention.peers import UnavailableError
from allears.bench.video.settings import QUICK, Settings
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo import Sparse, Steps, TurboSpec, accelerate, restore
from allears.turbo.wan.load import build_wan, fill_buffers, keeps_float32
from allears.turbo.wan.shapes import VIDEO_480P, VIDEO_720P, WAN_1_3B, WAN_14B, VideoSize, WanShape

STOCK_CALLS = 100  # 50 steps, each with and without the text
_TINY = WanShape(layers=2, heads=2, ffn_dim=96, head_dim=32, text_dim=24, freq_dim=16)

SIZES: dict[str, tuple[WanShape, VideoSize]] = {
    "1.3B-480p": (WAN_1_3B, VIDEO_480P),
    "14B-720p": (WAN_14B, VIDEO_720P),
    QUICK: (_TINY, VideoSize(9, 128, 128)),
}


@dataclass(frozen=True)
class Rung:
    """A system.

    Args:
        name: of it.
        spec: what is changed by :func:`allears.turbo.accelerate`; ``None``: nothing.
        calls: of the network for a video.
        most: largest relative error against the stock network that it gets a speed with; ``None``: any finite output.
            Sparse attention with random weights is far from dense: there the error says nothing.
        prepare: another change of the model; gives back the way to undo it.
        sampled: time whole videos, instead of so many calls.
    """

    name: str
    spec: TurboSpec | None = None
    calls: int = STOCK_CALLS
    most: float | None = None
    prepare: Callable[[nn.Module], Callable[[], object]] | None = None
    sampled: Steps | None = None

    def install(self, model: nn.Module) -> tuple[Callable[[], object], str]:
        """Change the model; gives back the way to undo it, and what was done."""
        if self.prepare is not None:
            return self.prepare(model), ""
        if self.spec is None:
            return lambda: None, ""
        plan = accelerate(model, self.spec)
        return lambda: restore(model), str(plan)


def rungs(settings: Settings) -> list[Rung]:
    """Those that the settings name, in their order."""
    sparse = Sparse(settings.keep, SparseLinear(precision="int8_fp8"))
    nothing = TurboSpec(attention=None, linear=None, norms=False, originals="stay")
    eight = replace(nothing, linear=settings.linear)
    every = replace(eight, attention=sparse, norms=True, graphs=settings.graphs)
    known = [
        Rung("diffusers"),
        Rung("allears-4step", every, calls=4, sampled=Steps(4, seed=settings.seed)),
        Rung("allears-3step", every, calls=3, sampled=Steps(3, seed=settings.seed)),
        Rung("allears-50step", every),
        Rung("w8a8-norms", replace(eight, norms=True), most=0.3),
        Rung("sla2", replace(nothing, attention=sparse)),
        Rung("norms", replace(nothing, norms=True), most=0.03),
        Rung("w8a8", eight, most=0.3),
        Rung("steps", calls=4),
        Rung("diffusers-compile", most=0.03, prepare=_compile),
        Rung("sage", most=0.3, prepare=_sage),
    ]
    by_name = {rung.name: rung for rung in known}
    return [by_name[name] for name in settings.systems]


@torch.no_grad()
def make_model(shape: WanShape, device: torch.device, seed: int) -> Any:
    """diffusers' transformer of these sizes with random weights.

    Raises:
        UnavailableError: diffusers is not installed.
    """
    try:
        model = build_wan(shape)
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    for name, parameter in model.named_parameters():
        kind = torch.float32 if keeps_float32(model, name) else torch.bfloat16
        parameter.data = parameter.data.to(kind)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter.shape[-1] if "scale_shift_table" in name else parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    fill_buffers(model)
    return model.to(device).eval().requires_grad_(False)


def _compile(model: Any) -> Callable[[], object]:
    """torch.compile of each block, which is what repeats: compiled once."""
    blocks = list(model.blocks)
    for block in blocks:
        block.compile()

    def undo() -> None:
        for block in blocks:
            block._compiled_call_impl = None

    return undo


def _sage(model: Any) -> Callable[[], object]:
    try:
        model.set_attention_backend("sage")
    except Exception as error:  # whatever diffusers says of a package that is missing or too old
        raise UnavailableError(f"diffusers' backend 'sage': {error}") from error
    return model.reset_attention_backend


def sample_video(model: Any, sampler: Any, latents: Tensor, text: Tensor) -> Tensor:
    """The loop of diffusers' pipelines, without guidance: noise (1, C, F, Y, X) to clean latents of the same shape."""
    hook = model.register_forward_pre_hook(sampler.scale_first, with_kwargs=True)
    try:
        sampler.set_timesteps(sampler.steps.count, device=latents.device)
        for time in sampler.timesteps:
            call = {"timestep": time.expand(latents.shape[0]), "encoder_hidden_states": text, "return_dict": False}
            velocity = model(hidden_states=latents.to(text.dtype), **call)[0]
            (latents,) = sampler.step(velocity, time, latents, return_dict=False)
        return latents
    finally:
        hook.remove()
