"""Whether a video shows what its caption says, judged by program: colours, shapes, sizes, motions, who is in front, and
the camera. And how steady a video is.

Shapes: B videos, T frames, H rows, W columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.data.world import COLOURS, SHAPES, SIZES, WorldSpec
from allears.data.world_track import (
    Camera,
    centroids,
    cores,
    fit_outlines,
    label_colours,
    measure_camera,
    nearest_background,
    outlines,
    paint_fit,
    turn_rate,
)

_FEWEST_PX = 0.0025  # of the frame: what is smaller is not taken for a thing
_LOOKS = 6


@dataclass(frozen=True)
class Check:
    """What of a caption a video shows.

    Args:
        seen: by name: ``colour``, ``shape``, ``size`` and ``motion`` with 1 or 2 behind it for the first or second
            thing, ``relation``, ``camera``, ``background``, and ``nothing else`` (no pixels of other colours).
    """

    seen: dict[str, bool]

    @property
    def score(self) -> float:
        """Share of what was asked for that is there, 0 to 1."""
        return sum(self.seen.values()) / len(self.seen)


def check_videos(videos: Tensor, specs: Sequence[WorldSpec]) -> list[Check]:
    """Judge each video (B, 3, T, H, W), in [0, 1], by the spec of its caption. What a spec leaves open is not judged.

    Raises:
        ValueError: the numbers of videos and specs differ, or the videos have another shape.
    """
    if videos.dim() != 5 or videos.shape[1] != 3 or videos.shape[2] < 8 or len(videos) != len(specs):
        raise ValueError(
            f"videos: {tuple(videos.shape)} given for {len(specs)} specs; wanted (B, 3, T, H, W), one a spec, T >= 8"
        )
    frames = videos.float().transpose(1, 2)
    with torch.no_grad():
        return [_check(video, spec) for video, spec in zip(frames, specs, strict=True)]


def summary(checks: Sequence[Check]) -> dict[str, float]:
    """Per cent: ``prompt_score`` (mean of the scores), ``all_right`` (clips with nothing wrong), and each kind's share.

    Raises:
        ValueError: there are none.
    """
    if not checks:
        raise ValueError("checks: none given; judge at least one video")
    kinds: dict[str, list[bool]] = {}
    for check in checks:
        for name, seen in check.seen.items():
            kinds.setdefault(name.rstrip(" 12"), []).append(seen)
    rows = {
        "prompt_score": sum(check.score for check in checks) / len(checks),
        "all_right": sum(check.score == 1 for check in checks) / len(checks),
        **{kind.replace(" ", "_"): sum(seen) / len(seen) for kind, seen in sorted(kinds.items())},
    }
    return {name: 100 * value for name, value in rows.items()}


def consistency_db(videos: Tensor) -> Tensor:
    """How well each frame is made of the one before, (B,) in dB; higher is steadier.

    Each pixel takes the best of the shifts within 2 pixels, judged over 5 x 5 pixels around it (block matching). What
    flickers, pops up or melts has no shift that fits.

    Args:
        videos: (B, 3, T, H, W) in [0, 1].
    """
    before, after = videos[:, :, :-1].float(), videos[:, :, 1:].float()
    padded = F.pad(before, (2, 2, 2, 2, 0, 0), mode="replicate")
    height, width = videos.shape[-2:]
    best = torch.full_like(before[:, 0], math.inf)
    for dy in range(5):
        for dx in range(5):
            off = (padded[..., dy : dy + height, dx : dx + width] - after).square().mean(1)
            best = torch.minimum(best, F.avg_pool2d(off, 5, 1, 2, count_include_pad=False))
    return -10 * torch.log10(best.mean((1, 2, 3)) + 1e-6)


def _check(frames: Tensor, spec: WorldSpec) -> Check:
    count, _, height, width = frames.shape
    fewest = max(4, int(_FEWEST_PX * height * width))
    background = nearest_background(frames)
    names = tuple(thing.colour for thing in spec.things)
    everything = cores(_masks(label_colours(frames, background), len(COLOURS)))
    area = everything.view(len(COLOURS), count, -1).sum(-1)  # (colours, T)
    labels = label_colours(frames, background, names)
    masks = [_largest_part(labels == index) for index in range(len(names))]
    camera = measure_camera(frames, labels < 0)
    seen: dict[str, bool] = {}
    fits = []
    for index, thing in enumerate(spec.things):
        other = torch.zeros_like(masks[0]) if len(masks) == 1 else masks[1 - index]
        shows = area[tuple(COLOURS).index(thing.colour)] >= max(2, fewest // 4)
        there = bool(shows.float().mean() > 0.5)
        look = _Look(frames, masks[index], other, camera, fewest)
        found = there and look.usable
        shape, radius = look.shape_and_radius() if found else ("", 0.0)
        fits.append((look, shape, radius))
        mark = str(index + 1)
        seen[f"colour {mark}"] = there
        seen[f"shape {mark}"] = found and shape == thing.shape
        seen[f"size {mark}"] = found and _size(radius) == thing.size
        seen[f"motion {mark}"] = found and look.motion(radius) == thing.motion
    if spec.relation is not None and spec.relation != "and":
        seen["relation"] = all(shape for _, shape, _ in fits) and _relation(spec.relation, fits)
    seen["camera"] = camera.kind == spec.camera
    if spec.background is not None:
        seen["background"] = background == spec.background
    others = [index for index, colour in enumerate(COLOURS) if colour not in names]
    seen["nothing else"] = bool((area[others].sum(0) >= max(2, fewest // 2)).float().mean() < 0.25)
    return Check(seen)


def _masks(labels: Tensor, kinds: int) -> Tensor:
    """(kinds * T, H, W)."""
    return torch.cat([labels == index for index in range(kinds)])


def _largest_part(mask: Tensor) -> Tensor:
    """Pixels near the middle of the cores: strays along other things' edges are dropped."""
    middle = cores(mask)
    grown = F.max_pool2d(middle.float()[:, None], 5, 1, 2)[:, 0] > 0.5
    return mask & grown


