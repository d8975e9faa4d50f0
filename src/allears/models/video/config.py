"""Configuration of the video model, and its sizes."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from allears.data.world_text import CAPTION_WORDS, WORDS
from allears.diffusion.few_steps import CODE_MIDDLE_RAD

Triple = tuple[int, int, int]

MOST_FEW_STEPS = len(CODE_MIDDLE_RAD) + 1
"""Most steps of the sampler for distilled weights."""


@dataclass(frozen=True)
class VideoConfig:
    """What defines a trained video model. Sizes are presets (:data:`PRESETS`).

    Args:
        frames, size_px, fps: of the videos, which are square.
        patch: frames, rows and columns of pixels that make a token.
        tile: frames, rows and columns of tokens that follow one another in the sequence, so that a block of keys is a
            cube of the video; (1, 1, 1) is plain row order.
        channels, heads, layers, hidden: of the transformer; a head takes channels / heads.
        text_channels, text_layers, text_heads: of the text encoder.
        text_words: longest caption.
        words: the vocabulary; number 0 fills up.
        predicts: what the last layer gives: the clean video (``data``; Li and He, "Back to basics", arXiv 2511.13720:
            pixels lie near a low-dimensional surface, noise does not) or the ``velocity``. The model as a whole gives
            the velocity either way.
        anchored: tokens are told their row, column and frame by sines and cosines that are added to them; without it
            they know but how far apart they are, from their rotary positions.
        shift: of the sampler's times, t = shift u / (1 + (shift - 1) u) of u evenly from 1 to 0 (Esser et al., 2024).
        steps, guidance: that the shipped weights are meant for; guidance 1 is none.
        distilled: the weights were distilled to a few steps, 1 to :data:`MOST_FEW_STEPS`, with fresh noise between them
            and without guidance (``sample.generate_few``).

    Raises:
        ValueError: sizes do not divide one another, or a value is out of its range.
    """

    frames: int = 32
    size_px: int = 64
    fps: int = 8
    patch: Triple = (2, 4, 4)
    tile: Triple = (4, 4, 4)
    channels: int = 256
    heads: int = 4
    layers: int = 6
    hidden: int = 832
    text_channels: int = 128
    text_layers: int = 2
    text_heads: int = 2
    text_words: int = CAPTION_WORDS
    words: tuple[str, ...] = WORDS
    predicts: Literal["data", "velocity"] = "data"
    anchored: bool = False
    shift: float = 3.0
    steps: int = 50
    guidance: float = 3.0
    distilled: bool = False

    def __post_init__(self) -> None:
        for name, size, part, tile in zip(
            ("frames", "size_px", "size_px"), self.video_shape, self.patch, self.tile, strict=True
        ):
            if part < 1 or tile < 1 or size < 1 or size % (part * tile):
                raise ValueError(f"{name}: {size} given; wanted a multiple of patch x tile, {part} x {tile}")
        for channels, heads in ((self.channels, self.heads), (self.text_channels, self.text_heads)):
            if heads < 1 or channels % heads or channels // heads % 2 or channels // heads < 6:
                raise ValueError(f"heads: {heads} must divide {channels} channels into heads of even size, 6 or more")
        if self.predicts not in ("data", "velocity"):
            raise ValueError(f"predicts: {self.predicts!r} given; wanted 'data' or 'velocity'")
        for name in ("shift", "guidance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; wanted more than 0")
        if self.distilled and not (1 <= self.steps <= MOST_FEW_STEPS and self.guidance == 1):
            raise ValueError(
                f"distilled: with {self.steps} steps and guidance {self.guidance:g}; distilled weights take 1 to "
                f"{MOST_FEW_STEPS} steps and guidance 1"
            )

    def with_frames(self, frames: int | None) -> "VideoConfig":
        """The same for clips of fewer frames, for which a tile may be shorter; ``None`` leaves them.

        Raises:
            ValueError: the frames do not make whole patches.
        """
        if frames is None or frames == self.frames:
            return self
        if frames < 1 or frames % self.patch[0]:
            raise ValueError(f"frames: {frames} given; wanted a multiple of {self.patch[0]}, the frames of a patch")
        tile = math.gcd(self.tile[0], frames // self.patch[0])
        return replace(self, frames=frames, tile=(tile, *self.tile[1:]))

    @property
    def video_shape(self) -> Triple:
        """T, H, W in pixels."""
        return self.frames, self.size_px, self.size_px

    @property
    def grid(self) -> Triple:
        """T, H, W in tokens."""
        return tuple(size // part for size, part in zip(self.video_shape, self.patch, strict=True))  # type: ignore

    @property
    def tokens(self) -> int:
        """Length of the sequence that self-attention sees."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    def step_flops(self) -> float:
        """Floating-point operations of one pass over one video; of them, attention in :meth:`attention_flops`."""
        own, feed = 4 * self.channels**2, 2 * self.channels * self.hidden
        cross = 2 * self.channels**2
        patch = 2 * 3 * self.patch[0] * self.patch[1] * self.patch[2] * self.channels
        return 2.0 * self.tokens * (self.layers * (own + cross + feed) + patch) + self.attention_flops()

    def attention_flops(self) -> float:
        """Operations of the products Q K^T and P V of self-attention, in one pass over one video."""
        return 4.0 * self.layers * self.tokens**2 * self.channels


_BASE = VideoConfig(anchored=True)
PRESETS: dict[str, VideoConfig] = {
    "test": replace(
        _BASE, frames=8, size_px=16, tile=(2, 2, 2), channels=32, heads=2, layers=2, hidden=64, text_channels=16
    ),
    "tiny": replace(
        _BASE, frames=16, size_px=32, patch=(4, 4, 4), channels=96, heads=2, layers=4, hidden=288, text_channels=48
    ),
    "base": _BASE,
}
"""``tiny`` (256 tokens) trains on a CPU in minutes, to see that all works; ``base`` (4,096 tokens) is shipped."""
