"""What a video of the small world shows, measured: which pixels are of which colour, how the camera moves, and which
outline fits a thing best.

Shapes: T frames, H rows, W columns, F frames looked at, N outlines, P pixels of a window, S places of a window.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.data.world import BACKGROUNDS, COLOURS, SHAPES
from allears.data.world_render import STRIPE, outline

_LIGHTS = (1.12, 1.0, 0.86, STRIPE)
_RADII = tuple(0.075 * 1.12**step for step in range(11))
_SYMMETRY = {"ball": (1, 1), "box": (4, 6), "triangle": (3, 8), "star": (5, 5)}
_WINDOW, _REACH = 0.3, 0.13
_WALL = 0.42
_GAP_FRAMES = 8


def nearest_background(frames: Tensor) -> str:
    """The background whose wall is nearest to the upper rows of frames (T, 3, H, W)."""
    top = frames[:, :, : max(1, frames.shape[2] // 4)].transpose(0, 1).flatten(1).median(1).values
    walls = torch.tensor([wall for wall, _ in BACKGROUNDS.values()], device=frames.device) / 255.0
    return tuple(BACKGROUNDS)[int((walls - top).square().sum(1).argmin())]


def label_colours(frames: Tensor, background: str, colours: tuple[str, ...] = tuple(COLOURS)) -> Tensor:
    """For each pixel of frames (T, 3, H, W) the place of its colour in ``colours``, or -1 for wall and floor, (T, H, W)
    int64: whichever is nearest in RGB, lit and shaded ones among them.
    """
    entries, labels = [], []
    for index, colour in enumerate(colours):
        for light in _LIGHTS:
            entries.append([min(255.0, light * part) for part in COLOURS[colour]])
            labels.append(index)
    for tone in BACKGROUNDS[background]:
        for shift in (-16, 0, 16):
            entries.append([part + shift for part in tone])
            labels.append(-1)
    palette = torch.tensor(entries, device=frames.device) / 255.0
    pixels = frames.permute(0, 2, 3, 1)
    nearest = (pixels @ (-2 * palette.T) + palette.square().sum(1)).argmin(-1)
    return torch.tensor(labels, device=frames.device)[nearest]


def cores(mask: Tensor) -> Tensor:
    """Pixels of mask (T, H, W) whose eight neighbours are in it too: without the blended ones along edges."""
    return -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)[:, 0] > 0.5


@dataclass(frozen=True)
class Camera:
    """How the camera moved over the whole clip: ``pan`` in frame widths to the right, ``zoom`` as a ratio."""

    pan: float
    zoom: float

    @property
    def kind(self) -> str:
        """The word for it, of ``allears.data.world.CAMERAS``."""
        if abs(self.pan) > 0.13:
            return "pans right" if self.pan > 0 else "pans left"
        if abs(math.log(self.zoom)) > 0.17:
            return "zooms in" if self.zoom > 1 else "zooms out"
        return "still"


def measure_camera(frames: Tensor, wall: Tensor) -> Camera:
    """From the bands on the wall: which pan, or which zoom, of a list carries each frame best into one 8 frames later.

    Args:
        frames: (T, 3, H, W).
        wall: (T, H, W), pixels of wall and floor.
    """
    count, width = frames.shape[0], frames.shape[-1]
    rows = max(1, int(_WALL * frames.shape[2]))
    gap = min(_GAP_FRAMES, count - 1)
    seen = wall[:, :rows].float()
    weight = seen.sum(1)
    profile = (frames.mean(1)[:, :rows] * seen).sum(1) / weight.clamp(min=1.0)
    pans = torch.linspace(-0.6, 0.6, 49)
    zooms = torch.linspace(-0.7, 0.7, 29)
    pan = torch.cat([pans, torch.zeros(29)]).to(frames.device)
    zoom = torch.cat([torch.zeros(49), zooms]).to(frames.device)
    share, time = gap / (count - 1), torch.arange(count - gap, device=frames.device) / (count - 1)
    x = (torch.arange(width, device=frames.device) + 0.5) / width - 0.5
    magnified = torch.exp(zoom[:, None] * (time - 0.5))  # (N, F)
    source = x * torch.exp(-zoom * share)[:, None, None] + (pan * share)[:, None, None] * magnified[..., None]
    place = ((source + 0.5) * width - 0.5).clamp(-1.0, float(width))
    low = place.floor().clamp(0, width - 2)
    part, low = place - low, low.long()
    inside = (place >= 0) & (place <= width - 1)

    def at(rows_: Tensor) -> Tensor:
        rows_ = rows_[None, :-gap].expand(place.shape[0], -1, -1)
        return torch.lerp(rows_.gather(2, low), rows_.gather(2, low + 1), part.clamp(0, 1))

    trust = inside * torch.minimum(at(weight), weight[None, gap:])
    off = ((at(profile) - profile[None, gap:]).abs() * trust).sum((1, 2)) / trust.sum((1, 2)).clamp(min=1.0)
    best = int(off.argmin())
    return Camera(float(pan[best]), float(zoom[best].exp()))


@dataclass(frozen=True)
class Outlines:
    """Filled outlines in a window, (N, P); of each its shape (N,) and its radius in widths (N,); the window's side."""

    covers: Tensor
    shape: Tensor
    radius: Tensor
    side: int


