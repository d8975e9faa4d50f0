"""Small echo cancellers for tests, whose weights are moved so that no branch of them is all but zero."""

from dataclasses import replace

import torch

from allears.models.echo.config import PRESETS, EchoConfig
from allears.models.echo.model import EchoNet

SMALL = replace(PRESETS["test"], n_fft=64, hop=32, align_frames=12)
ABLATIONS = {
    "all": SMALL,
    "one-stage": replace(SMALL, progressive=False),
    "unaligned": replace(SMALL, alignment=False),
    "no-voice": replace(SMALL, voice=False),
    "no-gate": replace(SMALL, voice_gate=False),
    "three-taps": replace(SMALL, taps=3),
}


def make(config: EchoConfig = SMALL, seed: int = 0) -> EchoNet:
    torch.manual_seed(seed)
    net = EchoNet(config)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = 0.2 * torch.randn(value.shape)
                value.add_(noise.abs() if "running_var" in name else noise)
        if net.voice is not None:
            net.voice.weight.mul_(8.0)
            net.voice.bias.fill_(4.0)
    return net.eval()
