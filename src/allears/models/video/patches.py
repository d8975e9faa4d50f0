"""Videos as sequences of patches, tile after tile, and the rotary positions of these.

Shapes: B batch, T frames, H rows, W columns, L tokens, P values of a patch, D head size.
"""

import torch
from torch import Tensor

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


def rope_3d(
    grid: Triple, tile: Triple, head_dim: int, device: torch.device, stretch: float = 1.0, base: float = 100.0
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, D) for :func:`allears.nn.rope.apply_rope`: the first third of the head turns with
    the row, the second with the column, and what is left with the frame, as Wan's does.

    Args:
        grid: frames, rows and columns of tokens.
        tile: see :func:`to_patches`.
        head_dim: D.
        stretch: factor on the frame's number.
        base: of the slowest turn; small, as few positions are told apart.

    Raises:
        ValueError: the head size is odd or below 6.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head_dim: {head_dim} given; rotary positions in three directions need an even size from 6 up"
        )
    pairs = head_dim // 6
    counts = (head_dim // 2 - 2 * pairs, pairs, pairs)
    place = positions(grid, tile, device) * torch.tensor([stretch, 1.0, 1.0], device=device)
    angles = torch.cat(
        [
            place[:, axis, None] * base ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
            for axis, count in ((1, counts[1]), (2, counts[2]), (0, counts[0]))
        ],
        dim=1,
    )
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)
