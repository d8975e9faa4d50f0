"""Micro-scaled 4-bit numbers, exactly: E2M1 values with an E4M3 scale each 16 (NVFP4) or a power of two each 32
(MXFP4).

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Rounding is to nearest, ties to the even code, and saturates at 6.

* NVFP4: scale = max|x| / 6 rounded to E4M3 (at most 448; it can be 0 below 2^-10), then code = E2M1(x / that scale).
* MXFP4 (OCP MX 1.0): scale = 2^(floor(log2 max|x|) - 2), in E8M0, then code = E2M1(x / scale).

A group that holds an infinity or a NaN has the scale NaN and codes 0; a group with the scale 0 is all 0. Groups lie
along the last dimension, the one that the product sums over; a last group that is shorter counts as if it went on
with zeros.

Shapes: ... any, N elements, g elements a group (16 or 32).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.lowbit.quantise import to_e4m3

NVFP4_GROUP = 16
MXFP4_GROUP = 32
E2M1_TOP = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Half way between neighbours, and whether the half itself belongs to the upper one, whose code is then even.
_HALVES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def to_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0 to 15, the sign in bit 3) of float32 ``x``; 0 for a NaN."""
    size = x.float().abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for half, inclusive in _HALVES:
        code += (size >= half) if inclusive else (size > half)
    return code | ((x < 0).to(torch.uint8) << 3)


def from_e2m1(codes: Tensor) -> Tensor:
    """float32 values of E2M1 codes (uint8, 0 to 15)."""
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    value = table[(codes & 7).long()]
    return torch.where(codes >= 8, -value, value)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes (..., N), N even -> bytes (..., N / 2); the first of two lies in the lower four bits.

    Raises:
        ValueError: N is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: {codes.shape[-1]} along the last dimension; two make a byte: append a zero code")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """Bytes (..., N / 2) -> codes (..., N)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def quantise_nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 along the last dimension (SageAttention3, arXiv 2505.11594, section 3.1).

    Args:
        x: (..., N), floating.

    Returns:
        E2M1 codes, uint8 (..., N), and scales, float8_e4m3fn (..., ceil(N / 16)).
    """
    groups, largest = _groups(x, NVFP4_GROUP)
    scale = to_e4m3(torch.where(torch.isfinite(largest), largest, math.nan) / E2M1_TOP)
    return _codes(groups, scale.float(), x.shape[-1]), scale


def quantise_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 along the last dimension, for comparison.

    Args:
        x: (..., N), floating.

    Returns:
        E2M1 codes, uint8 (..., N), and scales, float32 powers of two (..., ceil(N / 32)); 2^-127 to 2^127, as E8M0
        holds.
    """
    groups, largest = _groups(x, MXFP4_GROUP)
    _, exponent = torch.frexp(largest)  # largest = m * 2^exponent with m in [0.5, 1)
    scale = torch.ldexp(torch.ones_like(largest), (exponent - 3).clamp(-126, 127))
    scale = torch.where(torch.isfinite(largest), scale, math.nan)
    return _codes(groups, scale, x.shape[-1]), scale


def dequantise_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 (..., N) of codes (..., N) and scales (..., ceil(N / g)): g = 16 if E4M3, 32 if float32."""
    group = NVFP4_GROUP if scale.dtype == torch.float8_e4m3fn else MXFP4_GROUP
    return from_e2m1(codes) * scale.float().repeat_interleave(group, dim=-1)[..., : codes.shape[-1]]


def round_to_nvfp4(x: Tensor) -> Tensor:
    """The float32 values that ``x`` (..., N) has in NVFP4."""
    return dequantise_groups(*quantise_nvfp4(x))


def round_to_mxfp4(x: Tensor) -> Tensor:
    """The float32 values that ``x`` (..., N) has in MXFP4."""
    return dequantise_groups(*quantise_mxfp4(x))


def _groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(..., N) -> float32 (..., M, g) with zeros at the end, and the largest magnitudes (..., M)."""
    length = x.shape[-1]
    groups = F.pad(x.float(), (0, -length % group)).unflatten(-1, (-(-length // group), group))
    return groups, groups.abs().amax(-1)


def _codes(groups: Tensor, scale: Tensor, length: int) -> Tensor:
    usable = (scale > 0).unsqueeze(-1)
    divisor = torch.where(usable, scale.unsqueeze(-1), 1.0)
    return to_e2m1(torch.where(usable, groups / divisor, 0.0)).flatten(-2)[..., :length]