def _size(radius: float) -> str:
    """The size whose radius is nearest, by ratio."""
    return min(SIZES, key=lambda name: abs(math.log(max(radius, 1e-3) / SIZES[name])))


class _Look:
    """One thing in one video: its pixels, frame by frame.

    Args:
        frames: (T, 3, H, W).
        own, other: (T, H, W), its pixels and those of the other thing.
    """

    def __init__(self, frames: Tensor, own: Tensor, other: Tensor, camera: Camera, fewest: int) -> None:
        self.frames, self.own, self.other, self.camera = frames, own, other, camera
        self.count, self.height, self.width = own.shape
        self.shows = own.flatten(1).sum(1) >= fewest
        self.usable = int(self.shows.sum()) >= max(4, self.count // 3)
        self.row, self.column = centroids(own)
        time = torch.arange(self.count, device=own.device) / (self.count - 1) - 0.5
        self.zoom, self.pan = torch.exp(math.log(camera.zoom) * time), camera.pan * time

    def some(self, frames: Tensor) -> Tensor:
        """Up to six of the frames (a mask over T), evenly."""
        found = frames.nonzero()[:, 0]
        return found[torch.linspace(0, len(found) - 1, min(_LOOKS, len(found))).round().long().to(found.device)]

    def shape_and_radius(self) -> tuple[str, float]:
        """Most frequent shape, and the median radius at zoom 1, over some frames in which it is not cut by the edge."""
        edge = torch.zeros_like(self.own[0])
        edge[0], edge[-1], edge[:, 0], edge[:, -1] = True, True, True, True
        whole = self.shows & ~(self.own & edge).flatten(1).any(1)
        free = whole & (self.contact() == 0)
        chosen, reach = next(
            (option for option in ((free, 0.05), (whole, 0.1)) if int(option[0].sum()) >= 3), (self.shows, 0.13)
        )
        at = self.some(chosen)
        known = outlines(self.width, self.own.device)
        first = fit_outlines(self.own[at], self.other[at], reach=reach)
        shape = int(torch.bincount(known.shape[first.index], minlength=len(SHAPES)).argmax())
        right = fit_outlines(self.own[at], self.other[at], known.shape == shape, reach)
        return SHAPES[shape], float((known.radius[right.index] / self.zoom[at]).median())

    def contact(self) -> Tensor:
        """(T,) int64, pixels of the other thing that it touches."""
        grown = F.max_pool2d(self.own.float()[:, None], 3, 1, 1)[:, 0] > 0.5
        return (grown & self.other).flatten(1).sum(1)

    def path(self) -> tuple[Tensor, Tensor]:
        """x and y in the world, in frame widths, without the camera's motion, of frames in which at least a third of it
        shows: the middle of a tip is not that of the thing."""
        area = self.own.flatten(1).sum(1) / self.zoom.square()
        most = self.shows & (area >= area[self.shows].median() / 3)
        x = ((self.column + 0.5) / self.width - 0.5) / self.zoom + self.pan
        y = ((self.row + 0.5) / self.height - 0.5) / self.zoom
        return x[most], y[most]

    def motion(self, radius: float) -> str:
        """The motion that its path and its turning are of; empty if of none."""
        x, y = self.path()
        quarter = max(1, len(x) // 4)
        dx, dy = (float(p[-quarter:].mean() - p[:quarter].mean()) for p in (x, y))
        swing = y - (y.max() + y.min()) / 2
        turns = int((swing[1:].sign() * swing[:-1].sign() < 0).sum())
        if float(y.max() - y.min()) > 0.18 and turns >= 3:
            return "bounces" if abs(dx) < 0.12 else ""
        if abs(dx) > 0.12 and abs(dy) < 0.12:
            return "rolls right" if dx > 0 else "rolls left"
        if abs(dy) > 0.18 and abs(dx) < 0.12:
            return "falls" if dy > 0 else "rises"
        if abs(dx) < 0.12 and abs(dy) < 0.12:
            return "spins" if abs(self._turn(radius)) > math.radians(6) else "stays"
        return ""

    def _turn(self, radius: float) -> float:
        """Radians a frame."""
        keep = self.shows
        return turn_rate(self.frames[keep], self.row[keep], self.column[keep], radius * self.width)

    def outline_at(self, at: Tensor, shape: str, radius: float) -> Tensor:
        """Pixels (F, H, W) that this shape covers where it fits best in the frames ``at``, at the radius known."""
        known = outlines(self.width, self.own.device)
        near = (known.radius / radius).log().abs() < 0.15 + abs(math.log(self.camera.zoom)) / 2
        fit = fit_outlines(self.own[at], self.other[at], near & (known.shape == SHAPES.index(shape)))
        return paint_fit(fit, self.height, self.width)


def _relation(relation: str, fits: list[tuple[_Look, str, float]]) -> bool:
    """Whether the first thing is beside, behind or in front of the second one."""
    first, second = fits[0][0], fits[1][0]
    both = first.shows & second.shows
    if not bool(both.any()):
        return False
    contact = first.contact() * both
    if relation == "beside":
        return bool((contact > 0).float().mean() < 0.34)
    if not bool(contact.any()):
        return False
    at = first.some(contact >= max(1, int(contact.max()) // 2))
    painted = [look.outline_at(at, shape, radius) for look, shape, radius in fits]
    crossing = painted[0] & painted[1]
    of_first, of_second = (int((crossing & look.own[at]).sum()) for look in (first, second))
    if of_first + of_second < 4:
        return False
    share = of_first / (of_first + of_second)
    return share > 0.5 if relation == "in front of" else share < 0.5
