"""Videos of the small world, painted in batches by torch on any device: filled outlines with soft edges.

Shapes: B videos, K things, T frames, H rows, W columns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from allears.data.world import BACKGROUNDS, COLOURS, SHAPES, WorldSpec
from allears.data.world_layout import HORIZON, Layout, lay_out

FRAMES, SIZE_PX, FPS = 32, 64, 8
"""Length in frames, width and height, and frames a second, of the videos that the models are made for."""
STRIPE = 0.62
"""Brightness of the ball's stripe, by which its turning is seen."""
_BANDS = (0.41, 0.27)
_BAND_LIGHT = 0.033
_CHUNK = 16


def render(
    specs: Sequence[WorldSpec] | Layout,
    device: torch.device | str = "cpu",
    frames: int = FRAMES,
    size_px: int = SIZE_PX,
) -> Tensor:
    """Videos (B, 3, T, H, W) in [0, 1], float32 on ``device``, of specs, or of their layout (which has its frames).

    Raises:
        ValueError: no spec, fewer than two frames, or less than 8 pixels.
    """
    if size_px < 8:
        raise ValueError(f"size_px: {size_px} given; wanted 8 pixels or more")
    layout = (specs if isinstance(specs, Layout) else lay_out(specs, frames)).to(device)
    count = layout.radius.shape[0]
    parts = [
        _paint(Layout(**{name: value[start : start + _CHUNK] for name, value in vars(layout).items()}), size_px)
        for start in range(0, count, _CHUNK)
    ]
    return torch.cat(parts)


def outline(shape: int | str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance from a point to the outline of a thing of radius 1 at the origin; negative inside, x and y of any
    shape. Outside of corners it is that to the nearest edge's line.
    """
    name = shape if isinstance(shape, str) else SHAPES[shape]
    if name == "ball":
        return (x.square() + y.square()).sqrt() - 1.0
    if name == "box":
        return torch.maximum(x.abs(), y.abs()) - 0.84
    if name == "triangle":
        sides = [x * math.sin(a) - y * math.cos(a) for a in (math.pi / 3, math.pi, -math.pi / 3)]
        return torch.maximum(torch.maximum(sides[0], sides[1]), sides[2]) - 0.62
    sector = 2 * math.pi / 5
    angle = (torch.atan2(x, -y) + sector / 2).remainder(sector) - sector / 2
    length = (x.square() + y.square()).sqrt()
    tip, notch = 1.16, 0.56
    edge_x, edge_y = notch * math.cos(sector / 2) - tip, notch * math.sin(sector / 2)
    size = math.hypot(edge_x, edge_y)
    along, across = length * angle.cos() - tip, length * angle.sin().abs()
    return (along * edge_y - across * edge_x) / size


def _paint(layout: Layout, size_px: int) -> Tensor:
    device = layout.radius.device
    pixel = (torch.arange(size_px, device=device, dtype=torch.float32) + 0.5) / size_px
    zoom, pan = layout.zoom[..., None, None], layout.pan[..., None, None]
    x = (pixel - 0.5) / zoom + 0.5 + pan  # (B, T, 1, W)
    y = (pixel[:, None] - 0.5) / zoom + 0.5  # (B, T, H, 1)
    picture = _background(layout, x, y, size_px)
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255.0
    for slot in range(layout.radius.shape[1]):
        radius = layout.radius[:, slot, None, None, None]
        across = (x - layout.x[:, slot, :, None, None]) / radius.clamp(min=1e-4)
        down = (y - layout.y[:, slot, :, None, None]) / radius.clamp(min=1e-4)
        angle = layout.angle[:, slot, :, None, None]
        cos, sin = angle.cos(), angle.sin()
        turned_x, turned_y = across * cos + down * sin, down * cos - across * sin
        shape = layout.shape[:, slot, None, None, None]
        distance = torch.zeros_like(turned_x)
        for index in range(len(SHAPES)):
            distance = torch.where(shape == index, outline(index, turned_x, turned_y), distance)
        cover = (0.5 - distance * radius * zoom * size_px).clamp(0.0, 1.0) * (radius > 0)
        light = (1.0 - 0.06 * across - 0.1 * down).clamp(0.8, 1.16)
        edge = (turned_x.abs() - 0.24) * radius * zoom * size_px
        stripe = torch.where(shape == 0, (0.5 - edge).clamp(0.0, 1.0), torch.zeros_like(edge))
        light = light * (1.0 - (1.0 - STRIPE) * stripe)
        colour = palette[layout.colour[:, slot]][:, :, None, None, None]
        picture = torch.lerp(picture, (colour * light[:, None]).clamp(max=1.0), cover[:, None])
    return picture.clamp(0.0, 1.0)


def _background(layout: Layout, x: Tensor, y: Tensor, size_px: int) -> Tensor:
    """(B, 3, T, H, W): wall and floor with bands across, by which a moving camera is seen."""
    tones = torch.tensor(list(BACKGROUNDS.values()), device=x.device) / 255.0
    wall, floor = tones[layout.background][:, :, :, None, None, None].unbind(1)
    phases = layout.phases[:, :, None, None, None]
    waves = [(2 * math.pi * x / length + phases[:, index]).cos() for index, length in enumerate((*_BANDS, *_BANDS))]
    on_wall, on_floor = (_BAND_LIGHT * (waves[index] + waves[index + 1]) for index in (0, 2))
    below = (0.5 + (y - HORIZON) * layout.zoom[..., None, None] * size_px).clamp(0.0, 1.0)
    return torch.lerp(wall + on_wall[:, None], floor + on_floor[:, None], below[:, None])
