"""A linear echo canceller: the partitioned-block frequency-domain Kalman filter.

The echo path is a random walk that is seen through the microphone: Enzner and Vary, "Frequency-domain adaptive Kalman
filter for acoustic echo control in hands-free telephones", Signal Processing 86(6), 2006; with its response cut into
partitions: Kuech, Mabande, Enzner, "State-space architecture of the partitioned-block-based acoustic echo controller",
ICASSP 2014. All covariances are taken as diagonal. The gain needs no step size: it is large where the path is unsure
and the near end quiet, so that double talk slows the filter down by itself.

Shapes: B signals, S samples, R of a block, F = R + 1 bins of a transform of 2 R samples, P partitions of R taps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

RATE_HZ = 16_000
_BLOCK = 160
"""The block for which ``memory`` and ``smoothing`` are given."""
_ONSET = 0.15
"""Share of a block's power that counts as near end at once: a talker who begins is not in the smoothed power yet."""
_WRONG, _RECENT = 1.5, 0.95
"""A path is wrong, and forgotten, once the error has so many times the microphone's energy; both fall by the second, in
10 ms. Where a path has moved in time, what is known of the old one only adds echo, and would be unlearned slowly."""
_DECADES_S = 28.0
"""Decades by which the energy of a path that is expected falls in a second: 60 dB in 0.2 s."""
_SMALLEST = 1e-12
"""Power of a sample that is as good as none."""


