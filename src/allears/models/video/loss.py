"""Training loss of the video model: rectified flow (Liu et al., 2022), some captions left out for guidance.

Shapes: B videos, T frames, H rows, W columns, M words.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allears.diffusion.path import LinearPath

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x_t (B, 3, T, H, W), t (B,), words (B, M) to the velocity (B, 3, T, H, W): the network, or what stands for it."""


@dataclass(frozen=True)
class FlowLoss:
    """How flow times and captions are drawn.

    Args:
        mean, deviation: of logit t, which is normal (Esser et al., 2024). Videos of flat colours are seen through much
            noise, so most times are near 1.
        uniform: share of times drawn evenly from [0, 1] in place of that.
        least_t: below it errors are those of the clean video over ``least_t`` in place of t, lest rare draws weigh
            most.
        drop_caption: share of videos trained without their caption, for classifier-free guidance.
    """

    mean: float = 0.8
    deviation: float = 1.0
    uniform: float = 0.05
    least_t: float = 0.1
    drop_caption: float = 0.1

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise ValueError(f"deviation: {self.deviation} given; wanted more than 0")
        for name in ("uniform", "least_t", "drop_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; wanted a share, 0 to 1")


def draw_times(batch: int, options: FlowLoss, generator: torch.Generator) -> Tensor:
    """(B,) in (0, 1), on the generator's device."""
    device = generator.device
    normal = torch.randn(batch, generator=generator, device=device)
    even, choice = torch.rand(2, batch, generator=generator, device=device)
    return torch.where(choice < options.uniform, even, torch.sigmoid(options.mean + options.deviation * normal))


def flow_loss(
    net: Velocity,
    videos: Tensor,
    tokens: Tensor,
    options: FlowLoss,
    generator: torch.Generator,
    places: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the velocity (less at small times, see ``options``), and parts of it for the log.

    Args:
        net: the velocity.
        videos: (B, 3, T, H, W) in [-1, 1].
        tokens: (B, M), captions in numbers.
        generator: of times, noise and dropped captions, on the videos' device.
        places: given to ``net`` too where there are some; see :class:`allears.models.video.model.VideoNet`.

    Returns:
        The loss (), and ``early`` and ``late``: its mean over clips with t above and below 0.7.
    """
    path = LinearPath(1.0)
    t = draw_times(len(videos), options, generator).to(videos.device)
    noise = path.noise(videos, generator)
    dropped = torch.rand(len(videos), generator=generator, device=generator.device).to(videos.device)
    tokens = torch.where(dropped[:, None] < options.drop_caption, torch.zeros_like(tokens), tokens)
    x_t = path.sample(videos, torch.zeros_like(videos), t, noise)
    weight = (t / t.clamp(min=options.least_t)).square() if options.least_t else torch.ones_like(t)
    found = net(x_t, t, tokens) if places is None else net(x_t, t, tokens, places)  # type: ignore[call-arg]
    off = weight * (found - (noise - videos)).square().mean((1, 2, 3, 4))
    early = t > 0.7
    with torch.no_grad():
        parts = {
            "early": (off * early).sum() / early.sum().clamp(min=1),
            "late": (off * ~early).sum() / (~early).sum().clamp(min=1),
        }
    return off.mean(), parts
