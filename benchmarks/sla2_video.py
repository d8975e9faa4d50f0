"""The layers of the small video model over space and time, recorded for the comparison of sparse-linear attention.

Shapes: L tokens, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allears.models.video.loss import FlowLoss
from allears.models.video.model import VideoNet
from allears.recipes.video import WorldData
from allears.recipes.video_tune import NoisyVideos, calibration, load_teacher
from allears.turbo.sparse import record

from .sla2_systems import Layer


@dataclass(frozen=True)
class VideoLayers:
    """A trained video model, called with noisy videos of its world as in its training.

    Args:
        net: the dense network, on its device.
        samples: videos recorded, of as many noise levels.
        held_out: the last so many are for errors alone.
    """

    net: VideoNet
    samples: int
    held_out: int

    @classmethod
    def load(cls, name_or_stem: str, device: torch.device, samples: int, held_out: int) -> VideoLayers:
        """Of weights by name or path stem.

        Raises:
            WeightsError: nothing is found there, or it is of another model.
            ValueError: all samples would be held out.
        """
        if samples <= held_out:
            raise ValueError(f"bands: {samples} videos recorded, of which {held_out} are held out; record more")
        return cls(load_teacher(name_or_stem, device), samples, held_out)

    def record(self, count: int | None = None) -> list[Layer]:
        """All layers over space and time, or the first ``count``, each with its samples of q, k, v (L, H, D)."""
        place = next(self.net.parameters()).device

        def call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
                return model(*inputs)

        found = record(self.net, list(calibration(self.net, self.samples, 1)), samples=self.samples, call=call)
        layers = []
        for name in [f"blocks.{index}.attention" for index in range(self.net.config.layers)][:count]:
            samples = [sample.to(place) for sample in found.samples(name)]
            layers.append(Layer(name, samples[: -self.held_out], samples[-self.held_out :]))
        return layers

    def notes(self, name: str, count: int | None = None) -> str:
        """What :meth:`record` recorded, of all layers or the first ``count``."""
        config = self.net.config
        some = config.layers if count is None or count >= config.layers else f"the first {count} of {config.layers}"
        return (
            f"{some} layers over space and time of {name}: {config.tokens} tokens, {config.heads} heads of "
            f"{config.channels // config.heads}, in {self.samples} videos of the world at as many noise levels, the "
            f"last {self.held_out} held out"
        )

    def batches(self) -> tuple[NoisyVideos, list[Any]]:
        """Draws for the tuning, two videos each, and what it is validated on."""
        place = next(self.net.parameters()).device
        options = FlowLoss(drop_caption=0.0)
        return NoisyVideos(WorldData(self.net.config, 2, 7, place), options), list(
            calibration(self.net, 2, 2, seed=102)
        )
