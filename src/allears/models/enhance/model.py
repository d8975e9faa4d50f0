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
        x = x + self.shift(x, time)
        x = x + self.look_along_time(x)
        x = x + self.look_along_frequency(x)
        return x + self.look_around(x)

    def shift(self, x: Tensor, time: Tensor) -> Tensor:
        """What the flow time adds, (B, 1, 1, C)."""
        return self.time(time)[:, None, None].to(x.dtype)

    def look_along_time(self, x: Tensor) -> Tensor:
        """What the attention along time adds to x; bands do not meet."""
        batch, frames, bands, channels = x.shape
        rows = self.time_norm(x).to(x.dtype).transpose(1, 2).reshape(batch * bands, frames, channels)
        return self.along_time(rows).view(batch, bands, frames, channels).transpose(1, 2)

    def look_along_frequency(self, x: Tensor) -> Tensor:
        """What the attention along frequency adds to x; frames do not meet."""
        batch, frames, bands, channels = x.shape
        columns = self.frequency_norm(x).to(x.dtype).reshape(batch * frames, bands, channels)
        return self.along_frequency(columns).view(batch, frames, bands, channels)

    def look_around(self, x: Tensor) -> Tensor:
        """What the gated convolution adds to x; a frame meets the next on either side."""
        return self.feed(self.feed_norm(x).to(x.dtype))


HALO_ROWS = 2
"""So many rows next to a cut lack neighbours in what a part of the network gives for a stretch of rows."""


class EnhanceNet(nn.Module):
    """Predicts the clean state x_0 from the state x_t, the noisy recording y and the flow time t.

    The output is ``mask * y + residual`` with a complex mask; an untrained network returns y. The parts of ``forward``
    work on any stretch of rows (a row is two frames); see :data:`HALO_ROWS` and ``slices.py``.
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
        x_t, y = pad_to_even(x_t), pad_to_even(y)
        time = self.embed(t)
        wide = self.enter_wide(x_t, y, time)
        half = self.enter_half(wide, time)
        h = self.enter_core(half)
        for block in self.blocks:
            h = block(h, time)
        half = self.leave_core(h, half, time)
        return self.leave_wide(half, wide, y, time)[:, :frames]

    def embed(self, t: Tensor) -> Tensor:
        """Flow times (B,) to what enters the blocks, (B, C)."""
        return F.silu(self.time(t))

    def enter_wide(self, x_t: Tensor, y: Tensor, time: Tensor) -> Tensor:
        """States (B, T, F, 2) to (B, T, F, C)."""
        magnitude = (y.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        return self.wide_in(self.enter(torch.cat([x_t, y, magnitude], dim=-1)), time)

    def enter_half(self, wide: Tensor, time: Tensor) -> Tensor:
        """(B, T, F, C) to (B, T/2, F/2, C')."""
        return self.half_in(self.to_half(wide), time)

    def enter_core(self, half: Tensor) -> Tensor:
        """(B, T/2, F/2, C') to (B, T/2, F/4, C"); rows do not meet."""
        return self.to_core(half) + self.band.to(half.dtype)

    def leave_core(self, h: Tensor, half: Tensor, time: Tensor) -> Tensor:
        """The core's output and what went in at half resolution, to (B, T/2, F/2, C')."""
        batch, rows, bands, _ = h.shape
        up = self.from_core(self.core_norm(h).to(h.dtype)).view(batch, rows, 2 * bands, -1)
        return self.half_out(self.half_merge(torch.cat([up, half], dim=-1)), time)

    def leave_wide(self, half: Tensor, wide: Tensor, y: Tensor, time: Tensor) -> Tensor:
        """The same one level up, then mask and residual on y: (B, T, F, 2) in float32."""
        batch, rows, bands, _ = half.shape
        up = self.from_half(half).view(batch, rows, bands, 2, 2, -1)
        up = up.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * bands, -1)
        wide = self.wide_out(self.wide_merge(torch.cat([up, wide], dim=-1)), time)
        out = self.leave(F.silu(self.leave_norm(wide).to(wide.dtype))).to(torch.float32)
        mask_real, mask_imag, real, imag = out.unbind(-1)
        y_real, y_imag = y.to(torch.float32).unbind(-1)
        return torch.stack(
            [mask_real * y_real - mask_imag * y_imag + real, mask_real * y_imag + mask_imag * y_real + imag], dim=-1
        )


def pad_to_even(state: Tensor) -> Tensor:
    """(B, T, F, 2) with a silent frame more if T is odd."""
    return F.pad(state, (0, 0, 0, 0, 0, 1)) if state.shape[1] % 2 else state
