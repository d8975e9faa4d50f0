"""Stand-ins for the separator's network: what they separate is known, and they muddle the order of their outputs.

Shapes: B batch, J talkers, S samples, E size of a fingerprint.
"""

from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn

from allears.models.separate import PRESETS, SeparateConfig

RATE_HZ = 4_000
DIGITS = 16


def config_of(talkers: int, rate_hz: int = RATE_HZ) -> SeparateConfig:
    return SeparateConfig(sepreformer=PRESETS["test"].sepreformer, talkers=talkers, sample_rate_hz=rate_hz)


def speech(talkers: int, seconds: float, seed: int = 0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Noise of values k / 16, |k| <= 6, (J, S): what :func:`mix` can put into one signal."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-6, 7, (talkers, round(seconds * rate_hz))) / DIGITS).astype(np.float32)


def mix(sources: np.ndarray) -> np.ndarray:
    """Sources (J, S), J <= 3, as digits of one signal (S,), from which they can be read again without an error."""
    return sum(source / np.float32(DIGITS) ** j for j, source in enumerate(sources))  # type: ignore


def split(mixture: Tensor, talkers: int) -> Tensor:
    """The inverse of :func:`mix`: (B, S) to (B, J, S)."""
    out = []
    for _ in range(talkers):
        out.append((mixture * DIGITS).round() / DIGITS)
        mixture = (mixture - out[-1]) * DIGITS
    return torch.stack(out, dim=1)


class SplitNet(nn.Module):
    """Separates :func:`mix` without memory or error, but in an order that depends on the window.

    Args:
        talkers: J.
        flips: whether the order changes; what it is follows from the samples of the window.
        leak: factor of the other talkers' sum in each output.
        prints: whether the fingerprints tell the talkers, which have much in common and are noisy; of a silent output
            they are noise. Otherwise all are equal.
    """

    def __init__(self, talkers: int = 2, flips: bool = True, leak: float = 0.0, prints: bool = True) -> None:
        super().__init__()
        self.config = config_of(talkers)
        self.flips, self.leak, self.prints = flips, leak, prints
        self.windows: list[int] = []

    def fingerprints(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        talkers = self.config.talkers
        self.windows.append(mixture.shape[1])
        rng = np.random.default_rng(int(mixture.double().abs().sum() * 4096))
        out = split(mixture, talkers)
        prints = torch.from_numpy(rng.standard_normal((talkers, 32)).astype(np.float32))
        if self.prints:
            own = torch.zeros(talkers, 32)
            own[:, :talkers] = 2 * torch.eye(talkers)
            told = out[0].abs().sum(1, keepdim=True) > 0
            prints = torch.where(told, 4.0 + own + 0.1 * prints, prints)
        else:
            prints = torch.ones_like(prints)
        order = rng.permutation(talkers) if self.flips else np.arange(talkers)
        out = out + self.leak * (out.sum(1, keepdim=True) - out)
        return out[:, order], prints[order][None]


class GainNet(nn.Module):
    """Each output is the mixture times a gain: linear, so that any rate comes through; it hears no order."""

    def __init__(self, *gains: float, rate_hz: int = 16_000) -> None:
        super().__init__()
        self.config = config_of(len(gains), rate_hz)
        self.gains = gains

    def fingerprints(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        out = mixture[:, None] * torch.tensor(self.gains)[:, None].to(mixture)
        return out, torch.eye(len(self.gains))[None].to(mixture)


def swaps(outputs: np.ndarray, sources: np.ndarray) -> int:
    """How often the assignment of outputs to talkers (J, S) changes, looked at second by second."""
    orders = np.array(list(permutations(range(len(sources)))))
    count, last = 0, None
    for begin in range(0, outputs.shape[1], RATE_HZ):
        span = slice(begin, begin + RATE_HZ)
        fit = outputs[:, span] @ sources[:, span].T
        sums = fit[np.arange(len(fit)), orders].sum(1)
        if (sums > sums.max() - 1e-3 * abs(sums.max()) - 1e-9).sum() > 1:
            continue  # nobody, or one alone of three: more than one assignment fits
        now = int(sums.argmax())
        count += last is not None and now != last
        last = now
    return count