@lru_cache(maxsize=8)
def outlines(size_px: int, device: torch.device) -> Outlines:
    """All shapes at all radii and turns that are tried."""
    half = math.ceil(_WINDOW * size_px)
    grid = torch.arange(-half, half + 1, dtype=torch.float32, device=device)
    covers, shapes, radii = [], [], []
    for shape, (fold, turns) in _SYMMETRY.items():
        for radius in _RADII:
            size = radius * size_px
            for turn in range(turns):
                angle = 2 * math.pi * turn / (fold * turns)
                x = (grid * math.cos(angle) + grid[:, None] * math.sin(angle)) / size
                y = (grid[:, None] * math.cos(angle) - grid * math.sin(angle)) / size
                covers.append((0.5 - outline(shape, x, y) * size).clamp(0, 1).flatten())
                shapes.append(SHAPES.index(shape))
                radii.append(radius)
    tensors = torch.stack(covers), torch.tensor(shapes, device=device), torch.tensor(radii, device=device)
    return Outlines(*tensors, 2 * half + 1)


@dataclass(frozen=True)
class Fit:
    """The best outline in each frame: its place in the list, where its middle is in pixels, and how well it fits.

    Args:
        index, row, column: (F,) int64.
        score: (F,), pixels covered rightly less those covered wrongly.
    """

    index: Tensor
    row: Tensor
    column: Tensor
    score: Tensor


def fit_outlines(own: Tensor, other: Tensor, allowed: Tensor | None = None, reach: float = _REACH) -> Fit:
    """Lay every outline on a thing's pixels, near their middle, and keep the one that covers them best.

    Pixels of ``other`` count for nothing: the thing may go on behind them. So do those outside of the frame.

    Args:
        own, other: (F, H, W), pixels of the thing and of the other one; ``own`` has at least one in each frame.
        allowed: (N,), outlines to try; ``None`` tries all.
        reach: how far from the middle of its pixels the middle of the thing is sought, in frame widths.
    """
    known, size_px = outlines(own.shape[-1], own.device), own.shape[-1]
    tried = torch.arange(len(known.shape), device=own.device) if allowed is None else allowed.nonzero()[:, 0]
    steps, half = math.ceil(reach * size_px), known.side // 2
    pad = steps + half
    padded = F.pad(own.float() - (~(own | other)).float(), (pad, pad, pad, pad))
    rows, columns = (middle.round().long() for middle in centroids(own))
    windows = torch.stack(
        [
            padded[f, r : r + 2 * pad + 1, c : c + 2 * pad + 1]
            for f, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
    )
    places = F.unfold(windows[:, None], known.side)  # (F, P, S)
    score, best = (known.covers[tried] @ places).flatten(1).max(1)
    side = 2 * steps + 1
    down, across = best % side**2 // side - steps, best % side - steps
    return Fit(tried[best // side**2], rows + down, columns + across, score)


def paint_fit(fit: Fit, height: int, width: int) -> Tensor:
    """Pixels (F, H, W) that the best outlines cover."""
    known = outlines(width, fit.index.device)
    half = known.side // 2
    covers = known.covers[fit.index].view(-1, known.side, known.side) > 0.5
    canvas = torch.zeros(len(covers), height + 4 * half, width + 4 * half, dtype=torch.bool, device=covers.device)
    for f, (r, c) in enumerate(zip(fit.row.tolist(), fit.column.tolist(), strict=True)):
        canvas[f, r + half : r + half + known.side, c + half : c + half + known.side] = covers[f]
    return canvas[:, 2 * half : 2 * half + height, 2 * half : 2 * half + width]


def centroids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row and column of the pixels in mask (T, H, W); NaN where there are none."""
    weight = mask.float()
    total = weight.sum((1, 2))
    grid_r = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
    grid_c = torch.arange(mask.shape[2], device=mask.device, dtype=torch.float32)
    return (weight.sum(2) * grid_r).sum(1) / total, (weight.sum(1) * grid_c).sum(1) / total


def turn_rate(frames: Tensor, row: Tensor, column: Tensor, radius_px: float) -> float:
    """Turn in radians a frame, clockwise, of what lies around (row, column) in frames (T, 3, H, W): the shift by which
    rings around the middle fit those of the next frame best, over all frames together; within 33 degrees.
    """
    angles = torch.arange(120, device=frames.device) * (2 * math.pi / 120)
    rings = torch.tensor([0.3, 0.5, 0.7, 0.9, 1.05], device=frames.device) * radius_px
    y = row[:, None, None] + rings[:, None] * angles.sin()
    x = column[:, None, None] + rings[:, None] * angles.cos()
    height, width = frames.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    ring = F.grid_sample(frames, grid, align_corners=False).flatten(1, 2)  # (T, 3 * rings, 120)
    ring = ring - ring.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(ring)
    match = torch.fft.irfft((spectrum[1:] * spectrum[:-1].conj()).sum((0, 1)), n=120)
    shifts = torch.arange(-11, 12, device=frames.device)
    return float(shifts[match[shifts % 120].argmax()]) * 2 * math.pi / 120
