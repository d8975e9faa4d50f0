"""What a loudspeaker does to a signal: it clips, saturates, bends, rattles, and has little bass.

Shapes: B clips, T samples.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from allears.audio.butterworth import butterworth
from allears.data.draws import RATE
from allears.data.waves import active_rms, on_device

ENVELOPE = 320
"""Samples over which the level is taken that makes something rattle."""


@dataclass(frozen=True)
class Loudspeaker:
    """One loudspeaker. Where it distorts, full scale is the peak of what it is given.

    Args:
        clip: full scale is cut here, at this share; ``None`` for no clipping.
        sigmoid: share of the output that goes through a lopsided saturation without memory, 0 to 1.
        polynomial: factors of the square, the cube, and so on, that are added; empty for none.
        rattle_db: level of what rattles along, over that of the signal; ``None`` for nothing.
        rattle_hz: its band.
        rattle_from: share of full scale from which on it rattles.
        seed: of the rattling.
        highpass_hz: below, the loudspeaker falls off by 12 dB an octave.
        lowpass_hz: likewise above; ``None`` for no limit.
    """

    clip: float | None = None
    sigmoid: float = 0.0
    polynomial: tuple[float, ...] = ()
    rattle_db: float | None = None
    rattle_hz: tuple[float, float] = (500.0, 3000.0)
    rattle_from: float = 0.3
    seed: int = 0
    highpass_hz: float = 60.0
    lowpass_hz: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, wanted a share of the peak above 0, or None")
        if not 0 <= self.sigmoid <= 1:
            raise ValueError(f"sigmoid: got {self.sigmoid}, wanted a share from 0 to 1")
        if not 20 <= self.highpass_hz < (self.lowpass_hz or RATE / 2):
            raise ValueError(
                f"highpass_hz, lowpass_hz: got {self.highpass_hz} and {self.lowpass_hz}, wanted 20 Hz or more, "
                "and the low-pass above the high-pass"
            )

    @property
    def linear(self) -> bool:
        return self.clip is None and not self.sigmoid and not any(self.polynomial) and self.rattle_db is None


@dataclass(frozen=True)
class LoudspeakerRanges:
    """Distribution of loudspeakers. Probabilities in [0, 1], ranges as (low, high).

    Args:
        nonlinear: share that distorts at all; the shares below are of those. One that would draw nothing clips.
        small: share with a high-pass from ``small_hz``, the others' is from ``large_hz``.
    """

    nonlinear: float = 0.6
    clips: float = 0.4
    clip: tuple[float, float] = (0.6, 0.95)
    saturates: float = 0.5
    sigmoid: tuple[float, float] = (0.1, 1.0)
    bends: float = 0.3
    square: tuple[float, float] = (-0.3, 0.3)
    cube: tuple[float, float] = (-0.3, 0.3)
    rattles: float = 0.12
    rattle_db: tuple[float, float] = (-35.0, -15.0)
    small: float = 0.6
    small_hz: tuple[float, float] = (150.0, 500.0)
    large_hz: tuple[float, float] = (40.0, 150.0)
    lowpass: float = 0.3
    lowpass_hz: tuple[float, float] = (3000.0, 7500.0)


def draw_loudspeaker(rng: np.random.Generator, ranges: LoudspeakerRanges) -> Loudspeaker:
    """One loudspeaker. The same state of ``rng`` gives the same one."""

    def uniform(span: tuple[float, float], digits: int = 3) -> float:
        return round(float(rng.uniform(*span)), digits)

    distorts = rng.random() < ranges.nonlinear
    shares = (ranges.clips, ranges.saturates, ranges.bends, ranges.rattles)
    clips, saturates, bends, rattles = (distorts and rng.random() < share for share in shares)
    clips = clips or (distorts and not (saturates or bends or rattles))
    speaker = Loudspeaker(
        clip=uniform(ranges.clip) if clips else None,
        sigmoid=uniform(ranges.sigmoid) if saturates else 0.0,
        polynomial=(uniform(ranges.square), uniform(ranges.cube)) if bends else (),
        highpass_hz=uniform(ranges.small_hz if rng.random() < ranges.small else ranges.large_hz, 0),
        lowpass_hz=uniform(ranges.lowpass_hz, 0) if rng.random() < ranges.lowpass else None,
    )
    if not rattles:
        return speaker
    low = uniform((300.0, 2000.0), 0)
    return replace(
        speaker,
        rattle_db=uniform(ranges.rattle_db, 1),
        rattle_hz=(low, min(7000.0, round(low * uniform((1.5, 4.0)), 0))),
        rattle_from=uniform((0.2, 0.6)),
        seed=int(rng.integers(2**31)),
    )


def through_loudspeakers(x: Tensor, loudspeakers: list[Loudspeaker]) -> Tensor:
    """x (B, T) as each clip's loudspeaker plays it. One that is linear changes nothing but the spectrum."""
    device = x.device
    peak = x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    driven = x if all(speaker.linear for speaker in loudspeakers) else _distorted(x / peak, loudspeakers) * peak
    played = butterworth(
        driven,
        RATE,
        on_device(device, [speaker.highpass_hz for speaker in loudspeakers]),
        on_device(device, [speaker.lowpass_hz or np.inf for speaker in loudspeakers]),
    )
    for row, speaker in enumerate(loudspeakers):
        if speaker.rattle_db is not None:
            played[row] += _rattle(x[row] / peak[row], active_rms(played[row : row + 1])[0], speaker)
    return played


def _distorted(x: Tensor, loudspeakers: list[Loudspeaker]) -> Tensor:
    """x (B, T), of peak 1, after all that has no memory."""
    limit = on_device(x.device, [speaker.clip or np.inf for speaker in loudspeakers])[:, None]
    x = torch.maximum(torch.minimum(x, limit), -limit)
    share = on_device(x.device, [speaker.sigmoid for speaker in loudspeakers])[:, None]
    # As usual in the field: 2 / (1 + exp(-a b)) - 1 with b = 1.5 x - 0.3 x^2, and a = 4 above zero, 0.5 below.
    bent = 1.5 * x - 0.3 * x.square()
    x = torch.lerp(x, torch.tanh(torch.where(bent > 0, 2.0, 0.25) * bent), share)
    most = max(len(speaker.polynomial) for speaker in loudspeakers)
    factors = [[*s.polynomial, *[0.0] * (most - len(s.polynomial))] for s in loudspeakers]
    total, power = x, x
    for factor in on_device(x.device, factors).reshape(len(x), most).unbind(1):
        power = power * x
        total = total + factor[:, None] * power
    return total


def _rattle(x: Tensor, level: Tensor, speaker: Loudspeaker) -> Tensor:
    """Noise (T,) in a band; it follows how far x (T,), of peak 1, is above where rattling starts, at ``level`` (1,)."""
    assert speaker.rattle_db is not None
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(speaker.seed)).numpy()
    low, high = on_device(x.device, speaker.rattle_hz)
    band = butterworth(on_device(x.device, noise), RATE, low, high)
    width = 2 * (ENVELOPE // 2) + 1
    loud = functional.max_pool1d(x.abs()[None, None], width, 1, width // 2)
    envelope = functional.avg_pool1d(loud, width, 1, width // 2)[0, 0]
    gate = (envelope - speaker.rattle_from).clamp_min(0) / (1 - speaker.rattle_from)
    return band / band.square().mean().sqrt().clamp_min(1e-8) * gate * level * 10 ** (speaker.rattle_db / 20)
