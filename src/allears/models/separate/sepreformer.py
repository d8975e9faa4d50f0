"""SepReformer (Shin et al., NeurIPS 2024) and FLA-SepReformer (Wang et al., Interspeech 2025): a U-Net in time on
learned features, which splits into one sequence for each talker on its way up.

Shapes: B batch, S samples, T frames at the full rate, L and S_k kernel and stride of the encoder, N its features,
F channels, J talkers, R stages.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.separate.config import SeparateConfig
from allears.models.separate.ega import relative_keys
from allears.models.separate.sepreformer_blocks import GlobalBlock, Halve, LocalBlock, SpeakerBlock, Split
from allears.nn.layer_scale import LayerScale
from allears.nn.linear import Linear
from allears.nn.norms import GlobalNorm
from allears.nn.slices import map_slices


class Separation(NamedTuple):
    """What a network makes of a mixture.

    Args:
        out: (B, J, S).
        auxiliary: of each stage of the decoder the same, or empty.
        features: (B, J, n, C), the last features of each talker before its output layer.
        energy: (B, J, n), of the talker's output at these places.
    """

    out: Tensor
    auxiliary: list[Tensor]
    features: Tensor
    energy: Tensor


class SepReformer(nn.Module):
    """Mixtures (B, S) of any length to J talkers each.

    Args:
        config: a separator of this family.
        aux_heads: with an output of each decoder stage's input, for training.
    """

    def __init__(self, config: SeparateConfig, aux_heads: bool = False) -> None:
        super().__init__()
        assert config.sepreformer is not None
        self.size = size = config.sepreformer
        self.talkers, self.attention = config.talkers, config.attention
        self.encoder = Linear(size.kernel, size.features, bias=False)
        self.norm = GlobalNorm(size.features)
        self.project = Linear(size.features, size.channels, bias=False)
        entries = 2 * size.max_distance
        table = None if config.attention == "fla" else torch.randn(entries, size.channels // size.heads)
        self.relative = None if table is None else nn.Parameter(table)
        ratios = [2 ** (size.stages - stage) for stage in range(size.stages + 1)]
        self.down = nn.ModuleList([nn.ModuleList(self._blocks(config, ratio)) for ratio in ratios])
        self.halve = nn.ModuleList([Halve(size.channels) for _ in range(size.stages)])
        self.split = Split(size.channels, config.talkers)
        self.merge = nn.ModuleList([Linear(2 * size.channels, size.channels) for _ in range(size.stages)])
        self.up = nn.ModuleList([nn.ModuleList(self._blocks(config, r, True)) for r in reversed(ratios[:-1])])
        self.head = OutputHead(size.channels, size.features, size.kernel, size.stride)
        heads = [OutputHead(size.channels, size.features, size.kernel, size.stride) for _ in range(size.stages)]
        self.auxiliary = nn.ModuleList(heads) if aux_heads else None
        for module in self.modules():
            if isinstance(module, LayerScale):
                nn.init.constant_(module.weight, size.layer_scale)

    @staticmethod
    def _blocks(config: SeparateConfig, ratio: int, per_talker: bool = False) -> list[nn.Module]:
        assert config.sepreformer is not None
        size, made = config.sepreformer, []
        for _ in range(3 if per_talker else 2):
            made += [GlobalBlock(config, size, ratio), LocalBlock(size)]
            made += [SpeakerBlock(size, config.talkers)] if per_talker else []
        return made

    def forward(self, mixture: Tensor, with_auxiliary: bool = False) -> Separation:
        """Mixtures (B, S) of about unit level; ``with_auxiliary`` also asks for the heads of the stages."""
        samples = mixture.shape[1]
        encoded = F.gelu(self.encoder(cut_frames(mixture, self.size.kernel, self.size.stride)))
        x = self.norm.project(encoded, self.project.weight)
        frames = encoded.shape[1]
        encoded = encoded if with_auxiliary or self.size.masked else None
        x = F.pad(x, (0, 0, 0, -frames % 2**self.size.stages))
        inputs, x = self._separate(x)
        x = x[:, :frames]
        out, energy = (
            self.head(x, samples) if not self.size.masked else self.head.masked(x, cast(Tensor, encoded), samples)
        )
        features = x.unflatten(0, (-1, self.talkers))
        stages = []
        if with_auxiliary:
            assert self.auxiliary is not None and encoded is not None
            rates = [2 ** (self.size.stages - stage) for stage in range(self.size.stages)]
            heads = cast(list[OutputHead], self.auxiliary)
            stages = [head.masked(y, encoded, samples, r)[0] for head, y, r in zip(heads, inputs, rates, strict=True)]
        by_talker = [y.unflatten(0, (-1, self.talkers)) for y in (out, energy, *stages)]
        return Separation(by_talker[0], by_talker[2:], features, by_talker[1])

    def _separate(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, T, F), T a multiple of 2^R, to the inputs of the decoder's stages and its output (B * J, T, F)."""
        relative = self.relative
        if self.attention == "published":
            relative = relative_keys(cast(Tensor, self.relative), x.shape[1] // 2**self.size.stages)
        skips, inputs = [], []
        for stage, halve in zip(self.down, self.halve, strict=False):
            x = _through(stage, x, relative)
            skips.append(self.split(x))
            x = halve(x)
        x = self.split(_through(self.down[-1], x, relative))
        for stage, merge in zip(self.up, self.merge, strict=True):
            if self.auxiliary is not None:
                inputs.append(x)
            x = _through(stage, _merge(cast(Linear, merge), x, skips.pop()), relative)
        return inputs, x


class OutputHead(nn.Module):
    """From features of a talker to its samples: F to 4 F, gate, to N features, and the decoder's filters.

    The main head as published gives features, so that its two last layers, with nothing between, are multiplied into
    one; that of a stage, and the main one of a masked network, gives a mask of the mixture's features, not below 0.
    """

    def __init__(self, channels: int, features: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.widen = Linear(channels, 4 * channels)
        self.narrow = Linear(2 * channels, features)
        self.decoder = Linear(features, kernel, bias=False)

    def forward(self, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """x (B * J, T, F) to samples (B * J, S) and the energy of each frame (B * J, T)."""
        frames = _wide(map_slices(self._frames, x, 4 * x.shape[-1]))
        return add_frames(frames, self.stride)[:, :samples], frames.square().mean(-1)

    def masked(self, x: Tensor, encoded: Tensor, samples: int, ratio: int = 1) -> tuple[Tensor, Tensor]:
        """x (B * J, T', F), a frame of which stands for ``ratio`` at the full rate, to a mask of encoded (B, T, N), and
        so to samples (B * J, S) and the energy of each frame (B * J, T)."""
        mask = self.narrow(F.glu(self.widen(x), dim=-1)).relu()
        if ratio > 1:
            mask = mask.repeat_interleave(ratio, dim=1)[:, : encoded.shape[1]]
        masked = mask.unflatten(0, (encoded.shape[0], -1)) * encoded.unsqueeze(1)
        frames = _wide(self.decoder(masked.flatten(0, 1)))
        return add_frames(frames, self.stride)[:, :samples], frames.square().mean(-1)

    def _frames(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.decoder.weight @ self.narrow.weight
            bias = F.linear(self.narrow.bias, self.decoder.weight)
        return F.linear(F.glu(self.widen(x), dim=-1), weight, bias)


def _through(blocks: nn.Module, x: Tensor, relative: Tensor | None) -> Tensor:
    for block in blocks.children():
        x = block(x, relative) if isinstance(block, GlobalBlock) else block(x)
    return x


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _merge(layer: Linear, x: Tensor, skip: Tensor) -> Tensor:
    """``layer`` of the channels of x (B, T / 2, F), each frame twice, and those of skip (B, T, F): the part of x is
    computed before it is repeated."""
    channels = x.shape[-1]
    low = F.linear(x, layer.weight[:, :channels], layer.bias)
    high = F.linear(skip, layer.weight[:, channels:])
    return (high.unflatten(1, (-1, 2)) + low.unsqueeze(2)).flatten(1, 2)


def cut_frames(x: Tensor, kernel: int, stride: int) -> Tensor:
    """x (B, S) to frames (B, T, kernel), ``stride`` apart, behind as many zeros as the last frame lacks."""
    ratio = kernel // stride
    short = (kernel - x.shape[1]) if x.shape[1] < kernel else -x.shape[1] % stride
    blocks = F.pad(x, (0, short)).unflatten(1, (-1, stride))
    return torch.cat([blocks[:, i : i + 1 - ratio or None] for i in range(ratio)], dim=2)


def add_frames(frames: Tensor, stride: int) -> Tensor:
    """frames (B, T, kernel) laid ``stride`` apart and added: (B, (T - 1) * stride + kernel)."""
    ratio = frames.shape[2] // stride
    blocks = frames.unflatten(2, (ratio, stride))
    total = F.pad(blocks[:, :, 0], (0, 0, 0, ratio - 1))
    for i in range(1, ratio):
        total = total + F.pad(blocks[:, :, i], (0, 0, i, ratio - 1 - i))
    return total.flatten(1)
