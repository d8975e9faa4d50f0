"""Small video networks for tests."""

from dataclasses import replace

import torch

from allears.models.video import PRESETS
from allears.models.video.config import VideoConfig
from allears.models.video.model import VideoNet

BLOCKY = replace(PRESETS["test"], frames=16, size_px=32, tile=(4, 4, 4), layers=1)
"""512 tokens, which are 8 blocks of 64."""


def lively(config: VideoConfig) -> VideoNet:
    """An untrained network whose every path counts."""
    torch.manual_seed(0)
    net = VideoNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)