@dataclass(frozen=True)
class KalmanConfig:
    """Sizes and assumptions of the filter. Times are at 16 kHz.

    Args:
        block: R, samples from one update to the next; also the latency. Short ones learn sooner.
        filter_ms: length of the echo path that is modelled, rounded up to whole partitions.
        memory: how much of the echo path is still there 10 ms later, in amplitude; below 1. Less follows a path that
            changes sooner, and is disturbed more by double talk.
        spread: share of the path's random change that may come up in any partition, rather than where the path has
            energy: one that moves away in time is learned again the sooner.
        smoothing: of the power of the near end, over 10 ms.
        path_gain: the energy of the echo path that is expected at the start.

    Raises:
        ValueError: a value is out of its range.
    """

    block: int = 160
    filter_ms: float = 320.0
    memory: float = 0.998
    spread: float = 0.2
    smoothing: float = 0.9
    path_gain: float = 5.0

    def __post_init__(self) -> None:
        if self.block < 16:
            raise ValueError(f"block: got {self.block}, wanted 16 samples or more")
        if not 0 < self.filter_ms < math.inf:
            raise ValueError(f"filter_ms: got {self.filter_ms}, wanted a time above 0, such as 320")
        for name in ("memory", "smoothing", "spread"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 to below 1")
        if not 0 < self.path_gain < math.inf:
            raise ValueError(f"path_gain: got {self.path_gain}, wanted an energy ratio above 0, such as 5")

    @property
    def partitions(self) -> int:
        """P."""
        return math.ceil(self.filter_ms * RATE_HZ / 1000 / self.block)


class KalmanState(NamedTuple):
    """All that is carried from block to block.

    Attributes:
        reference: the last block, (B, R).
        spectra: of the last P pairs of blocks of the reference, newest first, (B, P, F), complex.
        path: the echo path as it is believed to be, (B, P, F), complex.
        doubt: variance of that belief, (B, P, F).
        near: power spectrum of what is no echo, (B, F).
        energies: of the error and of the microphone, lately, (B, 2).
    """

    reference: Tensor
    spectra: Tensor
    path: Tensor
    doubt: Tensor
    near: Tensor
    energies: Tensor


class KalmanEchoFilter:
    """Takes off what is linear in the reference; the near end, and whatever the loudspeaker distorts, remain.

    It knows delays of up to ``filter_ms``: bring the reference into time first (:func:`aligned`). It has no weights and
    no state of its own, runs where its inputs are, and gives no gradients.

    >>> error, echo = KalmanEchoFilter()(mic, aligned(reference, delay_samples))
    """

    def __init__(self, config: KalmanConfig | None = None) -> None:
        self.config = config or KalmanConfig()
        blocks = self.config.block / _BLOCK
        self._keep = self.config.memory ** (2 * blocks)
        self._smoothing, self._recent = self.config.smoothing**blocks, _RECENT**blocks

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> KalmanState:
        """Knows no path, only how large one may be."""
        block, partitions = self.config.block, self.config.partitions
        path = torch.zeros(batch, partitions, block + 1, dtype=torch.complex64, device=device)
        late_s = torch.arange(partitions, dtype=torch.float32, device=device) * (block / RATE_HZ)
        expected = 10 ** (-_DECADES_S * late_s)
        doubt = (self.config.path_gain * expected / expected.sum())[:, None].expand(path.shape)
        silence = torch.zeros(batch, block, device=device)
        near, energies = torch.zeros(batch, block + 1, device=device), torch.zeros(batch, 2, device=device)
        return KalmanState(silence, path, path, doubt, near, energies)

    @torch.no_grad()
    def __call__(self, mic: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Whole signals, (B, S) or (S,) both, of any length, floating, at 16 kHz.

        Returns:
            The error, which is the microphone without the echo estimate, and that estimate; float32, shaped like
            ``mic``. The first samples still hold all of the echo.

        Raises:
            ValueError: the shapes differ, or are no signals.
        """
        if mic.shape != reference.shape or mic.dim() not in (1, 2):
            raise ValueError(
                f"mic, reference: got {tuple(mic.shape)} and {tuple(reference.shape)}, wanted (B, S) or (S,) both; cut "
                "or pad the reference to the microphone's length"
            )
        samples, block = mic.shape[-1], self.config.block
        rows = math.prod(mic.shape[:-1])
        both = functional.pad(torch.stack([mic, reference]).float().reshape(2, rows, samples), (0, -samples % block))
        state = self.initial_state(rows, mic.device)
        errors, echoes = [both[0, :, :0]], [both[0, :, :0]]
        for part in (slice(at, at + block) for at in range(0, samples, block)):
            error, echo, state = self.step(both[0, :, part], both[1, :, part], state)
            errors.append(error)
            echoes.append(echo)
        error, echo = (torch.cat(parts, -1)[:, :samples].reshape(mic.shape) for parts in (errors, echoes))
        return error, echo

    @torch.no_grad()
    def step(
        self, mic_block: Tensor, reference_block: Tensor, state: KalmanState
    ) -> tuple[Tensor, Tensor, KalmanState]:
        """One block of both, (B, R) float32, to the error (B, R), the echo estimate (B, R), and the next state.

        The estimate is made with what was known before the block. The old state stays as it is.

        Raises:
            ValueError: a block has another shape.
        """
        block, wanted = self.config.block, state.reference.shape
        if mic_block.shape != wanted or reference_block.shape != wanted:
            raise ValueError(
                f"mic_block, reference_block: got {tuple(mic_block.shape)} and {tuple(reference_block.shape)}, wanted "
                f"(B, block) = {tuple(wanted)} both; cut the signals into blocks, or call the filter on whole ones"
            )
        newest = torch.fft.rfft(torch.cat([state.reference, reference_block], -1))
        spectra = torch.cat([newest[:, None], state.spectra[:, :-1]], 1)
        echo = torch.fft.irfft((spectra * state.path).sum(1))[:, block:]
        energies = torch.stack([mic_block - echo, mic_block], 1).square().sum(-1)
        energies = torch.lerp(energies, state.energies, self._recent)
        wrong = energies[:, :1] > _WRONG * energies[:, 1:]
        energies, echo = torch.where(wrong, energies[:, 1:], energies), torch.where(wrong, 0.0, echo)
        path = torch.where(wrong[..., None], 0.0, state.path)
        error = mic_block - echo
        power, size = _power(spectra), _power(path)
        change = torch.lerp(size, size.mean(1, keepdim=True), self.config.spread)
        doubt = torch.lerp(change, state.doubt, self._keep)
        doubt = doubt + torch.where(wrong[..., None], _power(state.path).mean(1, keepdim=True), 0.0)
        unsure = (power * doubt).sum(1)
        # A block of zeros comes before the error, so that its power is half of that of a whole pair of blocks.
        seen = torch.fft.rfft(functional.pad(error, (block, 0)))
        loud = _power(seen)
        near = torch.lerp((loud - unsure / 2).clamp_min(0), state.near, self._smoothing)
        near = torch.maximum(near, _ONSET * loud)
        gain = doubt / (unsure + 2 * near + _SMALLEST * block)[:, None]
        # What a gain in each bin by itself gives is a circular correlation; only its first R taps are a partition's.
        taps = torch.fft.irfft(gain * spectra.conj() * seen[:, None])[..., :block]
        path = path + torch.fft.rfft(functional.pad(taps, (0, block)))
        doubt = doubt * (1 - gain * power / 2)
        return error, echo, KalmanState(reference_block, spectra, path, doubt, near, energies)


def _power(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(-1)


def aligned(reference: Tensor, delay_samples: Tensor, early: int = 160, hop: int = 160) -> Tensor:
    """The reference delayed as its echo is, but for a margin: the oracle for a filter that looks for no delay.

    Args:
        reference: (B, S).
        delay_samples: from the reference to its echo, (B,), or (B, T) with T = ceil(S / hop) + 1 where it changes:
            delay t holds around sample ``hop`` t. Of an ``EchoBatch``: 160 times its ``delay_frames``.
        early: the margin in samples, so that a delay known to a frame is never too long; no delay gets below 0.
        hop: samples from one delay to the next.

    Returns:
        (B, S); silent before the reference begins.

    Raises:
        ValueError: another shape.
    """
    batch, samples = reference.shape
    if delay_samples.shape not in ((batch,), (batch, -(-samples // hop) + 1)):
        raise ValueError(
            f"delay_samples: got shape {tuple(delay_samples.shape)} for a reference {tuple(reference.shape)}, wanted "
            f"({batch},) or ({batch}, {-(-samples // hop) + 1}), one each {hop} samples"
        )
    time = torch.arange(samples, device=reference.device)
    delay = (delay_samples.round().long() - early).clamp_min(0).reshape(batch, -1)
    where = time - (delay[:, (time + hop // 2) // hop] if delay_samples.dim() == 2 else delay)
    return torch.where(where >= 0, reference.gather(-1, where.clamp_min(0)), 0.0)
