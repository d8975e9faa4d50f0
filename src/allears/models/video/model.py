"""A diffusion transformer for video in the shape of Wan (Wan team, arXiv 2503.20314): self-attention over space and
time, cross-attention to the text, a feed-forward, modulated by the flow time.

As in Wan, one projection of the flow time serves all blocks, each of which adds its own offset to it, and padded words
are seen by the cross-attention, as what they are. Other than in Wan, the text encoder is small and trained along, and
tokens are patches of pixels.

Shapes: B batch, T frames, H rows, W columns, L tokens, M words, C channels, E of the text, P values of a patch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.video.config import VideoConfig
from allears.models.video.patches import place_waves, rope_3d, to_patches, to_video, token_places, turn
from allears.nn.attention import CrossAttention, SelfAttention
from allears.nn.timestep import TimestepEmbedding
from allears.ops.attention import AttentionSpec, attention

_FIRST_GATE = 0.25
_LEAST_T = 1e-3


class SpaceTimeAttention(SelfAttention):
    """x (B, L, C) to the same; queries and keys are normalised and turned by a table of rotary positions."""

    def __init__(self, channels: int, heads: int, spec: AttentionSpec) -> None:
        super().__init__(channels, heads, rope=False, qk_norm=True, spec=spec)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """x (B, L, C), table: cosines and signed sines, each (L, C / heads) or (B, L, C / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        assert self.q_norm is not None and self.k_norm is not None
        q, k = (
            turn(F.rms_norm(part, (self.head_dim,), norm.weight.to(part.dtype), norm.eps), table)
            for part, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        y = attention(q, k, v, self.spec) if self.core is None else self.core(q, k, v, None)
        return self.out(y.flatten(2))


class FeedForward(nn.Module):
    """(B, L, C) to the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, C) normalised over its channels, times 1 + scale (B, C) plus shift (B, C), in the dtype of x."""
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (y * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """16 bits as 32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Block(nn.Module):
    """(B, L, C) to the same."""

    def __init__(self, config: VideoConfig, spec: AttentionSpec) -> None:
        super().__init__()
        channels = config.channels
        self.modulation = nn.Parameter(torch.zeros(6, channels))
        self.attention = SpaceTimeAttention(channels, config.heads, spec)
        self.cross_norm = nn.LayerNorm(channels, eps=1e-6)
        self.cross = CrossAttention(channels, config.heads, config.text_channels, qk_norm=True)
        self.feed = FeedForward(channels, config.hidden)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, L, C), time (B, 6, C), context (B, M, E), table as in :class:`SpaceTimeAttention`."""
        shift, scale, gate, feed_shift, feed_scale, feed_gate = (time + self.modulation).unbind(1)
        x = torch.addcmul(x, gate[:, None].to(x.dtype), self.attention(modulate(x, shift, scale), table))
        x = x + self.cross(self.cross_norm(x).to(x.dtype), context)
        return torch.addcmul(x, feed_gate[:, None].to(x.dtype), self.feed(modulate(x, feed_shift, feed_scale)))


def call_block(block: nn.Module, x: Tensor, time: Tensor, context: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """``block(...)``, as a function that ``torch.compile`` compiles once for all blocks."""
    return block(x, time, context, table)


def compiled_blocks() -> Callable[..., Tensor]:
    """:func:`call_block` by ``torch.compile``, for :attr:`VideoNet.training_block`; what ``torch.func`` differentiates
    runs as it is, since the compiler does not follow forward mode."""
    compiled = torch.compile(call_block, dynamic=False)

    def run(block: nn.Module, *inputs: Any) -> Tensor:
        return (call_block if torch._C._are_functorch_transforms_active() else compiled)(block, *inputs)

    return run


class TextEncoder(nn.Module):
    """Numbers of words (B, M) to (B, M, E)."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        channels = config.text_channels
        self.embed = nn.Embedding(len(config.words), channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2 * config.text_layers))
        self.attentions = nn.ModuleList(SelfAttention(channels, config.text_heads) for _ in range(config.text_layers))
        self.feeds = nn.ModuleList(FeedForward(channels, 4 * channels) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, (attend, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attend(self.norms[2 * index](x))
            x = x + feed(self.norms[2 * index + 1](x))
        return self.norm(x)


class VideoNet(nn.Module):
    """The velocity dx/dt of the rectified flow from noise (t = 1) to videos (t = 0, in [-1, 1]).

    Args:
        config: sizes.
        spec: attention over space and time; the default is exact. Sparse-linear cores are put in by
            ``allears.turbo.sparse``, which finds these layers.
    """

    def __init__(self, config: VideoConfig, spec: AttentionSpec | None = None) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        values = 3 * config.patch[0] * config.patch[1] * config.patch[2]
        self.text = TextEncoder(config)
        self.time = TimestepEmbedding(channels)
        self.time_blocks = nn.Linear(channels, 6 * channels)
        self.enter = nn.Linear(values, channels)
        self.blocks = nn.ModuleList(Block(config, spec or AttentionSpec()) for _ in range(config.layers))
        self.leave_modulation = nn.Parameter(torch.zeros(2, channels))
        self.leave = nn.Linear(channels, values)
        self.training_block: Callable[..., Tensor] = call_block
        """Runs a block in training; may be ``torch.compile(call_block)``."""
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """x (B, 3, T, H, W), t (B,) in [0, 1], tokens (B, M) int64, zeros without a caption; returns the velocity
        (B, 3, T, H, W), in float32 at least. H and W may differ from the configuration's by whole tiles, T by whole
        patches.

        Args:
            places: of the frames of tokens in a whole clip, (T / patch,) or (B, T / patch), for a clip that lacks some
                of them. By default fewer frames are taken for a clip as long, of a lower frame rate.

        Raises:
            ValueError: the video is not made of whole tiles, or the batches differ.
        """
        return self.with_context(x, t, self.text(tokens), places)

    def with_context(self, x: Tensor, t: Tensor, context: Tensor, places: Tensor | None = None) -> Tensor:
        """The same from an encoded caption, (B, M, E): the same at all steps of a sampler."""
        config, frames = self.config, x.shape[2]
        grid = self._grid(x, t, context)
        patch, tile = config.patch, (math.gcd(config.tile[0], grid[0]), *config.tile[1:])
        if places is None and frames != config.frames:
            places = token_places(frames, config.frames, patch[0], x.device)
        table = rope_3d(grid, tile, config.channels // config.heads, x.device, places)
        h = self.enter(to_patches(x, patch, tile))
        if config.anchored:
            h = h + place_waves(grid, tile, config.channels, x.device, places).to(h.dtype)
        time = self.time(t)
        of_blocks = _wide(self.time_blocks(F.silu(time))).unflatten(-1, (6, -1))
        run = self.training_block if self.training else call_block
        for block in self.blocks:
            h = run(block, h, of_blocks, context, table)
        shift, scale = (_wide(time)[:, None] + self.leave_modulation).unbind(1)
        with torch.autocast(x.device.type, enabled=False):  # 16 bits here would be seen: v divides by t
            last = modulate(_wide(h), shift, scale)
            values = F.linear(last, _wide(self.leave.weight), _wide(self.leave.bias))
        out = to_video(values, tuple(x.shape[2:]), patch, tile)  # type: ignore
        if config.predicts == "velocity":
            return out
        return (x.to(out.dtype) - out) / t.to(out.dtype).clamp(min=_LEAST_T).view(-1, 1, 1, 1, 1)

    def attentions(self) -> list[SpaceTimeAttention]:
        """The attention over space and time of each block, first to last."""
        return [block.attention for block in self.blocks]  # pyrefly: ignore

    def _grid(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[int, int, int]:
        units = [part * tile for part, tile in zip(self.config.patch, (1, *self.config.tile[1:]), strict=True)]
        if x.dim() != 5 or x.shape[1] != 3 or any(size % unit for size, unit in zip(x.shape[2:], units, strict=True)):
            raise ValueError(f"x: {tuple(x.shape)} given; wanted (B, 3, T, H, W) with T, H, W multiples of {units}")
        if not len(x) == len(t) == len(context):
            raise ValueError(
                f"x, t, tokens: {len(x)}, {len(t)} and {len(context)} entries given; wanted as many of each"
            )
        frames, rows, columns = (size // part for size, part in zip(x.shape[2:], self.config.patch, strict=True))
        return frames, rows, columns

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier weights; what the flow time adds, and the output, begin at 0, and the gates at 0.25."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.normal_(self.text.embed.weight, std=0.5)
        for layer in (self.time_blocks, self.leave):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            block.modulation[2] = block.modulation[5] = _FIRST_GATE  # type: ignore[index]


def use_attention(model: VideoNet, spec: AttentionSpec) -> None:
    """Give every block of ``model`` another attention over space and time, in place.

    Raises:
        ValueError: ``spec`` is causal.
    """
    if spec.causal:
        raise ValueError("spec: causal=True given; a frame of a video sees all others here, so use causal=False")
    for layer in model.attentions():
        layer.spec = spec
