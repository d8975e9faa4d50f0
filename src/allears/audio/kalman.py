"""A linear echo canceller: the partitioned-block frequency-domain Kalman filter.

The echo path is a random walk that is seen through the microphone: Enzner and Vary, "Frequency-domain adaptive Kalman
filter for acoustic echo control in hands-free telephones", Signal Processing 86(6), 2006; with its response cut into
partitions: Kuech, Mabande, Enzner, "State-space architecture of the partitioned-block-based acoustic echo controller",
ICASSP 2014. All covariances are taken as diagonal.

Such a filter takes a new echo path for a loud near end, and learns it slowly. But what is left of the echo then is like
the echo that was expected, which a near end is not: where it is, the filter is scaled at once, and trusted less.

Shapes: B signals, S samples, R of a block, F = R + 1 bins of a transform of 2 R samples, P partitions of R taps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

RATE_HZ = 16_000
_BLOCK = 256
"""The block for which ``memory`` and ``smoothing`` are given."""
_RECENT = 0.95
"""Share of the evidence for a wrong path that is left one such block later."""
_WRONG = 0.5
"""The path is scaled from this share on."""
_LIKE_LESS, _LIKE_MORE = 0.3, 0.6
"""Correlations from which on it is too large, and too small; what is but half learned is too small, and not wrong."""
_SMALLEST = 1e-12
"""Power of a sample that is as good as none."""


@dataclass(frozen=True)
class KalmanConfig:
    """Sizes and assumptions of the filter.

    Args:
        block: R, samples at 16 kHz from one update to the next; also the latency.
        filter_ms: length of the echo path that is modelled, rounded up to whole partitions.
        memory: how much of the echo path is still there 16 ms later, in amplitude; below 1.
        spread: share of the path's random change that may come up in any partition, rather than where the path has
            energy: a path that moves is learned again the sooner.
        smoothing: of the power of the near end, over 16 ms.
        path_gain: the echo path that is expected at the start, as energy over that of the reference.

    Raises:
        ValueError: a value is out of its range.
    """

    block: int = 256
    filter_ms: float = 320.0
    memory: float = 0.999
    spread: float = 0.2
    smoothing: float = 0.85
    path_gain: float = 10.0

    def __post_init__(self) -> None:
        if self.block < 16:
            raise ValueError(f"block: got {self.block}, wanted 16 samples or more")
        if not self.filter_ms > 0:
            raise ValueError(f"filter_ms: got {self.filter_ms}, wanted a time above 0")
        for name in ("memory", "smoothing", "spread"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 to below 1")
        if not self.path_gain > 0:
            raise ValueError(f"path_gain: got {self.path_gain}, wanted an energy ratio above 0")

    @property
    def partitions(self) -> int:
        return math.ceil(self.filter_ms * RATE_HZ / 1000 / self.block)


class KalmanState(NamedTuple):
    """All that is carried from block to block.

    Attributes:
        reference: the last block, (B, R).
        spectra: of the last P pairs of blocks of the reference, newest first, (B, P, F).
        path: the echo path as it is believed to be, (B, P, F).
        doubt: variance of that belief, (B, P, F).
        near: power spectrum of what is no echo, (B, F).
        likeness: product of what was left and the echo that was expected, and energies of both, lately, (B, 3).
    """

    reference: Tensor
    spectra: Tensor
    path: Tensor
    doubt: Tensor
    near: Tensor
    likeness: Tensor


class KalmanEchoFilter:
    """Takes off what is linear in the reference; the near end and whatever the loudspeaker distorts remain.

    It knows delays within ``filter_ms`` only: align the reference first (:func:`aligned`).
    """

    def __init__(self, config: KalmanConfig | None = None) -> None:
        self.config = config or KalmanConfig()
        self._memory = self.config.memory ** (self.config.block / _BLOCK)
        self._smoothing = self.config.smoothing ** (self.config.block / _BLOCK)
        self._recent = _RECENT ** (self.config.block / _BLOCK)

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> KalmanState:
        """Knows nothing but how large a path may be."""
        block, partitions = self.config.block, self.config.partitions
        path = torch.zeros(batch, partitions, block + 1, dtype=torch.complex64, device=device)
        return KalmanState(
            torch.zeros(batch, block, device=device),
            path,
            path,
            self.config.path_gain * _decay(partitions, 6.0, path.device).expand(path.shape),
            torch.zeros(batch, block + 1, device=device),
            torch.zeros(batch, 3, device=device),
        )

    @torch.no_grad()
    def step(self, mic: Tensor, reference: Tensor, state: KalmanState) -> tuple[Tensor, KalmanState]:
        """One block of both, (B, R), to the block without echo, (B, R), and the next state.

        Raises:
            ValueError: a block has another shape.
        """
        block, memory, spread = self.config.block, self._memory, self.config.spread
        if mic.shape != reference.shape or mic.shape != state.reference.shape:
            raise ValueError(
                f"mic, reference: got {tuple(mic.shape)} and {tuple(reference.shape)}, wanted (B, block) = "
                f"{tuple(state.reference.shape)} both; cut the signals into blocks, or call run"
            )
        newest = torch.fft.rfft(torch.cat([state.reference, reference], -1))
        spectra = torch.cat([newest[:, None], state.spectra[:, :-1]], 1)
        power = spectra.abs().square()
        size = state.path.abs().square()
        change = (1 - spread) * size + spread * size.mean(1, keepdim=True)
        doubt = memory**2 * state.doubt + (1 - memory**2) * change
        echo = torch.fft.irfft((spectra * state.path).sum(1))[:, block:]
        # A block of zeros comes before both, so their power is half of that of a whole pair of blocks.
        seen, expected = torch.fft.rfft(functional.pad(torch.stack([mic - echo, echo]), (block, 0)))
        unsure = (power * doubt).sum(1)
        loud = seen.abs().square()
        near = self._smoothing * state.near + (1 - self._smoothing) * (loud - unsure / 2).clamp_min(0)
        near = torch.maximum(near, (1 - self._smoothing) * loud)
        wrong, likeness = self._wrong(mic - echo, echo, state.likeness)
        error, seen = mic - echo * (1 + wrong), seen - wrong * expected
        path = state.path * (1 + wrong[..., None])
        doubt = doubt + wrong.abs()[..., None] * size.sum(1, keepdim=True) * _decay(path.shape[1], 1.5, path.device)
        unsure = (power * doubt).sum(1)
        gain = doubt / (unsure + 2 * near + _SMALLEST * block)[:, None]
        taps = torch.fft.irfft(gain * spectra.conj() * seen[:, None])[..., :block]
        path = path + torch.fft.rfft(functional.pad(taps, (0, block)))
        return error, KalmanState(reference, spectra, path, doubt * (1 - gain * power / 2), near, likeness)

    def _wrong(self, left: Tensor, echo: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
        """By what share the path is too small, (B, 1), 0 where that is not sure; and the evidence from now on.

        The share is the regression of what was ``left`` on the ``echo`` that was expected, (B, R) both.
        """
        fresh = torch.stack([(left * echo).sum(-1), echo.square().sum(-1), left.square().sum(-1)], -1)
        likeness = self._recent * likeness + fresh
        product, expected, rest = likeness.split(1, -1)
        share = product / expected.clamp_min(_SMALLEST)
        correlation = product / (expected * rest).sqrt().clamp_min(_SMALLEST)
        sure = (share.abs() > _WRONG) & ((correlation < -_LIKE_LESS) | (correlation > _LIKE_MORE))
        return torch.where(sure, share.clamp(-1, 1), 0.0), torch.where(sure, 0.0, likeness)


def _decay(partitions: int, decades: float, device: torch.device) -> Tensor:
    """Energies of a path's partitions that fall off by so many decades over all of them, (P, 1); they add up to 1."""
    energy = 10 ** (-decades * torch.arange(partitions, device=device, dtype=torch.float32) / partitions)
    return (energy / energy.sum())[:, None]


def aligned(reference: Tensor, delay_frames: Tensor, hop: int = 160, early_frames: int = 1) -> Tensor:
    """The reference (B, S) delayed as the echo is, but for a margin: an oracle for a filter that finds no delay.

    Args:
        delay_frames: (B, T), from the reference to its echo; frame t is centred at sample ``hop`` t.
        early_frames: the margin.
    """
    samples = reference.shape[-1]
    time = torch.arange(samples, device=reference.device)
    delay = hop * (delay_frames.round().long() - early_frames).clamp_min(0)
    where = time - delay[:, (time + hop // 2) // hop]
    return torch.where(where >= 0, reference.gather(-1, where.clamp_min(0)), 0.0)
