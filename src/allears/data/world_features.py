"""A small classifier of the small world's videos, and the Frechet distance between the features that it sees in two
sets of them.

The distance is that of FID (Heusel et al., 2017) and FVD (Unterthiner et al., 2018), on features of a network that
knows this world, as a large public one does not.

Shapes: B videos, T frames, H rows, W columns, D features, C colours of the world.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.data.world import BACKGROUNDS, CAMERAS, COLOURS, MOTIONS, RELATIONS, SHAPES, SIZES, WorldSpec

FEATURES = 112
_OF_THING = 10  # features of each colour
_STRETCHES = 8
_NEAR = 0.04  # squared distance of colours that are about the same
_EAGER = 8.0  # how much more a place is looked at that has the colour
_GROUPS = {"shape": SHAPES, "size": tuple(SIZES), "motion": MOTIONS}
_WHOLE = {"relation": ("none", *RELATIONS), "camera": CAMERAS, "background": tuple(BACKGROUNDS)}


class WorldClassifier(nn.Module):
    """Videos (B, 3, T, H, W) in [0, 1] to features (B, D); :meth:`loss` teaches it to tell from them which colours are
    there, the shape, size and motion of each, and relation, camera and background.

    Each colour has a few of the features: what it finds where it looks, in eight stretches of the clip, and where that
    is. What is then said of a thing is said alike for all colours, so that each is learnt from the videos of all.

    Args:
        width: channels of the first convolution; the last has eight times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        sizes = (3, width, 2 * width, 4 * width, 8 * width)
        strides = ((1, 2, 2), (2, 2, 2), (2, 1, 1), (2, 2, 2))
        self.convolutions = nn.ModuleList(
            nn.Conv3d(before, after, 3, stride, 1)
            for before, after, stride in zip(sizes, sizes[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, size) for size in sizes[1:])
        self.looks = nn.Conv3d(sizes[3], len(COLOURS), 1)
        nn.init.zeros_(self.looks.weight)  # looks by colour alone at first: what it finds is learnt soon then
        self.register_buffer("palette", torch.tensor(list(COLOURS.values())) / 255.0, persistent=False)
        self.things = nn.Sequential(nn.Linear(_STRETCHES * (sizes[3] + 3), 128), nn.SiLU(), nn.Linear(128, _OF_THING))
        self.whole = nn.Linear(sizes[-1] * 4 * 2 * 2, FEATURES - len(COLOURS) * _OF_THING)
        self.heads = nn.ModuleDict(
            {
                "colour": nn.Linear(_OF_THING, 1),
                **{name: nn.Linear(_OF_THING, len(known)) for name, known in _GROUPS.items()},
                **{name: nn.Linear(FEATURES, len(known)) for name, known in _WHOLE.items()},
            }
        )

    def forward(self, videos: Tensor) -> Tensor:
        x = 2 * videos - 1
        maps = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
            maps.append(x)
        whole = self.whole(F.adaptive_avg_pool3d(x, (4, 2, 2)).flatten(1))
        return torch.tanh(torch.cat([self.things(self._found(maps[2], videos)).flatten(1), whole], dim=1))

    def _found(self, x: Tensor, videos: Tensor) -> Tensor:
        """x (B, S, T', H', W') to what each colour sees where it looks, and where: (B, C, stretches * (S + 3))."""
        x = F.adaptive_avg_pool3d(x, (_STRETCHES, x.shape[3], x.shape[4]))
        off = torch.stack([(videos - colour.view(3, 1, 1, 1)).square().sum(1) for colour in self.palette.unbind()], 1)
        alike = F.adaptive_avg_pool3d(torch.exp(-off.float() / _NEAR), (_STRETCHES, x.shape[3], x.shape[4]))
        looks = self.looks(x).float() + _EAGER * alike
        weights = looks.flatten(3).softmax(-1).unflatten(-1, looks.shape[-2:])  # (B, C, stretches, H', W')
        down, right = (torch.linspace(-1, 1, size, device=x.device) for size in x.shape[-2:])
        place = torch.stack([(weights.sum(4) * down).sum(-1), (weights.sum(3) * right).sum(-1)], dim=-1)
        seen = torch.einsum("bcthw,bsthw->bcts", weights.to(x.dtype), x)
        highest = torch.tanh(looks.flatten(3).amax(-1, keepdim=True))
        return torch.cat([seen, place.to(seen.dtype), highest.to(seen.dtype)], dim=-1).flatten(2)

    def loss(self, videos: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss () on videos with the :func:`targets` of their specs, and the share of right answers by head."""
        features = self(videos).float()
        things = features[:, : len(COLOURS) * _OF_THING].unflatten(1, (len(COLOURS), _OF_THING))
        colour = self.heads["colour"](things)[..., 0]
        total = F.binary_cross_entropy_with_logits(colour, targets["colour"])
        right = {"colour": ((colour > 0) == (targets["colour"] > 0.5)).float().mean()}
        for name, head in self.heads.items():
            if name != "colour":
                wanted = targets[name]
                logits = head(things).transpose(1, 2) if name in _GROUPS else head(features)
                total = total + F.cross_entropy(logits, wanted, ignore_index=-1)
                asked = wanted >= 0
                right[name] = ((logits.argmax(1) == wanted) & asked).sum() / asked.sum().clamp(min=1)
        return total, {name: value.detach() for name, value in right.items()}


def targets(specs: Sequence[WorldSpec], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Wanted answers: ``colour`` (B, C) in {0, 1}; ``shape``, ``size``, ``motion`` (B, C) int64, -1 for colours that
    are not there; ``relation``, ``camera``, ``background`` (B,) int64.
    """
    colours = tuple(COLOURS)
    found: dict[str, Tensor] = {"colour": torch.zeros(len(specs), len(colours))}
    found |= {name: torch.full((len(specs), len(colours)), -1) for name in _GROUPS}
    for row, spec in enumerate(specs):
        for thing in spec.things:
            place = colours.index(thing.colour)
            found["colour"][row, place] = 1
            for name, known in _GROUPS.items():
                found[name][row, place] = known.index(getattr(thing, name))
    whole = [spec.with_background() for spec in specs]
    for name, known in _WHOLE.items():
        found[name] = torch.tensor([known.index(getattr(spec, name) or "none") for spec in whole])
    return {name: value.to(device) for name, value in found.items()}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians that have mean and covariance of features a (N, D) and b (M, D).

    Raises:
        ValueError: the features' sizes differ, or a set has fewer than two entries.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"a, b: {tuple(a.shape)} and {tuple(b.shape)} given; wanted (N, D) and (M, D), 2 rows or more")
    a, b = a.double().cpu(), b.double().cpu()
    of_a, of_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(of_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ of_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * shared)
