"""The enhancer's network: a small U-Net over time and frequency whose core is dual-path attention.

Shapes: B batch, T frames, F bins, C channels; states are (B, T, F, 2), real and imaginary parts of the compressed
spectrum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.enhance.config import EnhanceConfig
from allears.nn.attention import ChannelsLastConv, GatedConv, SelfAttention
from allears.nn.timestep import TimestepEmbedding


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual; the flow time enters as a bias. (B, T, F, C) to the same."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first = ChannelsLastConv(channels, channels, kernel_size=3, padding=1)
        self.time = nn.Linear(embedding, channels)
        self.second = ChannelsLastConv(channels, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(self.norm(x).to(x.dtype)) + self.time(time)[:, None, None]
        return x + self.second(F.silu(h))


class DualPathBlock(nn.Module):
    """Attention along time in each band, attention along frequency in each frame, a gated convolution over both.

    The flow time enters as a bias. (B, T, F, C) to the same.
    """

    def __init__(self, channels: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.time = nn.Linear(embedding, channels)
        self.time_norm = nn.LayerNorm(channels)
        self.along_time = SelfAttention(channels, heads)
        self.frequency_norm = nn.LayerNorm(channels)
        self.along_frequency = SelfAttention(channels, heads, rope=False)
        self.feed_norm = nn.LayerNorm(channels)
        self.feed = GatedConv(channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, frames, bands, channels = x.shape
        x = x + self.time(time)[:, None, None].to(x.dtype)
        rows = self.time_norm(x).to(x.dtype).transpose(1, 2).reshape(batch * bands, frames, channels)
        x = x + self.along_time(rows).view(batch, bands, frames, channels).transpose(1, 2)
        columns = self.frequency_norm(x).to(x.dtype).view(batch * frames, bands, channels)
        x = x + self.along_frequency(columns).view(batch, frames, bands, channels)
        return x + self.feed(self.feed_norm(x).to(x.dtype))


class EnhanceNet(nn.Module):
    """Predicts the clean state x_0 from the state x_t, the noisy recording y and the flow time t.

    The output is ``mask * y + residual`` with a complex mask; an untrained network returns y.
    """

    def __init__(self, config: EnhanceConfig) -> None:
        super().__init__()
        self.config = config
        wide, half, core = config.widths
        self.time = TimestepEmbedding(core)
        self.enter = ChannelsLastConv(5, wide, kernel_size=3, padding=1)
        self.wide_in = ResBlock(wide, core)
        self.to_half = ChannelsLastConv(wide, half, kernel_size=2, stride=2)
        self.half_in = ResBlock(half, core)
        self.to_core = ChannelsLastConv(half, core, kernel_size=(1, 2), stride=(1, 2))
        self.band = nn.Parameter(0.02 * torch.randn((config.n_fft // 2 + 1) // 4, core))
        self.blocks = nn.ModuleList([DualPathBlock(core, config.heads, core) for _ in range(config.blocks)])
        self.core_norm = nn.LayerNorm(core)
        self.from_core = nn.Linear(core, 2 * half)
        self.half_merge = nn.Linear(2 * half, half)
        self.half_out = ResBlock(half, core)
        self.from_half = nn.Linear(half, 4 * wide)
        self.wide_merge = nn.Linear(2 * wide, wide)
        self.wide_out = ResBlock(wide, core)
        self.leave_norm = nn.LayerNorm(wide)
        self.leave = ChannelsLastConv(wide, 4, kernel_size=3, padding=1)
        nn.init.zeros_(self.leave.weight)
        with torch.no_grad():
            self.leave.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]

    def forward(self, x_t: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """x_t and y (B, T, F, 2), t (B,) in [0, 1]; returns (B, T, F, 2) in float32."""
        frames = y.shape[1]
        if frames % 2:
            x_t, y = (F.pad(state, (0, 0, 0, 0, 0, 1)) for state in (x_t, y))
        time = F.silu(self.time(t))
        magnitude = (y.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        wide = self.wide_in(self.enter(torch.cat([x_t, y, magnitude], dim=-1)), time)
        half = self.half_in(self.to_half(wide), time)
        h = self.to_core(half) + self.band.to(half.dtype)
        for block in self.blocks:
            h = block(h, time)
        batch, rows, bands, _ = h.shape
        up = self.from_core(self.core_norm(h).to(h.dtype)).view(batch, rows, 2 * bands, -1)
        half = self.half_out(self.half_merge(torch.cat([up, half], dim=-1)), time)
        up = self.from_half(half).view(batch, rows, 2 * bands, 2, 2, -1)
        up = up.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 4 * bands, -1)
        wide = self.wide_out(self.wide_merge(torch.cat([up, wide], dim=-1)), time)
        out = self.leave(F.silu(self.leave_norm(wide).to(wide.dtype))).to(torch.float32)
        mask_real, mask_imag, real, imag = out.unbind(-1)
        y_real, y_imag = y.to(torch.float32).unbind(-1)
        clean = torch.stack(
            [mask_real * y_real - mask_imag * y_imag + real, mask_real * y_imag + mask_imag * y_real + imag], dim=-1
        )
        return clean[:, :frames]
