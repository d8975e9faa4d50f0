"""Batches of painted videos for the video model: whole clips, or parts of them for cheap stages of training.

Shapes: B videos, K things, T frames, H rows, W columns, M words, N frames of tokens.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from allears.data.world import draw_spec
from allears.data.world_layout import Layout, lay_out
from allears.data.world_render import render
from allears.data.world_text import caption, encode
from allears.models.video.config import VideoConfig
from allears.train.ahead import Ahead, AheadInProcesses, Key

MOST_CUTS = 8
"""Most parts that are cut from one clip."""


@dataclass(frozen=True)
class Batch:
    """Captions in numbers (B, M) int64, and what there is to be seen, not painted yet; on the CPU."""

    tokens: Tensor
    layout: Layout


@dataclass(frozen=True)
class Part:
    """What of a clip a stage of training shows.

    Args:
        frames: shown of each clip; the configuration's for whole clips.
        spread: fewer frames are all those of some tokens, evenly spread over the clip, so that a token is what it is in
            a whole clip; not spread, they are a whole clip of a lower frame rate, in which tokens hold faster motion.
    """

    frames: int
    spread: bool = True

    def cuts(self, config: VideoConfig) -> int:
        """Into how many parts a painted clip is cut; 1 of whole clips.

        Raises:
            ValueError: the frames of tokens do not divide those of a whole clip.
        """
        config.with_frames(self.frames)
        if not self.spread or self.frames == config.frames:
            return 1
        if self.frames > config.frames or config.frames % self.frames:
            raise ValueError(f"frames: {self.frames} given; wanted a number that divides {config.frames}")
        return min(config.frames // self.frames, MOST_CUTS)

    def places(self, config: VideoConfig, first: Tensor) -> Tensor:
        """(..., N) int64, the frames of tokens that are shown, in a whole clip, from ``first`` (...) on."""
        shown = self.frames // config.patch[0]
        return first[..., None] + config.grid[0] // shown * torch.arange(shown)


def draw_batch(config: VideoConfig, batch: int, key: list[int], frames: int | None = None) -> Batch:
    """Specs of the training split with a caption each; the same ``key`` gives the same ones."""
    rng = np.random.default_rng(key)
    specs = [draw_spec(rng) for _ in range(batch)]
    tokens = [encode(caption(spec, rng), config.words, config.text_words) for spec in specs]
    return Batch(torch.tensor(tokens), lay_out(specs, frames or config.frames))


def world_videos(source: Batch, config: VideoConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch painted: videos (B, 3, T, H, W) in [-1, 1] and captions (B, M), on ``device``."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return 2 * render(source.layout, device, size_px=config.size_px) - 1, source.tokens.to(device)


def cut_clips(
    source: Batch, config: VideoConfig, part: Part, first: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of clips, painted: videos (B C, 3, T, H, W), captions (B C, M) and places (B C, N), with T of the part.

    Only what is shown is painted.

    Args:
        source: whole clips, B.
        part: spread; each clip gives C = ``part.cuts(config)`` parts.
        first: (B,) int64, the first frame of tokens of a clip's first part, below the whole clip's over the part's.
    """
    cuts, size, shown = part.cuts(config), config.patch[0], part.frames // config.patch[0]
    step = config.grid[0] // shown
    begin = (first[:, None] + torch.arange(cuts) * (step // cuts)) % step
    places = part.places(config, begin)  # (B, C, N)
    at = (places[..., None] * size + torch.arange(size)).flatten(1)  # (B, C T)
    layout = {field.name: getattr(source.layout, field.name) for field in fields(Layout)}
    for name in ("pan", "zoom"):
        layout[name] = layout[name].gather(1, at)
    for name in ("x", "y", "angle"):
        layout[name] = layout[name].gather(2, at[:, None].expand(-1, layout[name].shape[1], -1))
    videos, tokens = world_videos(replace(source, layout=Layout(**layout)), config, device)
    videos = videos.unflatten(2, (cuts, part.frames)).transpose(1, 2).flatten(0, 1)
    return videos, tokens.repeat_interleave(cuts, 0), places.flatten(0, 1).to(device, torch.float32)


class WorldData:
    """Batches of painted videos, seeded by the step; those of the next step are drawn meanwhile.

    Args:
        frames: of the clips; ``None``: the configuration's.
    """

    def __init__(
        self, config: VideoConfig, batch: int, seed: int, device: torch.device, frames: int | None = None
    ) -> None:
        self.config, self.batch, self.seed, self.device, self.frames = config, batch, seed, device, frames
        self._rank = int(os.environ.get("RANK", "0"))
        self._ahead = Ahead(self._draw)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Videos and captions, see :func:`world_videos`; a second call for the same step gives others."""
        return world_videos(self._ahead.take(step), self.config, self.device)

    def _draw(self, key: tuple[int, int]) -> Batch:
        return draw_batch(self.config, self.batch, [self.seed, self._rank, *key], self.frames)


def draw_part(
    config: VideoConfig, part: Part, clips: int, seeds: tuple[int, ...], key: Key
) -> tuple[np.ndarray, Mapping[str, np.ndarray], np.ndarray]:
    """Captions (B, M), the fields of a layout, and the first frame of tokens of each clip's first part (B,)."""
    whole = part.cuts(config) == 1
    source = draw_batch(config, clips, [*seeds, *key], part.frames if whole else None)
    first = np.random.default_rng([*seeds, *key, 3]).integers(config.frames // part.frames, size=clips)
    return source.tokens.numpy(), {name: value.numpy() for name, value in vars(source.layout).items()}, first


class PartData:
    """The same of parts of clips: videos, captions and the places of their tokens in time.

    Args:
        batch: parts a step, a multiple of the cuts of a clip.
        pool: processes that draw, so many steps ``ahead``; without them the next step's is drawn by a thread.

    Raises:
        ValueError: it is not, or the part does not fit the configuration.
    """

    def __init__(
        self,
        config: VideoConfig,
        batch: int,
        seed: int,
        device: torch.device,
        part: Part,
        pool: Executor | None = None,
        ahead: int = 8,
    ) -> None:
        cuts = part.cuts(config)
        if batch < 1 or batch % cuts:
            raise ValueError(f"batch: {batch} given; wanted a multiple of {cuts}, the parts of {part.frames} frames")
        self.config, self.part, self.device = config, part, device
        self._spread = cuts > 1
        draw = partial(draw_part, config, part, batch // cuts, (seed, int(os.environ.get("RANK", "0"))))
        self._ahead = Ahead(draw) if pool is None else AheadInProcesses(draw, pool, ahead)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Videos (B, 3, T, H, W), captions (B, M), and places (B, N) where parts are spread."""
        tokens, layout, first = self._ahead.take(step)
        fields_of = {name: torch.from_numpy(value) for name, value in layout.items()}
        source = Batch(torch.from_numpy(tokens), Layout(**fields_of))
        if not self._spread:
            return *world_videos(source, self.config, self.device), None
        return cut_clips(source, self.config, self.part, torch.from_numpy(first), self.device)
