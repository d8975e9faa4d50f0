"""Videos as sequences of patches, tile after tile, and the rotary positions of these.

Shapes: B batch, T frames, H rows, W columns, L tokens, P values of a patch, D head size.
"""

import torch
from torch import Tensor

from allears.nn.rope import apply_rope

Triple = tuple[int, int, int]


def to_patches(video: Tensor, patch: Triple, tile: Triple) -> Tensor:
    """(B, 3, T, H, W) to (B, L, P). Tiles follow in row order, and in each its patches do."""
    sizes = [size // (p * t) for size, p, t in zip(video.shape[2:], patch, tile, strict=True)]
    batch, colours = video.shape[:2]
    parts = video.reshape(
        batch, colours, sizes[0], tile[0], patch[0], sizes[1], tile[1], patch[1], sizes[2], tile[2], -1
    )
    return parts.permute(0, 2, 5, 8, 3, 6, 9, 1, 4, 7, 10).reshape(batch, -1, colours * patch[0] * patch[1] * patch[2])


def to_video(patches: Tensor, shape: Triple, patch: Triple, tile: Triple) -> Tensor:
    """The inverse: (B, L, P) to (B, 3, T, H, W), T, H, W = ``shape``."""
    n_t, n_h, n_w = (size // (p * t) for size, p, t in zip(shape, patch, tile, strict=True))
    parts = patches.reshape(patches.shape[0], n_t, n_h, n_w, *tile, -1, *patch)
    return parts.permute(0, 7, 1, 4, 8, 2, 5, 9, 3, 6, 10).reshape(patches.shape[0], -1, *shape)


def positions(grid: Triple, tile: Triple, device: torch.device) -> Tensor:
    """Frame, row and column of each token, (L, 3) float32, in the order of :func:`to_patches`."""
    axes = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.float32) for size in grid), indexing="ij")
    whole = torch.stack(axes)[None]
    return to_patches(whole, (1, 1, 1), tile)[0]


def token_places(frames: int, whole: int, patch: int, device: torch.device) -> Tensor:
    """Where in a clip of ``whole`` frames the tokens of one as long but of fewer ``frames`` lie: (frames / patch,)
    float32, in tokens of the whole clip. A token lies at the middle of its frames; the first and the last frame of both
    clips show the same moments.
    """
    middle = torch.arange(frames // patch, device=device, dtype=torch.float32) * patch + (patch - 1) / 2
    if frames == 1:
        middle = middle + 0.5
    return (middle * ((whole - 1) / max(frames - 1, 1)) - (patch - 1) / 2) / patch


def rope_3d(
    grid: Triple, tile: Triple, head_dim: int, device: torch.device, places: Tensor | None = None, base: float = 100.0
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, D) for :func:`allears.nn.rope.apply_rope`: the first third of the head turns with
    the row, the second with the column, and what is left with the frame, as Wan's does.

    Args:
        grid: frames, rows and columns of tokens.
        tile: see :func:`to_patches`.
        head_dim: D.
        places: of the frames of tokens in time, (T,), or (B, T) for a table (B, L, D); by default 0, 1, 2 ...
        base: of the slowest turn; small, as few positions are told apart.

    Raises:
        ValueError: the head size is odd or below 6, or the places are not as many as the frames.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head_dim: {head_dim} given; rotary positions in three directions need an even size from 6 up"
        )
    if places is not None and places.shape[-1] != grid[0]:
        raise ValueError(f"places: {tuple(places.shape)} given; wanted one for each of {grid[0]} frames of tokens")
    pairs = head_dim // 6
    counts = (head_dim // 2 - 2 * pairs, pairs, pairs)
    frame, row, column = positions(grid, tile, device).unbind(1)
    if places is not None:
        frame = places.to(device, torch.float32)[..., frame.long()]
    angles = torch.cat(
        [
            torch.broadcast_to(
                place[..., None] * base ** (-torch.arange(count, device=device, dtype=torch.float32) / count),
                (*frame.shape, count),
            )
            for place, count in ((row, counts[1]), (column, counts[2]), (frame, counts[0]))
        ],
        dim=-1,
    )
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def place_waves(
    grid: Triple, tile: Triple, channels: int, device: torch.device, places: Tensor | None = None
) -> Tensor:
    """Cosines and sines of each token's row, column and frame, (L, C) or (B, L, C): what tells a token where it is,
    where rotary positions tell where others are. Arguments as of :func:`rope_3d`, with C for D.
    """
    cos, sin = rope_3d(grid, tile, channels, device, places)
    half = channels // 2
    return torch.cat([cos[..., :half], sin[..., half:]], dim=-1)


def turn(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, L, H, D) turned by a table of :func:`rope_3d`, one for all clips or one for each."""
    cos, sin = table
    if cos.dim() == 2:
        return apply_rope(x, table)
    return apply_rope(x.flatten(0, 1), (cos.flatten(0, 1), sin.flatten(0, 1))).view_as(x)
